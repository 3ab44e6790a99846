# Copyright (c) mmbasis authors. All rights reserved.
from .basis_layer import BasisLayer, retract
from .inheritance import copy_module, observe
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
    'DeformConvKind', 'LinearKind', 'copy_module', 'kind_of', 'observe',
    'retract', 'why_not'
]
