# Copyright (c) mmbasis authors. All rights reserved.
from typing import List, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import (
    Conv2dAdaptivePadding,
    ConvTranspose2d,
    ConvTranspose3d,
)
from mmcv.cnn.bricks.wrappers import Conv2d, Conv3d
from torch import Tensor

from ..registry import LAYER_KINDS
from .dense_kind import DenseKind

try:
    from mmcv.ops import (
        DeformConv2d,
        DeformConv2dPack,
        ModulatedDeformConv2d,
        ModulatedDeformConv2dPack,
    )
except ImportError:  # mmcv-lite has no operators, so no such layers
    DEFORM_TYPES: Tuple[type, ...] = ()
else:
    DEFORM_TYPES = (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d,
                    ModulatedDeformConv2dPack)
    # a layer without bias says so everywhere else: here there is no attribute
    DeformConv2d.bias = None

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@LAYER_KINDS.register_module()
class ConvKind(DenseKind):
    """Convolutions (1d, 2d or 3d, grouped or not), of which the basis keeps
    the geometry; the coefficients are a 1x1 convolution."""
    name = 'BasisConv'
    dense_types: Tuple[type, ...] = (*_CONVS, Conv2d, Conv3d,
                                     Conv2dAdaptivePadding)

    @staticmethod
    def sees_patches(dense: nn.Module) -> bool:
        # a subclass may pad in a way of its own
        return type(dense) in (*_CONVS, Conv2d, Conv3d)

    @staticmethod
    def patches(dense: nn.Module, x: Tensor, out_shape: Sequence[int],
                positions: Tensor) -> Tensor:
        mode = dense.padding_mode
        x = F.pad(x, dense._reversed_padding_repeated_twice,
                  'constant' if mode == 'zeros' else mode)
        at = torch.zeros(1, 1, dtype=torch.long, device=x.device)
        steps: List[Tensor] = []
        step = positions
        for size in reversed(out_shape):
            steps.insert(0, step % size)
            step = torch.div(step, size, rounding_mode='floor')
        # flat index of (place in the kernel, position), axis by axis
        for place, size, kernel, stride, dilation in zip(
                steps, x.shape[2:], dense.kernel_size, dense.stride,
                dense.dilation):
            offsets = dilation * torch.arange(kernel, device=x.device)
            index = offsets.view(-1, 1) + stride * place
            at = (at.unsqueeze(1) * size + index).flatten(0, 1)
        return x.flatten(2)[..., at].flatten(1, 2)

    @staticmethod
    def build_norm(dense: nn.Module, channels: int) -> nn.Module:
        return _NORMS[dense.weight.dim() - 3](channels)

    @staticmethod
    def build_coefficients(dense: nn.Module, channels: int,
                           bias: bool) -> nn.Module:
        conv = _CONVS[dense.weight.dim() - 3]
        return conv(
            channels, dense.out_channels, 1, groups=dense.groups, bias=bias)


@LAYER_KINDS.register_module()
class ConvTransposeKind(ConvKind):
    """Transposed convolutions (1d, 2d or 3d, grouped or not); the coefficients
    are a 1x1 convolution at the output's resolution."""
    name = 'BasisConvTranspose'
    dense_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
                   ConvTranspose2d, ConvTranspose3d)

    @staticmethod
    def sees_patches(dense: nn.Module) -> bool:
        return False

    # weights are (C, P / G, *kernel), the groups being blocks of C
    @staticmethod
    def to_matrix(dense: nn.Module) -> Tensor:
        weight = dense.weight
        blocks = weight.reshape(dense.groups, -1, *weight.shape[1:])
        return blocks.transpose(1, 2).flatten(2)

    @staticmethod
    def from_matrix(matrix: Tensor, like: nn.Module) -> Tensor:
        groups, rows, _ = matrix.shape
        kernel = like.weight.shape[2:]
        blocks = matrix.reshape(groups, rows, -1, *kernel)
        return blocks.transpose(1, 2).reshape(-1, rows, *kernel)

    @staticmethod
    def weight_positions(dense: nn.Module, x: Tensor, y: Tensor) -> int:
        return x.numel() // dense.in_channels


@LAYER_KINDS.register_module()
class DeformConvKind(ConvKind):
    """Deformable convolutions of MMCV (v1 or v2, grouped or not).

    The basis samples where the dense layer does: offsets (and masks) are
    arguments of ``forward``, or come from its copy of the offset branch.
    """
    name = 'BasisDeformConv'
    dense_types = DEFORM_TYPES
