# Copyright (c) mmbasis authors. All rights reserved.
"""Which layers can be represented by a basis, and what is known of them."""
from typing import Any, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.cnn.bricks import Conv2dAdaptivePadding, wrappers
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..registry import LAYER_KINDS
from .inheritance import why_not_inherited

try:
    from mmcv import ops
    DEFORM_TYPES: Tuple[type, ...] = (
        ops.DeformConv2d, ops.DeformConv2dPack, ops.ModulatedDeformConv2d,
        ops.ModulatedDeformConv2dPack)
    # a layer without bias says so everywhere else: here there is no attribute
    ops.DeformConv2d.bias = property(lambda x: x._parameters.get('bias'))
except ImportError:  # mmcv-lite has no operators, so no such layers
    DEFORM_TYPES = ()


class _ChannelsLastNorm(nn.BatchNorm1d):
    """Batch normalization of the last axis of ``(..., C)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: by the number of spatial axes
_NORMS = (_ChannelsLastNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class DenseKind:
    """One kind of dense layer. It has no state and is never instantiated.

    The weights of a dense layer are a matrix ``H`` of shape ``(G, P / G, D)``:
    ``G`` groups, ``P`` output channels, ``D`` weights per output channel. As
    they stand, the methods are for weights of shape ``(P, C / G, *kernel)``.

    A kind of your own is a subclass, usually of one of the kinds here, with
    ``@LAYER_KINDS.register_module()``. For its types it wins over older ones.
    """

    #: what plans and latency tables call the kind
    name: str = ''
    #: classes of this kind; their subclasses belong to it unless they
    #: override ``forward`` or ``_conv_forward``
    dense_types: Tuple[type, ...] = ()
    #: those that :meth:`patches` knows; a subclass may pad in its own way
    patch_types: Tuple[type, ...] = ()

    @classmethod
    def matrix_shape(cls, dense: nn.Module) -> Tuple[int, int, int]:
        """``(G, P / G, D)`` of a dense layer."""
        return tuple(cls.to_matrix(dense).shape)  # type: ignore[return-value]

    @staticmethod
    def to_matrix(dense: Any) -> Tensor:
        """The weights ``H``, shape ``(G, P / G, D)``, of a dense layer, or of
        anything that has its ``weight`` and ``groups``."""
        return dense.weight.flatten(1).unflatten(
            0, (getattr(dense, 'groups', 1), -1))

    @staticmethod
    def from_matrix(matrix: Tensor, like: nn.Module) -> Tensor:
        """The inverse of :meth:`to_matrix`, for any number of rows and of
        input channels."""
        return matrix.flatten(0, 1).unflatten(1, (-1, *like.weight.shape[2:]))

    @staticmethod
    def channel_axis(dense: nn.Module) -> int:
        """The axis of inputs and outputs, from the end, with the channels."""
        return 1 - dense.weight.dim()

    @staticmethod
    def weight_positions(dense: nn.Module, x: Tensor, y: Tensor) -> int:
        """How often the weights are applied to turn input ``x`` into output
        ``y``: the MACs of the layer over the number of its weights."""
        return y.numel() // len(dense.weight)

    @classmethod
    def sees_patches(cls, dense: nn.Module) -> bool:
        """Whether :meth:`patches` knows the layer."""
        return type(dense) in cls.patch_types

    @staticmethod
    def patches(dense: nn.Module, x: Tensor) -> Tensor:
        """What the weights are multiplied with, at all output positions.

        Args:
            dense (nn.Module): A layer for which :meth:`sees_patches` holds.
            x (Tensor): The input, with an axis of images.

        Returns:
            Tensor: Shape ``(N, C, *kernel, *out)``, or ``(N, C, positions)``
            of a linear layer: a view, which repeats what windows share.
        """
        if dense.weight.dim() == 2:
            return x.reshape(len(x), -1, x.shape[-1]).mT
        mode = dense.padding_mode
        x = F.pad(x, dense._reversed_padding_repeated_twice,
                  'constant' if mode == 'zeros' else mode)
        for axis, (kernel, stride, dilation) in enumerate(
                zip(dense.kernel_size, dense.stride, dense.dilation), 2):
            x = x.unfold(axis, dilation * (kernel - 1) + 1, stride)
            x = x[..., ::dilation]
        axes = len(dense.kernel_size)
        return x.movedim(tuple(range(2, 2 + axes)), tuple(range(-axes, 0)))

    @staticmethod
    def build_norm(dense: nn.Module, channels: int) -> nn.Module:
        """A batch normalization of outputs with ``channels`` channels."""
        return _NORMS[dense.weight.dim() - 2](channels)

    @classmethod
    def in_channels(cls, dense: nn.Module) -> int:
        """Input channels of a group."""
        window = dense.weight.shape[2:].numel()
        return cls.matrix_shape(dense)[2] // window

    @staticmethod
    def why_one_sided(dense: nn.Module) -> str:
        """Why a layer can have no input basis; empty where it can, as a
        pointwise layer in front commutes with how it reads its input."""
        return 'no input basis is known for layers of its kind'

    @staticmethod
    def why_not_spatial(dense: nn.Module) -> str:
        """Why a layer is never k x 1, then 1 x k; empty where it can be, as
        padding and stride are the same in one axis as in two."""
        return 'only convolutions have a window to split'

    @staticmethod
    def dense_reader(dense: nn.Module) -> Optional[nn.Module]:
        """A module inside that reads the dense input also behind an input
        basis, if there is one."""
        return None

    @staticmethod
    def run_behind(layer: Any, x: Tensor, seen: Tensor, *args: Any,
                   **kwargs: Any) -> Tensor:
        """Run a layer behind an input basis.

        Args:
            layer (nn.Module): Of this kind, with as many input channels as the
                input basis has outputs.
            x (Tensor): The dense input.
            seen (Tensor): What the input basis makes of it.
            *args: What else the layer takes.
            **kwargs: The same by keyword.
        """
        return layer(seen, *args, **kwargs)

    @staticmethod
    def can_have_bias(dense: nn.Module) -> bool:
        """Whether a layer without a bias can be given one."""
        return True

    @classmethod
    def build_input_basis(cls, dense: nn.Module, channels: int) -> nn.Module:
        """The pointwise layer from the input channels to ``channels``."""
        groups = getattr(dense, 'groups', 1)
        conv = _CONVS[dense.weight.dim() - 3]
        return conv(groups * cls.in_channels(dense), channels, 1,
                    groups=groups, bias=False)

    @classmethod
    def build_coefficients(cls, dense: nn.Module, channels: int,
                           bias: bool) -> nn.Module:
        """The pointwise layer from ``channels`` to the output channels."""
        groups, rows, _ = cls.matrix_shape(dense)
        if dense.weight.dim() == 2:
            return nn.Linear(channels, rows, bias=bias)
        conv = _CONVS[dense.weight.dim() - 3]
        return conv(channels, groups * rows, 1, groups=groups, bias=bias)


@LAYER_KINDS.register_module()
class LinearKind(DenseKind):
    """Linear layers: basis and coefficients are linear, too, in one group."""
    name = 'BasisLinear'
    dense_types = patch_types = (nn.Linear, wrappers.Linear)

    @staticmethod
    def why_one_sided(dense: nn.Module) -> str:
        return 'a linear layer has one side'


@LAYER_KINDS.register_module()
class ConvKind(DenseKind):
    """Convolutions (1d, 2d or 3d, grouped or not), of which the basis keeps
    the geometry; the coefficients are a 1x1 convolution."""
    name = 'BasisConv'
    patch_types = (*_CONVS, wrappers.Conv2d, wrappers.Conv3d)
    dense_types: Tuple[type, ...] = (*patch_types, Conv2dAdaptivePadding)

    @staticmethod
    def why_one_sided(dense: nn.Module) -> str:
        return ''

    @staticmethod
    def why_not_spatial(dense: nn.Module) -> str:
        window = dense.weight.shape[2:]
        if len(window) != 2 or min(window) < 2:
            return f'a window of {"x".join(map(str, window))} cannot be split'
        # data must show what its windows see
        if type(dense) not in ConvKind.patch_types:
            return f'it is not known how a {type(dense).__name__} splits'
        return ''


@LAYER_KINDS.register_module()
class ConvTransposeKind(ConvKind):
    """Transposed convolutions (1d, 2d or 3d, grouped or not); the coefficients
    are a 1x1 convolution at the output's resolution."""
    name = 'BasisConvTranspose'
    dense_types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
                   wrappers.ConvTranspose2d, wrappers.ConvTranspose3d)

    # weights are (C, P / G, *kernel), the groups being blocks of C
    @staticmethod
    def to_matrix(dense: Any) -> Tensor:
        blocks = dense.weight.unflatten(0, (dense.groups, -1))
        return blocks.transpose(1, 2).flatten(2)

    @staticmethod
    def from_matrix(matrix: Tensor, like: nn.Module) -> Tensor:
        blocks = matrix.unflatten(2, (-1, *like.weight.shape[2:]))
        return blocks.transpose(1, 2).flatten(0, 1)

    @staticmethod
    def weight_positions(dense: nn.Module, x: Tensor, y: Tensor) -> int:
        return x.numel() // dense.in_channels


