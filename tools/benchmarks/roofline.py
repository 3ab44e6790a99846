# Copyright (c) mmbasis authors. All rights reserved.
"""What the device model predicts, beside what was measured or stated.

Without a GPU, in seconds: the paper's VGG-16 on a Jetson AGX Xavier, ResNet-50
and VGG-16 with the best form in every layer on all presets, and, with
``--measure``, a few convolutions of ONNX Runtime on this machine:

    python tools/benchmarks/roofline.py --measure
"""
import argparse
import dataclasses
import json
import os.path as osp

import numpy as np

from mmbasis.planning.devices import DEVICES, device
from mmbasis.planning.kernels import Convolution, Kernel

RESULTS = osp.join(
    osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__)))), 'docs',
    'results')
# ranks of correct_time_tester.py in github.com/mtayyab454/speed_test
AUTHORS = {
    '2x': [27, 28, 56, 56, 112, 112, 112, *[225] * 6],
    '3x': [9, 13, 32, 64, 64, 64, 90, 128, 128, *[154] * 4],
    '4x': [8, 10, 20, 45, 52, 52, 64, *[103] * 6],
    '5x': [8, 10, 20, 39, 39, 39, 52, *[77] * 6],
}
STATED = {'2x': 1.34, '3x': 1.63, '4x': 1.77, '5x': 1.86}
# their log: length of the busy stretches (docs/jetson.md), 1000 images each
LOGGED = {'dense': 38.2, '2x': 28.6, '3x': 24.7, '4x': 22.7, '5x': 21.7}
# issue 16, by shared/lab/roofline.py: best form per layer, output in every one
ISSUE = {
    'resnet50': {
        'xavier-fp16': (1.18, 1.11),
        'xavier-fp32': (1.82, 1.82),
        'orin-agx-fp16': (1.07, 0.91),
        't4-fp16': (1.04, 0.87),
        'h100-fp16': (1.00, 0.58),
    },
    'vgg16': {
        'xavier-fp16': (1.90, 1.88)
    },
}


def vgg16():
    """The 13 convolutions at 224x224."""
    layers, channels = [], 3
    for width, number, side in ((64, 2, 224), (128, 2, 112), (256, 3, 56),
                                (512, 3, 28), (512, 3, 14)):
        for _ in range(number):
            layers.append(Convolution(channels, width, 9, side**2, side**2))
            channels = width
    return layers


def resnet50():
    """The 53 convolutions at 224x224, stride in the 3x3 ones."""
    layers, channels = [Convolution(3, 64, 49, 224**2, 112**2)], 64
    for number, width, side in ((3, 64, 56), (4, 128, 28), (6, 256, 14),
                                (3, 512, 7)):
        for index in range(number):
            after = before = side**2
            if index == 0 and width > 64:
                before *= 4
            layers += [
                Convolution(channels, width, 1, before, before),
                Convolution(width, width, 9, before, after),
                Convolution(width, 4 * width, 1, after, after, adds=True)
            ]
            if index == 0:
                layers.append(
                    Convolution(channels, 4 * width, 1, before, after))
            channels = 4 * width
    return layers


def macs(kernels):
    return sum(kernel.macs for kernel in kernels)


def largest(layer, fraction, step, **fixed):
    """The largest rank, a multiple, that keeps a fraction of the MACs."""
    ranks = np.arange(step, layer.out_channels, step)
    kept = macs(layer.kernels(ranks)) <= fraction * macs(layer.kernels())
    return int(ranks[kept][-1]) if kept.any() else None


def forms(layer, fraction, step=8):
    """Rank and input rank of each form at a fraction of the layer's MACs. In
    both-sided ones, the smaller share of channels kept is the largest."""
    found, budget = {}, fraction * macs(layer.kernels())
    rank = largest(layer, fraction, step)
    if rank:
        found['output'] = (rank, None)
    if layer.window == 1:
        return found
    inner = np.arange(step, layer.in_channels, step)
    fits = macs(layer.kernels(None, inner)) <= budget
    if fits.any():
        found['input'] = (None, int(inner[fits][-1]))
    outer = np.arange(step, layer.out_channels, step)[:, None]
    share = np.where(
        macs(layer.kernels(outer, inner)) <= budget,
        np.minimum(outer / layer.out_channels, inner / layer.in_channels), 0)
    if share.size and share.max() > 0:
        row, column = np.unravel_index(share.argmax(), share.shape)
        found['both'] = (int(outer[row, 0]), int(inner[column]))
    return found


def best(layer, target, fraction, step=8):
    """The fastest form of a layer, dense included."""
    return min([(None, None), *forms(layer, fraction, step).values()],
               key=lambda form: target.time(layer.kernels(*form)))


