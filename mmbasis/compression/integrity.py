# Copyright (c) mmbasis authors. All rights reserved.
"""Whether weights are all there, of the right shape, and numbers."""
from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, Iterable, Mapping

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import get_state_dict, load_state_dict
from torch.nn.parameter import is_lazy

from ..utils.schema import shown
from .surgery import basis_layers, check_state_dict

#: buffers that a model cannot do without
_STATISTICS = ('running_mean', 'running_var')


def essential(model: nn.Module) -> set[str]:
    """What a model must have to be the one that was trained, as keys of its
    state dict: its parameters, and the statistics of its normalisations.
    Other buffers it can make itself."""
    buffers = {k for k, _ in model.named_buffers(remove_duplicate=False)}
    return {k for k in model.state_dict()
            if k not in buffers or k.rpartition('.')[2] in _STATISTICS}


def not_finite(weights: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of some keys whose tensors are NaN or infinite somewhere."""
    return [
        key for key in keys if torch.is_tensor(weights.get(key))
        and not is_lazy(weights[key])
        and not bool(torch.isfinite(weights[key]).all())]


def weights_of(checkpoint: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The weights in a checkpoint; a ValueError if it holds none. As MMEngine
    does, it forgets the distributed wrapper in their names."""
    weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, dict) or not all(
            isinstance(key, str) for key in weights) or not any(
                map(torch.is_tensor, weights.values())):
        raise ValueError(
            f'{owner} has no weights: state_dict must be a dict of tensors by '
            f'name, but got {shown(weights)}')
    if not any(key.startswith('module.') for key in weights):
        return weights
    found = OrderedDict(
        (k[len('module.'):] if k.startswith('module.') else k, x)
        for k, x in weights.items())
    vars(found)['_metadata'] = getattr(weights, '_metadata', OrderedDict())
    return found


def check_weights(model: nn.Module, weights: dict[str, Any], owner: str,
                  complete: bool = True, other_outputs: bool = False) -> None:
    """Refuse weights that are not those of a model.

    Args:
        model (nn.Module): Of the structure that the weights should have; it
            takes them, if they are to be complete.
        weights (dict[str, Tensor]): By name, see :func:`weights_of`.
        owner (str): Where they come from, for messages.
        complete (bool): Whether all must be there, as for a test; a dense
            model may be trained from some of them. Defaults to True.
        other_outputs (bool): Whether layers that are dense may have another
            number of outputs, as when a model is trained for other classes.
            Defaults to False.

    Raises:
        RuntimeError: If they are of another structure, incomplete, or of
            other shapes.
        ValueError: If some are NaN or infinite.
    """
    check_state_dict(model, weights)
    keys = essential(model)
    broken = not_finite(weights, sorted(keys))
    if broken:
        raise ValueError(f'{owner}: NaN or infinite in {_names(broken)}')
    if not complete:
        return
    missing = _missing(model, weights, owner, keys, other_outputs)
    if missing:
        raise RuntimeError(f'{owner} does not fit the model: it lacks '
                           f'{_names(missing)}')


def _missing(model: nn.Module, weights: dict[str, Any], owner: str,
             keys: set[str], other_outputs: bool) -> list[str]:
    """Those of some keys that a model does not find, as it loads weights."""
    if other_outputs:
        replaced = _other_outputs(model, weights)
        keys = keys - replaced
        weights = copy.copy(weights)  # with what it knows of versions
        for key in replaced & set(weights):
            del weights[key]
    try:
        # models rename what older versions wrote, as they load it
        found = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise RuntimeError(
            f'{owner} does not fit the model: {error}') from None
    return [x for x in found.missing_keys if x in keys]


def _other_outputs(model: nn.Module, weights: Mapping[str, Any]) -> set[str]:
    """Keys of the dense layers whose weights have another number of outputs
    than those of the model."""
    within = tuple(f'{name}.' for name, _ in basis_layers(model))
    layers = []
    for key, own in model.state_dict().items():
        layer, _, name = key.rpartition('.')
        given: Any = weights.get(key)
        if (name == 'weight' and not f'{layer}.'.startswith(within)
                and torch.is_tensor(given) and not is_lazy(own)
                and own.dim() == given.dim() > 1
                and own.shape[1:] == given.shape[1:]
                and own.shape != given.shape):
            layers.append(f'{layer}.')
    return {x for x in model.state_dict() if x.startswith(tuple(layers))}


def _names(keys: list[str]) -> str:
    return f'{", ".join(keys[:3])} ({len(keys)} in all)'


def load_weights(model: nn.Module, checkpoint: dict[str, Any],
                 path: str) -> None:
    """Load all weights of a model, or none.

    Args:
        model (nn.Module): Of the structure that the weights have.
        checkpoint (dict): What :func:`read_checkpoint` returned.
        path (str): Where it came from, for messages.

    Raises:
        RuntimeError: If weights of the model are missing in the checkpoint or
            have another shape.
        ValueError: If there are none, or some are NaN or infinite.
    """
    weights = weights_of(checkpoint, path)
    check_state_dict(model, weights)
    own = get_state_dict(model)
    shapes = {k: tuple(x.shape) if torch.is_tensor(x) else type(x).__name__
              for k, x in weights.items()}
    wrong = [f'{key}: missing' if key not in shapes else
             f'{key}: {shapes[key]}, not {tuple(x.shape)}'
             for key, x in own.items() if 'num_batches_tracked' not in key
             and torch.is_tensor(x) and shapes.get(key) != tuple(x.shape)]
    if wrong:
        raise RuntimeError(f'{path} does not fit the model: '
                           f'{"; ".join(wrong[:3])} ({len(wrong)} of '
                           f'{len(own)} weights)')
    broken = not_finite(weights, sorted(essential(model)))
    if broken:
        raise ValueError(f'{path}: NaN or infinite in {_names(broken)}')
    logger = MMLogger.get_current_instance()
    load_state_dict(model, weights, strict=False, logger=logger)
