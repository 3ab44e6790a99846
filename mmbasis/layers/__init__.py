# Copyright (c) mmbasis authors. All rights reserved.
from .base import BasisLayer
from .conv import BasisConv, BasisConvTranspose
from .deform import BasisDeformConv
from .kinds import basis_layer_type, why_not
from .linear import BasisLinear

__all__ = [
    'BasisLayer', 'BasisConv', 'BasisConvTranspose', 'BasisDeformConv',
    'BasisLinear', 'basis_layer_type', 'why_not'
]
