# Copyright (c) mmbasis authors. All rights reserved.
from typing import Tuple

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

    The basis samples where the dense layer does: offsets (and masks) are
    arguments of ``forward``, or come from its copy of the offset branch.
    """
    name = 'BasisDeformConv'
    dense_types = DEFORM_TYPES
