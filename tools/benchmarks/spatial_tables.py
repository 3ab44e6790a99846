# Copyright (c) mmbasis authors. All rights reserved.
"""The tables of spatial_form.py."""
import numpy as np
from spatial_fits import COEFFICIENTS, EITHER_ORDER, FORMS

ALL = (*FORMS, EITHER_ORDER, COEFFICIENTS)
#: a form is clearly better if it loses so much less than the best other one
MARGIN = .05


def table(head, rows):
    lines = [head, ['---'] * len(head), *rows]
    return '\n'.join('| ' + ' | '.join(map(str, x)) + ' |' for x in lines)


def errors_of(layers, budget, forms):
    """Shape (layers, forms); infinite where no rank is cheap enough."""
    return np.array([[(x['errors'][budget][form] or [np.inf])[0]
                      for form in forms] for x in layers])


def mean_errors(layers, budgets):
    rows = []
    for budget in budgets:
        found = errors_of(layers, budget, ALL)
        means = [f'{x:.3f}' if np.isfinite(x) else '-'
                 for x in found.mean(0)]
        rows.append([budget, *means])
    return table(['MACs kept', *ALL], rows)


def winners(layers, budgets):
    """Of the three forms that exist and spatial, in one order: how often each
    is best, what the fourth gains, by channels."""
    rows = []
    for width in (None, 16, 32, 64):
        some = [x for x in layers if width in (None, x['channels'][1])]
        for budget in budgets:
            found = errors_of(some, budget, FORMS)
            best = np.bincount(found.argmin(1), minlength=len(FORMS))
            three, four = found[:, :3].min(1), found.min(1)
            clear = int((four < (1 - MARGIN) * three).sum())
            either = np.minimum(
                three, errors_of(some, budget, [EITHER_ORDER])[:, 0])
            rows.append([
                width or 'all', budget, *best, f'{clear} of {len(some)}',
                f'{(1 - four / three).mean():.1%}',
                f'{(1 - either / three).mean():.1%}'])
    return table(
        ['channels', 'MACs kept', *(f'{x} best' for x in FORMS),
         'spatial > 5 % better', 'mean gain', 'mean gain, the better order'],
        rows)


def accuracies(rows):
    budgets = sorted({name.split()[1] for name in rows})
    lines = []
    for budget in budgets:
        found = [rows.get(f'{form} {budget}') for form in FORMS]
        lines.append([budget, *(
            f'{x["accuracy/top1"]:.2f} ({x["kept"]:.3f})' if x else '-'
            for x in found)])
    return table(['MACs kept', *FORMS], lines)


def times(rows):
    keys = [key for key in rows[0]
            if key not in ('channels', 'side', 'budget', 'form', 'ranks')]
    return table(
        ['channels, side', 'form', 'ranks', *keys],
        [[f'{x["channels"]}, {x["side"]}', x['form'],
          ' '.join(map(str, x['ranks'])), *(x[key] for key in keys)]
         for x in rows])


def to_markdown(result):
    layers = list(result['layers'].values())
    budgets = list(layers[0]['errors'])
    return TEXT.format(
        **result,
        count=len(layers),
        torch=result['versions']['torch'],
        means=mean_errors(layers, budgets),
        best=winners(layers, budgets),
        top1=accuracies(result.get('accuracy', {})),
        seconds=times(result['times']['rows']))


TEXT = """# Spatial forms beside the others

Written by `tools/benchmarks/spatial_form.py` on {machine},
{date}, PyTorch {torch}:
`{command}`
ResNet-56, {images} images of CIFAR-10, {count} layers.

**It wins, by a margin that matters.** From a quarter of the MACs up it loses
least in most layers of every width; at 0.15 the both-sided form stays ahead.
Coefficients behind it add nothing, the better of the two orders a few per
cent. The whole network gains as its layers do. It is two kernels: ONNX Runtime
runs them about as fast for their MACs as the other forms, and the device
models find them as fast as the input form on tensor cores, faster than the
three kernels of both. Only where 3x3 layers run by Winograd's algorithm (fp32
on a GPU), which does not know 1 x k, are they slower than the others.

## What a layer loses

Share of the (centred) output's energy, by least squares in the metric of the
data. Spatial: k x 1 from C to R channels, then 1 x k from R to P. With
coefficients: 1 x k to Q channels, then 1x1.

{means}

How many layers lose least in each form, and what spatial gains over the best
of the other three, in relative error:

{best}

## Accuracy without training

The same fraction in every 3x3 layer, each fitted to the dense network's
outputs by centred regression; no loss, no shortcuts, no recalibration. All
test images; in brackets the MACs of these layers.

{top1}

## Time

Of 3x3 layers of ResNet-50, over dense: MACs, ONNX Runtime on one core of this
machine, and models of devices, batch 1. Ranks in multiples of 8.

{seconds}
"""