@LAYER_KINDS.register_module()
class DeformConvKind(ConvKind):
    """Deformable convolutions of MMCV (v1 or v2, grouped or not), of which the
    basis gets the offsets (and masks), or has a copy of the offset branch.

    Sampling is linear in the input, the same for all channels of a deformable
    group, and zero outside of it: so it commutes with an input basis, which
    has no bias, as long as that mixes no deformable groups."""
    name = 'BasisDeformConv'
    dense_types = DEFORM_TYPES

    @staticmethod
    def why_one_sided(dense: Any) -> str:
        if dense.groups % dense.deform_groups == 0:
            return ''
        return (f'its {dense.deform_groups} deformable groups sample in '
                'places of their own, and a basis of its '
                f'{dense.groups} groups would mix them')

    @staticmethod
    def dense_reader(dense: nn.Module) -> Optional[nn.Module]:
        return getattr(dense, 'conv_offset', None)

    @staticmethod
    def run_behind(layer: Any, x: Tensor, seen: Tensor, *args: Any,
                   **kwargs: Any) -> Tensor:
        modulated = isinstance(layer, ops.ModulatedDeformConv2d)
        branch = DeformConvKind.dense_reader(layer)
        if branch is not None:  # what the forward of a Pack does
            args = (branch(x), )
            if modulated:
                *offsets, mask = args[0].chunk(3, 1)
                args = torch.cat(offsets, 1), mask.sigmoid()
        if modulated:
            return ops.ModulatedDeformConv2d.forward(
                layer, seen, *args, **kwargs)
        y = ops.DeformConv2d.forward(layer, seen, *args, **kwargs)
        # it knows no bias, but the last part of a basis layer may have one
        return y if layer.bias is None else (
            y + layer.bias.type_as(y).view(-1, 1, 1))

    @staticmethod
    def can_have_bias(dense: nn.Module) -> bool:
        return not isinstance(dense, ops.DeformConv2d)


