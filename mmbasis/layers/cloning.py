# Copyright (c) mmbasis authors. All rights reserved.
"""Layers like others: with other weights, of another shape."""
import copy
from types import SimpleNamespace
from typing import Any, Mapping, Optional, Type

import torch
import torch.nn as nn
from torch import Tensor

from .inheritance import own_attributes
from .kinds import DenseKind


def liken(parameter: nn.Parameter, model: nn.Parameter) -> None:
    """Whether it is trained, and what models note on it (as: no decay)."""
    parameter.requires_grad = model.requires_grad
    vars(parameter).update(vars(model))


def clone(module: nn.Module, kind: Type[DenseKind], matrix: Tensor,
          geometry: Optional[Mapping[str, Any]] = None) -> nn.Module:
    """Copy a layer with other weights, no bias, no hooks and no methods of the
    instance's own. Plain attributes are shared: a model may hang all that it
    remembers on each of its layers. ``geometry`` is what differs, from
    :func:`~mmbasis.layers.lines.geometry`."""
    copied = type(module).__new__(type(module))
    nn.Module.__init__(copied)
    own, like = vars(copied), module
    for name, value in own_attributes(module).items():
        if name != 'forward' and getattr(value, '__self__', 0) is not module:
            own[name] = value
    if geometry is not None:
        own.update(geometry)
        like = window_of(copied)
    weight = nn.Parameter(kind.from_matrix(matrix, like).to(module.weight))
    liken(weight, module.weight)
    memo = {id(module): copied, id(module.weight): weight}
    for name in ('_parameters', '_buffers', '_modules', 'training'):
        own[name] = copy.deepcopy(vars(module)[name], memo)
    copied._parameters['bias'] = None
    linear = hasattr(module, 'out_features')
    own['out_features' if linear else 'out_channels'] = (
        matrix.shape[:2].numel())
    if not linear:
        own['in_channels'] = len(matrix) * kind.in_channels(copied)
    return copied


def window_of(conv: Any) -> Any:
    """Something with weights in the window of a convolution, for
    :meth:`DenseKind.from_matrix`."""
    return SimpleNamespace(weight=torch.empty(0, 0, *conv.kernel_size))
