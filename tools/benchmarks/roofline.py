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
import time
from statistics import median

import numpy as np

from mmbasis.planning.devices import DEVICES, Convolution, Kernel, device

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
MEASURED = [(3, 64, 49, 4, 112, 32), (64, 64, 9, 1, 56, 28),
            (128, 128, 9, 1, 28, 60), (256, 256, 9, 1, 14, 120),
            (512, 512, 9, 1, 7, 240), (256, 1024, 1, 1, 14, 104)]


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
                Convolution(width, 4 * width, 1, after, after)
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
    """Kernels of each form at a fraction of the layer's MACs. In both-sided
    ones, the smaller share of channels kept is as large as it can be."""
    found, budget = {}, fraction * macs(layer.kernels())
    rank = largest(layer, fraction, step)
    if rank:
        found['output'] = layer.kernels(rank)
    if layer.window == 1:
        return found
    inner = np.arange(step, layer.in_channels, step)
    fits = macs(layer.kernels(None, inner)) <= budget
    if fits.any():
        found['input'] = layer.kernels(None, int(inner[fits][-1]))
    outer = np.arange(step, layer.out_channels, step)[:, None]
    share = np.where(
        macs(layer.kernels(outer, inner)) <= budget,
        np.minimum(outer / layer.out_channels, inner / layer.in_channels), 0)
    if share.size and share.max() > 0:
        row, column = np.unravel_index(share.argmax(), share.shape)
        found['both'] = layer.kernels(int(outer[row, 0]), int(inner[column]))
    return found


def speed_ups(layers, name, fraction=.5, step=8, batch=1):
    """Best form or dense, and output form wherever there is one."""
    target, total = device(name), np.zeros(3)
    for layer in layers:
        layer = dataclasses.replace(layer, batch=batch)
        dense = float(target.time(layer.kernels()))
        times = {
            form: float(target.time(kernels))
            for form, kernels in forms(layer, fraction, step).items()
        }
        total += (dense, min([dense, *times.values()]),
                  times.get('output', dense))
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


def vgg16_seconds(ranks, board):
    """torchvision's VGG-16 as PyTorch runs it: bias, ReLU and pooling are
    kernels of their own, the linear layers stay dense."""
    layers = vgg16()
    kernels = [
        kernel for layer, rank in zip(layers, ranks)
        for kernel in layer.kernels(rank)
    ]
    for index, layer in enumerate(layers):
        width, side = layer.out_channels, layer.out_positions
        kernels += [Kernel(width, width, side, side, window=0)] * 2
        if index in (1, 3, 6, 9, 12):
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
    plans = {'authors': AUTHORS, 'uniform': uniform}
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
    return rows, plans