def kind_of(module: nn.Module) -> Optional[Type[DenseKind]]:
    """The kind of a dense layer, or None if none is registered for it; see
    :attr:`DenseKind.dense_types`."""
    kinds = list(LAYER_KINDS.module_dict.values())
    for cls in type(module).__mro__:
        for kind in reversed(kinds):  # a user's kinds come last and win
            if cls in kind.dense_types:
                return kind
        if {'forward', '_conv_forward'} & set(vars(cls)):
            return None
    return None


def why_not(module: nn.Module) -> Optional[str]:
    """Why a linear or convolution layer cannot be represented by a basis: None
    where it can, an empty string for other modules."""
    kind = kind_of(module)
    if kind is None:
        modules = nn.modules.conv._ConvNd, nn.Linear, *DEFORM_TYPES
        if isinstance(module, modules):
            return (f'{type(module).__name__} computes its output in a way '
                    'of its own')
        return ''
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return 'nn.MultiheadAttention reads its weight and never calls it'
    if not isinstance(module._parameters.get('weight'), nn.Parameter):
        return 'its weight is computed (weight or spectral norm)'
    if is_lazy(module.weight):
        return 'its weight is not initialised yet (lazy module)'
    groups, out_per_group, _ = kind.matrix_shape(module)
    if out_per_group == 1:
        return ('depthwise: one output channel per group'
                if groups > 1 else 'one output channel')
    return why_not_inherited(module)
