# Copyright (c) mmbasis authors. All rights reserved.
from typing import Sequence

import torch.nn as nn
from mmcv.cnn.bricks import Linear
from torch import Tensor

from ..registry import LAYER_KINDS
from .dense_kind import DenseKind


class _ChannelsLastNorm(nn.BatchNorm1d):
    """Batch normalization of the last axis of ``(..., C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


@LAYER_KINDS.register_module()
class LinearKind(DenseKind):
    """Linear layers: basis and coefficients are linear, too, in one group."""
    name = 'BasisLinear'
    dense_types = (nn.Linear, Linear)

    @staticmethod
    def sees_patches(dense: nn.Module) -> bool:
        return type(dense) in (nn.Linear, Linear)

    @staticmethod
    def patches(dense: nn.Module, x: Tensor, out_shape: Sequence[int],
                positions: Tensor) -> Tensor:
        return x.reshape(len(x), -1, x.shape[-1]).mT[..., positions]

    @staticmethod
    def build_norm(dense: nn.Module, channels: int) -> nn.Module:
        return _ChannelsLastNorm(channels)

    @staticmethod
    def build_coefficients(dense: nn.Module, channels: int,
                           bias: bool) -> nn.Module:
        return nn.Linear(channels, dense.out_features, bias=bias)
