# Copyright (c) mmbasis authors. All rights reserved.
from typing import Sequence, Tuple

import torch.nn as nn
from mmcv.cnn.bricks import Linear
from torch import Tensor

from .base import BasisLayer


class _ChannelsLastNorm(nn.BatchNorm1d):
    """Batch normalisation of the last axis of ``(..., C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class BasisLinear(BasisLayer):
    """A linear layer as basis and coefficients, both linear layers.

    See :class:`BasisLayer` for the arguments; there is one group.
    """
    dense_types = (nn.Linear, Linear)

    @staticmethod
    def matrix_shape(dense: nn.Module) -> Tuple[int, int, int]:
        return (1, *dense.weight.shape)

    @staticmethod
    def to_matrix(dense: nn.Module) -> Tensor:
        return dense.weight.unsqueeze(0)

    @staticmethod
    def from_matrix(matrix: Tensor, like: nn.Module) -> Tensor:
        return matrix.squeeze(0)

    @staticmethod
    def _narrowed(dense: nn.Module, channels: int) -> dict:
        return dict(out_features=channels)

    @staticmethod
    def channel_axis(dense: nn.Module) -> int:
        return -1

    @staticmethod
    def weight_positions(dense: nn.Module, x: Tensor, y: Tensor) -> int:
        return y.numel() // dense.out_features

    @staticmethod
    def sees_patches(dense: nn.Module) -> bool:
        return type(dense) in (nn.Linear, Linear)

    @staticmethod
    def patches(dense: nn.Module, x: Tensor, out_shape: Sequence[int],
                positions: Tensor) -> Tensor:
        return x.reshape(len(x), -1, x.shape[-1]).mT[..., positions]

    @staticmethod
    def _build_norm(channels: int) -> nn.Module:
        return _ChannelsLastNorm(channels)

    @staticmethod
    def _build_coefficients(dense: nn.Module, channels: int,
                            bias: bool) -> nn.Module:
        return nn.Linear(channels, dense.out_features, bias=bias)
