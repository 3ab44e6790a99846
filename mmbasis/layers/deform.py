# Copyright (c) mmbasis authors. All rights reserved.
from typing import Tuple

import torch.nn as nn

from .conv import BasisConv

try:
    from mmcv.ops import (DeformConv2d, DeformConv2dPack,
                          ModulatedDeformConv2d, ModulatedDeformConv2dPack)
except ImportError:  # mmcv-lite has no operators, so no such layers
    DEFORM_TYPES: Tuple[type, ...] = ()
else:
    DEFORM_TYPES = (DeformConv2d, DeformConv2dPack, ModulatedDeformConv2d,
                    ModulatedDeformConv2dPack)
    # a layer without bias says so everywhere else: here there is no attribute
    DeformConv2d.bias = None


class BasisDeformConv(BasisConv):
    """A deformable convolution of MMCV (v1 or v2, grouped or not) as basis and
    coefficients.

    The basis samples where the dense layer does, so the offsets (and masks)
    are arguments of ``forward`` or, in the ``Pack`` forms, come from
    ``basis.conv_offset``: the dense layer's offset branch, as it was. The
    coefficients are a 1x1 convolution. See :class:`BasisLayer` for the
    arguments.
    """
    dense_types = DEFORM_TYPES

    def to_dense(self) -> nn.Module:
        """See :meth:`BasisLayer.to_dense`.

        Raises:
            ValueError: If the layer has a bias, and the dense layer is a
                ``DeformConv2d``, which cannot have one.
        """
        has_bias = self.coefficients.bias is not None or self.norm is not None
        if has_bias and 'bias' not in self.basis._parameters:
            raise ValueError(
                f'a {self.dense_type.__name__} has no bias, so this basis '
                'layer, which has one, cannot be merged: keep it as it is, '
                'or compress with data_aware=False')
        return super().to_dense()
