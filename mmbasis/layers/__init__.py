# Copyright (c) mmbasis authors. All rights reserved.
from .basis_layer import BasisLayer
from .conv import ConvKind, ConvTransposeKind, DeformConvKind
from .dense_kind import DenseKind
from .inheritance import copy_module, observe
from .kinds import kind_of, why_not
from .linear import LinearKind

__all__ = [
    'BasisLayer', 'DenseKind', 'ConvKind', 'ConvTransposeKind',
    'DeformConvKind', 'LinearKind', 'copy_module', 'kind_of',
    'observe', 'why_not'
]