def speed_ups(layers, name, fraction=.5, step=8, batch=1):
    """Best form or dense, and output form wherever there is one."""
    target, total = device(name), np.zeros(3)
    for layer in layers:
        layer = dataclasses.replace(layer, batch=batch)
        total += [
            target.time(layer.kernels(*form)) for form in (
                (None, None), best(layer, target, fraction, step),
                (largest(layer, fraction, step), None))
        ]
    return dict(
        dense_ms=round(total[0] * 1e3, 3),
        best=round(total[0] / total[1], 2),
        output=round(total[0] / total[2], 2))


def paper_device(winograd=True, tile=32):
    """An AGX Xavier in its 15 W mode, as the log shows (four cores at
    1.19 GHz): GPU at 670 of 1377 MHz, memory at 1333 of 2133 MHz."""
    board = device('xavier-fp32')
    return dataclasses.replace(
        board,
        name='xavier-fp32, 15 W',
        peak=board.peak * 670 / 1377,
        bandwidth=board.bandwidth * 1333 / 2133,
        winograd=board.winograd if winograd else 1.,
        tile=tile)


def pytorch_kernels(layers, ranks):
    """As PyTorch runs convolutions: adding the bias, the activation and the
    sum with a shortcut are kernels of their own, after dense layers and after
    coefficients."""
    kernels = []
    for layer, rank in zip(layers, ranks):
        width = layer.out_channels
        positions = layer.batch * layer.out_positions
        kernels += dataclasses.replace(layer, adds=False).kernels(rank)
        pointwise = Kernel(width, width, positions, positions, window=0)
        kernels += [pointwise] * 2
        if layer.adds:
            kernels.append(dataclasses.replace(pointwise, adds=True))
    return kernels


