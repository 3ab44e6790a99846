# Copyright (c) mmbasis authors. All rights reserved.
"""What has to be known of a dense layer to replace it by a basis layer."""
from typing import Sequence, Tuple

import torch.nn as nn
from torch import Tensor


def channels_attribute(dense: nn.Module) -> str:
    """The attribute that states the number of output channels."""
    return 'out_features' if hasattr(dense, 'out_features') else 'out_channels'


class DenseKind:
    """One kind of dense layer. It has no state and is never instantiated.

    The weights of a dense layer are a matrix ``H`` of shape ``(G, P / G, D)``:
    ``G`` groups, ``P`` output channels, ``D`` weights per output channel.

    A kind of your own is a subclass, usually of one of the kinds here, which
    ``@LAYER_KINDS.register_module()`` announces. It wins over those
    registered before it for the types it names.
    """

    #: what plans and latency tables call the kind
    name: str = ''
    #: classes of this kind; their subclasses belong to it unless they
    #: override ``forward`` or ``_conv_forward``
    dense_types: Tuple[type, ...] = ()

    @staticmethod
    def matrix_shape(dense: nn.Module) -> Tuple[int, int, int]:
        """``(G, P / G, D)`` of a dense layer."""
        channels = getattr(dense, channels_attribute(dense))
        groups = getattr(dense, 'groups', 1)
        return groups, channels // groups, dense.weight.numel() // channels

    @staticmethod
    def to_matrix(dense: nn.Module) -> Tensor:
        """The weights ``H``, shape ``(G, P / G, D)``, of a dense layer, or of
        anything that has its ``weight`` and ``groups``."""
        weight = dense.weight
        return weight.reshape(
            getattr(dense, 'groups', 1), -1, weight[0].numel())

    @staticmethod
    def from_matrix(matrix: Tensor, like: nn.Module) -> Tensor:
        """The inverse of :meth:`to_matrix`, for any number of rows."""
        return matrix.reshape(-1, *like.weight.shape[1:])

    @staticmethod
    def channel_axis(dense: nn.Module) -> int:
        """The axis of inputs and outputs, from the end, that holds the
        channels."""
        return 1 - dense.weight.dim()

    @staticmethod
    def weight_positions(dense: nn.Module, x: Tensor, y: Tensor) -> int:
        """How often the weights are applied to turn input ``x`` into output
        ``y``: the MACs of the layer over the number of its weights."""
        return y.numel() // getattr(dense, channels_attribute(dense))

    @staticmethod
    def sees_patches(dense: nn.Module) -> bool:
        """Whether :meth:`patches` can tell what the layer's weights are
        multiplied with."""
        return False

    @staticmethod
    def patches(dense: nn.Module, x: Tensor, out_shape: Sequence[int],
                positions: Tensor) -> Tensor:
        """What the weights are multiplied with at some output positions.

        Args:
            dense (nn.Module): A layer for which :meth:`sees_patches` holds.
            x (Tensor): Its input.
            out_shape (Sequence[int]): Spatial shape of its output.
            positions (Tensor): Flat indices, shape ``(positions, )``.

        Returns:
            Tensor: Shape ``(N, G * D, positions)``: ``H`` times its blocks of
            ``D`` rows is the output at these positions, without bias.
        """
        raise TypeError(f'the patches of a {type(dense).__name__} are unknown')

    # ------------------------------------------- parts of a basis layer
    @staticmethod
    def build_norm(dense: nn.Module, channels: int) -> nn.Module:
        """A batch normalization of outputs with ``channels`` channels."""
        raise NotImplementedError

    @staticmethod
    def build_coefficients(dense: nn.Module, channels: int,
                           bias: bool) -> nn.Module:
        """The pointwise layer from ``channels`` to the output channels."""
        raise NotImplementedError
