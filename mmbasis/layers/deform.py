# Copyright (c) mmbasis authors. All rights reserved.
from typing import Tuple

import torch.nn as nn

from ..registry import LAYER_KINDS
from .conv import ConvKind

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


@LAYER_KINDS.register_module()
class DeformConvKind(ConvKind):
    """Deformable convolutions of MMCV (v1 or v2, grouped or not).

    The basis samples where the dense layer does, so the offsets (and masks)
    are arguments of ``forward`` or, in the ``Pack`` forms, come from
    ``basis.conv_offset``: the dense layer's offset branch, as it was. The
    coefficients are a 1x1 convolution.
    """
    name = 'BasisDeformConv'
    dense_types = DEFORM_TYPES

    @staticmethod
    def takes_bias(dense: nn.Module) -> bool:
        return 'bias' in dense._parameters  # a DeformConv2d has no place
