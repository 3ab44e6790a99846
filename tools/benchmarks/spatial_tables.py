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
    return f'''# Spatial forms beside the others

Written by `tools/benchmarks/spatial_form.py` on {result['machine']},
{result['date']}, PyTorch {result['versions']['torch']}:
`{result['command']}`. ResNet-56, {result['images']} images of CIFAR-10,
{len(layers)} layers.

## What a layer loses

Share of the (centred) output's energy, by least squares in the metric of the
data. Spatial: k x 1 from C to R channels, then 1 x k from R to P. With
coefficients: 1 x k to Q channels, then 1x1.

{mean_errors(layers, budgets)}

How many layers lose least in each form, and what spatial gains over the best
of the other three:

{winners(layers, budgets)}

## Accuracy without training

The same fraction in every 3x3 layer, each fitted to the dense network's outputs
by centred regression; no loss, no shortcuts, no recalibration. All test images;
in brackets the MACs of these layers.

{accuracies(result['accuracy'])}

## Time

Of 3x3 layers of ResNet-50, over dense: MACs, ONNX Runtime on one core of this
machine, and models of devices, batch 1. Ranks in multiples of 8.

{times(result['times']['rows'])}
'''
