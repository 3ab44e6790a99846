# Copyright (c) mmbasis authors. All rights reserved.
"""Samples of what layers take and return, and moments of them."""
from dataclasses import dataclass
from functools import partial
from typing import Tuple

import numpy as np
import torch
from mmengine.dist import all_reduce
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
    """``sum left right^T`` over positions, float64, shape ``(G, M, N)``.

    The fast product is of centred float32 samples; what the means contribute
    is added in float64. Where means dwarf deviations, a plain product would
    round the covariance away.

    Args:
        left (Tensor): Shape ``(G, M, positions)``.
        right (Tensor): Shape ``(G, N, positions)``.
    """
    count = left.shape[-1]
    shift_l, left, rest_l = _centre(left)
    shift_r, right, rest_r = _centre(right)
    products = (left @ right.mT).double()
    products += shift_l @ rest_r.mT + rest_l @ shift_r.mT
    return products + count * shift_l @ shift_r.mT


def _centre(samples: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Rounded means, deviations from them, and the sums of these."""
    mean = samples.mean(-1, True)
    samples = samples - mean
    return mean.double(), samples, samples.sum(-1, True).double()


@dataclass
class Moments:
    """Sums over positions of a layer's outputs, or of its inputs where these
    are fewer (an expansion), in float64.

    Args:
        of_input (bool): Whether the moments are those of the input.
        count (Tensor): Number of positions, a scalar.
        total (Tensor): Sum, shape ``(G, N)``.
        second (Tensor): Sum of outer products, shape ``(G, N, N)``.
    """
    of_input: bool
    count: Tensor
    total: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, layer: Layer) -> 'Moments':
        """Moments of nothing, on the device of the layer's weights."""
        of_input = is_expansion(layer)
        groups, rows, in_size = layer.matrix_shape
        size = in_size if of_input else rows
        zeros = partial(layer.module.weight.new_zeros, dtype=torch.float64)
        return cls(of_input, zeros(()), zeros((groups, size)),
                   zeros((groups, size, size)))

    def add(self, samples: Tensor) -> None:
        """Add samples of shape ``(G, N, positions)``."""
        self.count += samples.shape[-1]
        self.total += samples.sum(-1, dtype=torch.float64)
        self.second += sum_of_products(samples, samples)

    def reduce(self) -> None:
        """Sum over all processes."""
        for tensor in (self.count, self.total, self.second):
            all_reduce(tensor)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        mean = self.mean.unsqueeze(-1)
        return self.second / self.count - mean @ mean.mT


def is_expansion(layer: Layer) -> bool:
    """Whether a layer maps few inputs to more outputs, so that its inputs are
    the cheaper ones to look at."""
    _, rows, in_size = layer.matrix_shape
    return in_size < rows and layer.known_kind.sees_patches(layer.module)


def output_samples(layer: Layer, y: Tensor) -> Tensor:
    """Channels of a layer's output at the chosen positions of each image,
    shape ``(G, P / G, positions)``, float32."""
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