def vgg16_seconds(ranks, board):
    """torchvision's VGG-16 in PyTorch, with its pooling and the linear layers,
    which stay dense."""
    layers = vgg16()
    kernels = pytorch_kernels(layers, ranks)
    for layer in (layers[i] for i in (1, 3, 6, 9, 12)):
        width, side = layer.out_channels, layer.out_positions
        kernels.append(Kernel(width, width, side, side // 4, window=0))
    for inputs, outputs in ((25088, 4096), (4096, 4096), (4096, 1000)):
        kernels += Convolution(inputs, outputs, 1, 1, 1).kernels()
    return float(board.time(kernels))


def paper():
    """Predicted and stated speed-ups of the authors' plans."""
    rows = {}
    uniform = {
        name: [largest(x, 1 / int(name[0]), 1) or 1 for x in vgg16()]
        for name in AUTHORS
    }
    for label, ranks, board in (
            ('authors', AUTHORS, paper_device()),
            ('uniform', uniform, paper_device()),
            ('authors, blocks of 64', AUTHORS, paper_device(tile=64)),
            ('authors, no Winograd', AUTHORS, paper_device(winograd=False))):
        dense = vgg16_seconds([None] * 13, board)
        seconds = {k: vgg16_seconds(v, board) for k, v in ranks.items()}
        rows[label] = {
            'dense_ms': round(dense * 1e3, 1),
            'ms': {k: round(v * 1e3, 1) for k, v in seconds.items()},
            'speed_up': {k: round(dense / v, 2) for k, v in seconds.items()},
        }
    return rows


def h100():
    """ResNet-50 at half the MACs in every layer, ranks as they come, in
    PyTorch with CUDA graphs; measured with the paper's rule."""
    rows = {}
    for batch, measured in ((1, .72), (32, .65)):
        layers = [dataclasses.replace(x, batch=batch) for x in resnet50()]
        ranks = [largest(layer, .5, 1) for layer in layers]
        dense, basis = (
            float(device('h100-fp16').time(pytorch_kernels(layers, x)))
            for x in ([None] * len(layers), ranks))
        rows[f'batch {batch}'] = dict(
            predicted=round(dense / basis, 2), measured=measured)
    return rows


def cpu_plans(layers):
    """Ranks and input ranks of all layers, dense first."""
    plans = {'dense': [(None, None)] * len(layers)}
    for fraction in (.5, .3):
        head = f'ResNet-50, {fraction} of each layer'
        for step in (1, 8, 16):
            plans[f'{head}, output, multiples of {step}'] = [
                (largest(x, fraction, step), None) for x in layers]
        for form in ('input', 'both'):
            found = [forms(x, fraction) for x in layers]
            plans[f'{head}, {form} (1x1: output)'] = [
                x.get(form, x.get('output', (None, None))) for x in found]
        plans[f'{head}, best by the model'] = [
            best(x, device('cpu'), fraction) for x in layers]
    return plans


def run(with_cpu):
    networks = {'resnet50': resnet50(), 'vgg16': vgg16()}
    results = dict(
        paper=paper(), stated=STATED, logged_ms=LOGGED, h100=h100(),
        presets={
            net: {
                name: {
                    f'{fraction} batch {batch}': speed_ups(
                        layers, name, fraction, batch=batch)
                    for fraction, batch in ((.5, 1), (.25, 1), (.5, 32))
                }
                for name in DEVICES
            }
            for net, layers in networks.items()
        }, issue=ISSUE)
    if with_cpu:
        from cpu_forms import measure_layers, measure_resnet50
        layers = networks['resnet50']
        results['cpu'] = {
            **measure_resnet50(layers, cpu_plans(layers)),
            **measure_layers()
        }
    return results


def table(head, rows):
    lines = [head, ['---'] * len(head), *rows]
    return [f'| {" | ".join(map(str, line))} |' for line in lines] + ['']


INTRODUCTION = """\
# The device model beside measurements

Written by `tools/benchmarks/roofline.py`. The model and what it assumes:
`mmbasis/planning/devices.py`. Peaks and bandwidths are those of data sheets;
large layers are taken to reach half the peak of tensor cores, 0.7 of that of
ordinary ones, and 0.7 of the bandwidth, on every device.

## The paper: VGG-16, 224x224, batch 1, AGX Xavier, PyTorch fp32

The authors' own ranks (`correct_time_tester.py` of their repository), and a
uniform share of the MACs in every layer; all 13 convolutions in output form,
linear layers dense; bias, ReLU and pooling are kernels of their own. Their log
shows four cores at 1.19 GHz, which is the 15 W mode: GPU at 670 MHz, memory at
1333 MHz. Times in brackets: the stretches of the log, for 1000 images (the
script's number).

If clocks and images are these, the board used Winograd's algorithm: the dense
network takes 38 ms, its convolutions alone would take 45 ms at the full peak
without it. The width of blocks was chosen with these figures in sight: usual
kernels have 32, 64 or 128 outputs, 32 comes closest and is used for all GPUs.
The last two rows show how much each matters.
"""


def markdown(results):
    text = [INTRODUCTION]
    stated, logged = results['stated'], results['logged_ms']
    text += table(['plans', 'dense, ms', *stated], [
        ['stated (log, ms)', logged['dense'],
         *(f'**{x}** ({logged[k]})' for k, x in stated.items())],
        *([name, row['dense_ms'],
           *(f'{x} ({row["ms"][k]})' for k, x in row['speed_up'].items())]
          for name, row in results['paper'].items())])
    text += ["## Speed-up of a network's convolutions", '',
             'Best: each layer takes the fastest of dense, output, input and '
             'both, ranks in multiples of 8. Output: every layer is output '
             'form. In brackets: issue 16, `lab/roofline.py`, which leaves '
             'out that the last kernel of a block reads the shortcut. Without '
             'that, the best of a Xavier in fp16 would be 1.19 at half the '
             'MACs of ResNet-50, 1.43 at a quarter and 1.67 at batch 32.', '']
    for net, presets in results['presets'].items():
        issue = results['issue'][net]
        text += table(
            [net, 'dense, ms', 'half the MACs: best', 'output',
             'a quarter: best', 'half, batch 32: best'],
            [[name, row['0.5 batch 1']['dense_ms'],
              *(f'{row["0.5 batch 1"][key]}' + (
                  f' ({issue[name][i]})' if name in issue else '')
                for i, key in enumerate(('best', 'output'))),
              row['0.25 batch 1']['best'], row['0.5 batch 32']['best']]
             for name, row in presets.items()])
    text += ['## H100, PyTorch fp16 with CUDA graphs, ResNet-50', '',
             'Half the MACs in every layer, ranks as they come. The model '
             'knows TensorRT, which pads a few tensors, and is far too kind '
             'at batch 32; slower kernels of cuDNN for odd channels are the '
             'likely reason, not examined.', '']
    text += table(['', 'predicted', 'measured'], [
        [name, *row.values()] for name, row in results['h100'].items()])
    if 'cpu' in results:
        text += ['## ONNX Runtime on one core of this machine', '',
                 'Time over that of the dense network or layer, in processor '
                 'time. Bandwidth, cache and `half_wide` of the preset were '
                 'fitted to 940 convolutions in profiles of ResNet-50, '
                 'RTMDet-s and YOLOX-s on two cores, not to these.', '']
        text += table(['', 'MACs', 'predicted', 'measured'], [
            [name, *row.values()] for name, row in results['cpu'].items()])
    return '\n'.join(text).rstrip() + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--measure', action='store_true')
    parser.add_argument('--out', default=osp.join(RESULTS, 'roofline'))
    args = parser.parse_args()
    results = run(args.measure)
    with open(args.out + '.json', 'w', encoding='utf-8') as file:
        json.dump(results, file, indent=1)
        file.write('\n')
    with open(args.out + '.md', 'w', encoding='utf-8') as file:
        file.write(markdown(results))


if __name__ == '__main__':
    main()
