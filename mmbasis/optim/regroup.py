# Copyright (c) mmbasis authors. All rights reserved.
"""The groups of an optimizer whose model gets other layers."""
import copy
from typing import Any, Dict, Iterable, List, Mapping, Optional

import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper

from ..layers import BasisLayer

#: parameters of a basis layer, and those of the dense layer they stand for
_PARTS = {
    'basis.weight': 'weight',
    'coefficients.weight': 'weight',
    'coefficients.bias': 'bias',
    'norm.weight': 'weight',
    'norm.bias': 'weight'
}


def dense_names(model: nn.Module) -> Dict[str, str]:
    """The name that each parameter of a basis layer has in the dense model:
    ``conv.weight`` for ``conv.basis.weight`` and so on."""
    return {
        f'{name}.{part}': f'{name}.{_PARTS[part]}'
        for name, layer in model.named_modules()
        if isinstance(layer, BasisLayer)
        for part, _ in layer.named_parameters() if part in _PARTS
    }


def keep_custom_keys(optim_wrapper: Mapping[str, Any],
                     model: nn.Module) -> Dict[str, Any]:
    """Have ``custom_keys`` that name parameters of dense layers speak of the
    factors in their place.

    Args:
        optim_wrapper (Mapping): Config of an optimizer wrapper.
        model (nn.Module): The compressed model.

    Returns:
        dict: A copy of the config, with further keys where they are needed.
    """
    config = copy.deepcopy(dict(optim_wrapper))
    paramwise = config.get('paramwise_cfg') or {}
    keys = paramwise.get('custom_keys')
    if not keys:
        return config
    # MMEngine's order: the longest key that a name contains decides
    order = sorted(sorted(keys), key=len, reverse=True)
    added = {}
    for name, dense in dense_names(model).items():
        meant = next((k for k in order if k in dense), None)
        found = next((k for k in order if k in name), None)
        if meant and meant not in name and len(found or '') < len(meant):
            added[name] = copy.deepcopy(keys[meant])
    if added:
        MMLogger.get_current_instance().info(
            'paramwise_cfg.custom_keys name dense layers that are compressed '
            'now: their factors get the same settings (%d parameters)',
            len(added))
        paramwise['custom_keys'] = {**keys, **added}
    return config


def regroup(wrapper: OptimWrapper, before: Mapping[str, nn.Parameter],
            model: nn.Module) -> None:
    """Put the parameters of a model in the place of those that it had before:
    factors go into the group of the weights that they stand for. States of
    parameters that are gone are dropped.

    Args:
        wrapper (OptimWrapper): Its optimizer, changed in place.
        before (Mapping[str, nn.Parameter]): The parameters that it had.
        model (nn.Module): The model now.
    """
    after = dict(model.named_parameters())
    dense = dense_names(model)
    new: Dict[nn.Parameter, List[nn.Parameter]] = {}
    for name, parameter in after.items():
        origin = _origin(name, dense.get(name), before)
        if origin is not None and parameter.requires_grad:
            new.setdefault(origin, []).append(parameter)
    kept = set(after.values())
    for group in wrapper.optimizer.param_groups:
        group['params'] = [
            x for old in group['params'] for x in new.get(old, ())
        ]
    for parameter in list(wrapper.optimizer.state):
        if parameter not in kept:
            del wrapper.optimizer.state[parameter]


def _origin(
        name: str, dense: Optional[str],
        before: Mapping[str, nn.Parameter]) -> Optional[nn.Parameter]:
    """The earlier parameter whose group a parameter goes into."""
    names: Iterable[str] = [name]
    if dense is not None:
        layer = dense.rpartition('.')[0]
        names = [name, dense, f'{layer}.weight', f'{layer}.basis.weight']
    elif name.rpartition('.')[2] in ('weight', 'bias'):
        layer, _, part = name.rpartition('.')
        names = [
            name, f'{layer}.coefficients.{part}', f'{layer}.basis.weight'
        ]
    return next((before[x] for x in names if x in before), None)
