# Copyright (c) mmbasis authors. All rights reserved.
from .basis_layer import BasisLayer, retract
from .inheritance import copy_module, first_argument, observe
from .kinds import (
    ConvKind,
    ConvTransposeKind,
    DeformConvKind,
    DenseKind,
    LinearKind,
    kind_of,
    why_not,
)

__all__ = [
    'BasisLayer', 'DenseKind', 'ConvKind', 'ConvTransposeKind',
    'DeformConvKind', 'LinearKind', 'copy_module', 'first_argument',
    'kind_of', 'observe', 'retract', 'why_not'
]
