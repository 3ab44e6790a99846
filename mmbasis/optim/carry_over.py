# Copyright (c) mmbasis authors. All rights reserved.
"""The state of an optimizer whose parameters are factorised again."""
from types import SimpleNamespace
from typing import Any, Dict, Tuple

import torch
import torch.nn as nn
from mmengine.optim import OptimWrapper
from torch import Tensor

from ..layers import BasisLayer, kind_of

#: entries of an optimizer's state that are averages of gradients
_GRADIENTS = ('momentum_buffer', 'exp_avg')


@torch.no_grad()
def carry_over(old_model: nn.Module, old: OptimWrapper, new_model: nn.Module,
               new: OptimWrapper) -> None:
    """Hand the state of an optimizer to that of the same model with other
    ranks.

    Parameters that are there in both keep their state. Averaged gradients of
    factors are turned into one of the product and from there into those of
    the new factors; entries of other kinds keep their mean. Learning rates
    go on where they stand in the schedule.

    Args:
        old_model (nn.Module): The model before.
        old (OptimWrapper): Its optimizer.
        new_model (nn.Module): The model now.
        new (OptimWrapper): Its optimizer, without state; changed in place.
    """
    before = dict(old_model.named_parameters())
    state = old.optimizer.state
    for name, parameter in new_model.named_parameters():
        same = before.get(name)
        if (same is not None and same.shape == parameter.shape
                and state.get(same)):
            new.optimizer.state[parameter] = state[same]
    modules = dict(old_model.named_modules())
    for name, layer in new_model.named_modules():
        if isinstance(layer, BasisLayer):
            was = modules[name]
            if not isinstance(was, BasisLayer) or was.rank != layer.rank:
                new.optimizer.state.update(_mapped(was, layer, state))
    # how far the schedule has taken the learning rates of all groups
    first = old.optimizer.param_groups[0]
    ratio = first['lr'] / first.get('initial_lr', first['lr'])
    for group in new.optimizer.param_groups:
        group['lr'] = group.get('initial_lr', group['lr']) * ratio
    if hasattr(old, 'loss_scaler'):
        new.loss_scaler.load_state_dict(old.loss_scaler.state_dict())


def _mapped(old: nn.Module, new: BasisLayer,
            state: dict) -> Dict[nn.Parameter, Dict]:
    """State of a layer's new factors."""
    if isinstance(old, BasisLayer):
        sources = (old.basis.weight, old.coefficients.weight)
    else:
        sources = (old.weight, old.weight)
    if not all(state.get(source) for source in sources):
        return {}
    targets = (new.basis.weight, new.coefficients.weight)
    entries: Tuple[Dict, Dict] = ({}, {})
    for key, value in state[sources[0]].items():
        values = [state[source][key] for source in sources]
        if not isinstance(value, Tensor) or value.shape != sources[0].shape:
            for entry, one in zip(entries, values):
                entry[key] = one
        elif key in _GRADIENTS:
            product = _product_gradient(old, *values)
            basis, coefficients = (f.double() for f in new.factors)
            found = (new.kind.from_matrix(coefficients.mT @ product,
                                          new.basis), product @ basis.mT)
            for entry, one, target in zip(entries, found, targets):
                entry[key] = one.reshape(target.shape).to(target)
        else:
            for entry, one, target in zip(entries, values, targets):
                entry[key] = torch.full_like(target, float(one.mean()))
    return dict(zip(targets, entries))


def _product_gradient(old: nn.Module, basis: Tensor,
                      coefficients: Tensor) -> Tensor:
    """The gradient ``M`` of the product ``H = w F`` that belongs to those of
    the factors, ``w^T M`` and ``M F^T``, of least norm; shape ``(G, P / G,
    D)``."""
    if not isinstance(old, BasisLayer):
        return _as_matrix(old, basis, kind_of(old)).double()
    found, w = (factor.double() for factor in old.factors)
    gradient = _as_matrix(old.basis, basis, old.kind).double()
    inside = coefficients.double().reshape(w.shape) @ torch.linalg.pinv(
        found.mT)
    rest = torch.linalg.pinv(w.mT) @ gradient
    return inside + rest - rest @ torch.linalg.pinv(found) @ found


def _as_matrix(module: nn.Module, tensor: Tensor,
               kind: Any) -> Tensor:
    """A tensor of the shape of a layer's weights as a matrix."""
    return kind.to_matrix(
        SimpleNamespace(weight=tensor, groups=getattr(module, 'groups', 1)))
