# Copyright (c) mmbasis authors. All rights reserved.
"""Samples of what layers take and return, and moments of them."""
import numpy as np
import torch
from torch import Tensor

from .layers import Layer

#: Positions of one image that a layer's moments are computed from. More add
#: time, not accuracy: neighbours are alike.
MAX_POSITIONS = 256


def chosen_positions(count: int, device: torch.device) -> Tensor:
    """Which of a number of positions are looked at, at most ``MAX_POSITIONS``,
    the same for each image, so that batches make no difference."""
    if count <= MAX_POSITIONS:
        return torch.arange(count, device=device)
    # a grid would see one phase of a strided transposed convolution only
    generator = torch.Generator().manual_seed(count)
    chosen = torch.randperm(count, generator=generator)
    return chosen[:MAX_POSITIONS].to(device)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """``(N, G * C, positions)`` as ``(G, C, N * positions)``, float32."""
    x = x.float().transpose(0, 1).flatten(1)
    return x.view(groups, -1, x.shape[-1])


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """``sum left right^T`` over positions, of shapes ``(G, M, positions)`` and
    ``(G, N, positions)``: float64, ``(G, M, N)``.

    The fast product is of centred float32 samples; what the means contribute
    is added in float64. Where means dwarf deviations, a plain product would
    round the covariance away.
    """
    mean_l, mean_r = left.mean(-1, True), right.mean(-1, True)
    left, right = left - mean_l, right - mean_r
    rest_l, rest_r = (x.sum(-1, True).double() for x in (left, right))
    mean_l, mean_r = mean_l.double(), mean_r.double()
    products = (left @ right.mT).double()
    products += mean_l @ rest_r.mT + rest_l @ mean_r.mT
    return products + left.shape[-1] * mean_l @ mean_r.mT


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


def input_samples(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """Patches of a layer's input ``x`` at the positions of
    :func:`output_samples`, shape ``(G, D, positions)``: ``H`` times it is the
    output without bias. Of the output ``y`` only the shape counts."""
    module, kind = layer.module, layer.known_kind
    axis = kind.channel_axis(module) % y.dim()
    if axis == 0:
        x, y, axis = x.unsqueeze(0), y.unsqueeze(0), 1
    shape = [size for i, size in enumerate(y.shape) if i not in (0, axis)]
    positions = chosen_positions(int(np.prod(shape)), x.device)
    return _by_group(
        kind.patches(module, x, shape, positions), layer.matrix_shape[0])
