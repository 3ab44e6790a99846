# Copyright (c) mmbasis authors. All rights reserved.
"""Which layers can be represented by a basis, and why others cannot."""
from typing import Optional, Type

import torch.nn as nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..registry import LAYER_KINDS
from .conv import DEFORM_TYPES
from .dense_kind import DenseKind
from .inheritance import why_not_inherited


def kind_of(module: nn.Module) -> Optional[Type[DenseKind]]:
    """The kind of a dense layer, or None if none is registered for it.

    A subclass counts as its parent as long as it computes what its parent
    does, that is, overrides neither ``forward`` nor ``_conv_forward``.
    """
    kinds = list(LAYER_KINDS.module_dict.values())
    for cls in type(module).__mro__:
        for kind in reversed(kinds):  # a user's kinds come last and win
            if cls in kind.dense_types:
                return kind
        if {'forward', '_conv_forward'} & set(vars(cls)):
            return None
    return None


def why_not(module: nn.Module) -> Optional[str]:
    """Why a linear or convolution layer cannot be represented by a basis.

    Returns:
        str | None: None where it can; an empty string where the module is not
        a linear or convolution layer at all.
    """
    kind = kind_of(module)
    if kind is None:
        if isinstance(module, (_ConvNd, nn.Linear, *DEFORM_TYPES)):
            return (f'{type(module).__name__} computes its output in a way '
                    'of its own')
        return ''
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return 'nn.MultiheadAttention reads its weight and never calls it'
    if not isinstance(module._parameters.get('weight'), nn.Parameter):
        return 'its weight is computed (weight or spectral norm)'
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return 'its weight is not initialised yet (lazy module)'
    groups, out_per_group, _ = kind.matrix_shape(module)
    if out_per_group == 1:
        return ('depthwise: one output channel per group'
                if groups > 1 else 'one output channel')
    return why_not_inherited(module)
