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
from .lines import as_square, columns_of

__all__ = [
    'BasisLayer', 'DenseKind', 'ConvKind', 'ConvTransposeKind',
    'DeformConvKind', 'LinearKind', 'as_square', 'columns_of',
    'copy_module', 'first_argument', 'kind_of', 'observe', 'retract',
    'why_not'
]
