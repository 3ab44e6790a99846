# Copyright (c) mmbasis authors. All rights reserved.
"""The two axes of 2d convolutions, one at a time: strides, padding and
dilation of each are its own."""
from types import SimpleNamespace
from typing import Any, Dict

import torch.nn as nn
from torch import Tensor


def geometry(conv: Any, *axes: int) -> Dict[str, Any]:
    """The attributes of a convolution as they are when it sees some of its
    axes only; in the others its window is 1."""

    def kept(name: str, rest: int) -> tuple:
        return tuple(value if axis in axes else rest
                     for axis, value in enumerate(getattr(conv, name)))

    found = {name: kept(name, 1)
             for name in ('kernel_size', 'stride', 'dilation')}
    found['padding'] = conv.padding
    if not isinstance(conv.padding, str):  # 'same' is so in each axis
        found['padding'] = kept('padding', 0)
    return dict(found, _reversed_padding_repeated_twice=[
        pad if 1 - index // 2 in axes else 0
        for index, pad in enumerate(conv._reversed_padding_repeated_twice)])


def columns_of(conv: Any) -> Any:
    """What :meth:`DenseKind.patches` needs to know of a convolution that sees
    the columns of the windows of another, at the width of the input."""
    return SimpleNamespace(
        weight=conv.weight, groups=conv.groups,
        padding_mode=conv.padding_mode, **geometry(conv, 0))


def as_square(weights: Tensor, channels: int) -> Tensor:
    """Weights ``(G, P, C k)`` as a matrix ``(G, P k, C)``: of the product of a
    spatial form, with columns as channels, its rank is that of the form."""
    blocks = weights.unflatten(-1, (channels, -1))
    return blocks.transpose(-1, -2).flatten(1, 2)


def build_rows(dense: Any, channels: int, bias: bool) -> nn.Module:
    """The convolution from ``channels`` to the outputs of another that sees
    the rows of its windows, behind their columns."""
    own = geometry(dense, 1)
    del own['_reversed_padding_repeated_twice']
    return nn.Conv2d(
        channels, dense.out_channels, groups=dense.groups, bias=bias,
        padding_mode=dense.padding_mode, **own)
