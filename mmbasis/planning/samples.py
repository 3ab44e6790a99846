# Copyright (c) mmbasis authors. All rights reserved.
"""Samples of what layers take and return, and moments of them."""
from dataclasses import replace
from functools import lru_cache
from typing import Any, Tuple

import torch
from torch import Tensor

from ..layers import columns_of
from .layers import Layer

#: Positions of one image that a layer's moments are computed from. More add
#: time, not accuracy: neighbours are alike.
MAX_POSITIONS = 256
#: Rows of a symmetric product that are computed at a time.
BLOCK = 256


def chosen_positions(count: int, device: torch.device) -> Tensor:
    """Which of a number of positions are looked at, at most ``MAX_POSITIONS``,
    the same for each image, so that batches make no difference."""
    if count <= MAX_POSITIONS:
        return torch.arange(count, device=device)
    # the kept copy does not change, so nobody waits for it to arrive
    return _drawn_positions(count).to(device, non_blocking=True)


@lru_cache(maxsize=256)
def _drawn_positions(count: int) -> Tensor:
    """On the CPU, whose generator draws the same for every device."""
    # a grid would see one phase of a strided transposed convolution only
    generator = torch.Generator().manual_seed(count)
    chosen = torch.randperm(count, generator=generator)
    # in their order they are next to each other in memory
    return chosen[:MAX_POSITIONS].sort()[0]


def _places(positions: Tensor, shape: torch.Size) -> Tuple[Tensor, ...]:
    """Positions as indices of each axis, on their device: NumPy's way would
    wait for a GPU."""
    found = []
    for size in reversed(shape):
        found.append(positions % size)
        positions = positions.div(size, rounding_mode='floor')
    return tuple(reversed(found))


def _by_group(x: Tensor, groups: int) -> Tensor:
    """``(N, G * C, positions)`` as ``(G, C, N * positions)``, float32."""
    x = x.float().transpose(0, 1).flatten(1)
    return x.view(groups, -1, x.shape[-1])


def add_products(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add ``sum left right^T`` over positions, of shapes ``(G, M, positions)``
    and ``(G, N, positions)``, to a float64 total, ``(G, M, N)``.

    The fast product is of centred float32 samples; what the means contribute
    is added in float64. Where means dwarf deviations, a plain product would
    round the covariance away.
    """
    same = left is right
    mean_r = right.mean(-1, True)
    mean_l = mean_r if same else left.mean(-1, True)
    right = right - mean_r
    left = right if same else left - mean_l
    total += gram(right) if same else left @ right.mT
    rest_l, rest_r = (x.sum(-1, True).double() for x in (left, right))
    mean_l, mean_r = mean_l.double(), mean_r.double()
    total += torch.cat([mean_l, rest_l], -1) @ torch.cat(
        [rest_r + left.shape[-1] * mean_r, mean_r], -1).mT


def gram(samples: Tensor) -> Tensor:
    """``samples samples^T``, of shape ``(G, N, positions)``: what is above the
    diagonal is copied from below, and costs no products where ``N`` is
    large."""
    products = samples.new_empty((*samples.shape[:2], samples.shape[1]))
    for start in range(0, samples.shape[1], BLOCK):
        rows = slice(start, start + BLOCK)
        block = samples[:, rows] @ samples[:, :start + BLOCK].mT
        products[:, rows, :start + BLOCK] = block
        products[:, :start, rows] = block[..., :start].mT
    return products


def is_expansion(layer: Layer) -> bool:
    """Whether inputs are fewer than outputs, and so cheaper to look at."""
    _, rows, in_size = layer.matrix_shape
    return in_size < rows and layer.known_kind.sees_patches(layer.module)


def output_samples(layer: Layer, y: Tensor) -> Tensor:
    """Channels of a layer's output (or input) at the chosen positions of each
    image, shape ``(G, P / G, positions)``, float32."""
    axis = layer.known_kind.channel_axis(layer.module) % y.dim()
    if axis == 0:
        y, axis = y.unsqueeze(0), 1
    y = y.movedim(axis, 1).flatten(2) if y.dim() > 2 else y.unsqueeze(-1)
    if y.shape[-1] > MAX_POSITIONS:
        y = y[..., chosen_positions(y.shape[-1], y.device)]
    return _by_group(y, layer.matrix_shape[0])


def column_samples(layer: Layer, x: Tensor) -> Tensor:
    """Columns of the windows of a layer that can be split, at positions as
    high as its output and as wide as its input, ``(G, C k, positions)``."""
    columns: Any = columns_of(layer.module)
    return input_samples(replace(layer, module=columns), x)


def input_samples(layer: Layer, x: Tensor) -> Tensor:
    """Patches of a layer's input at the positions of :func:`output_samples`,
    shape ``(G, D, positions)``: ``H`` times it is the output without bias."""
    module, kind = layer.module, layer.known_kind
    if kind.channel_axis(module) % x.dim() == 0:
        x = x.unsqueeze(0)
    x = kind.patches(module, x)
    shape = x.shape[-max(module.weight.dim() - 2, 1):]
    positions = chosen_positions(shape.numel(), x.device)
    return _by_group(
        x[(..., *_places(positions, shape))].flatten(1, -2),
        layer.matrix_shape[0])
