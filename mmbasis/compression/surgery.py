# Copyright (c) mmbasis authors. All rights reserved.
"""Putting a plan into a model, and keeping wrong checkpoints out of it."""
import copy
from collections import defaultdict
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import BaseAveragedModel
from mmengine.runner.checkpoint import get_state_dict, load_state_dict

from ..layers import BasisLayer, basis_layer_type
from ..planning import CompressionPlan, LayerInfo, find_layers

_BASIS_KEY = '.basis.weight'


def basis_layers(model: nn.Module) -> Iterator[Tuple[str, BasisLayer]]:
    """The basis layers of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, BasisLayer):
            yield name, module


def replace_modules(model: nn.Module, new: Dict[nn.Module, nn.Module]) -> None:
    """Replace modules wherever they hang, so that shared ones stay shared;
    moving averages inside the model get to know of it.

    Args:
        model (nn.Module): The model, changed in place.
        new (dict[nn.Module, nn.Module]): Replacement by old module.
    """
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                parent._modules[name] = new[child]
    for average in _averages(model):
        average.avg_parameters = (
            average.module.state_dict() if average.update_buffers else dict(
                average.module.named_parameters()))


def _averages(model: nn.Module) -> List[BaseAveragedModel]:
    return [x for x in model.modules() if isinstance(x, BaseAveragedModel)]


def _followers(model: nn.Module) -> Dict[nn.Module, List[nn.Module]]:
    """The layers of moving averages inside a model, as the momentum encoders
    of pretext tasks, by the layer that they are the average of."""
    found = defaultdict(list)
    for average in _averages(model):
        inside = set(average.modules())
        others = [(x, _shapes(x)) for x in model.modules() if x not in inside]
        for source, copied in _copies(average.module, others):
            for name, layer in source.named_modules():
                found[layer].append(copied.get_submodule(name))
    return found


def _copies(
    average: nn.Module, others: Sequence[Tuple[nn.Module, Dict]]
) -> Iterator[Tuple[nn.Module, nn.Module]]:
    """Which of other modules, given with their shapes, an average or its parts
    are copies of: MoCo's encoder is put together for the average only."""
    shapes = _shapes(average)
    source = next((x for x, other in others if shapes and other == shapes),
                  None)
    if source is not None:
        yield source, average
    else:
        for child in average.children():
            yield from _copies(child, others)


def _shapes(model: nn.Module) -> Dict[str, torch.Size]:
    return {name: x.shape for name, x in model.named_parameters()}


def _check_plan(model: nn.Module, plan: CompressionPlan) -> None:
    modules = dict(model.named_modules())
    wrong = []
    for name, entry in plan.layers.items():
        module = modules.get(name)
        if module is None:
            wrong.append(f'{name}: no such layer')
        elif isinstance(module, BasisLayer):
            wrong.append(f'{name}: compressed already')
        elif getattr(basis_layer_type(module), '__name__', None) != entry.kind:
            wrong.append(f'{name}: a {type(module).__name__} is no '
                         f'{entry.kind}')
        elif list(module.weight.shape) != list(entry.shape):
            wrong.append(f'{name}: weights of shape '
                         f'{list(module.weight.shape)}, not {entry.shape}')
    if plan.dense:  # it speaks of all layers, unless it is written by hand
        wrong += [
            f'{name}: no such layer' for name in plan.dense
            if name not in modules
        ]
        wrong += [
            f'{layer.name}: not in the plan' for layer in find_layers(model)
            if layer.name not in plan.layers and layer.name not in plan.dense
        ]
    if wrong:
        raise ValueError(
            f'the plan is of another model: {len(wrong)} layers do not fit '
            f'({"; ".join(wrong[:3])})')


def apply_plan(model: nn.Module,
               plan: CompressionPlan,
               layers: Optional[Sequence[LayerInfo]] = None,
               project: bool = True) -> None:
    """Replace the layers of a dense model as a plan says.

    Args:
        model (nn.Module): The dense model, changed in place, or not at all
            if the plan does not fit.
        plan (CompressionPlan): The plan.
        layers (Sequence[LayerInfo], optional): Where the basis of each layer
            comes from. Defaults to the weights alone.
        project (bool): False leaves the factors zero, for weights that are
            loaded afterwards. Defaults to True.

    Raises:
        ValueError: If the plan is of another model.
    """
    _check_plan(model, plan)
    modules = dict(model.named_modules())
    infos = {layer.name: layer for layer in layers or ()}
    followers = _followers(model)
    new = {}
    for name, entry in plan.layers.items():
        vectors = mean = None
        info = infos.get(name)
        if info is not None and info.spectrum is not None:
            vectors, mean = info.spectrum.vectors, info.mean
        # a moving average is projected on the subspace of what it follows, so
        # that the factors of both can be averaged
        for dense in (modules[name], *followers.get(modules[name], ())):
            # new layers draw random numbers that nobody keeps
            with torch.random.fork_rng():
                layer = basis_layer_type(dense)(dense, entry.rank, entry.bias,
                                                plan.norm)
            if project:
                layer.project(dense, vectors, mean)
            new[dense] = layer
    replace_modules(model, new)
    _add_biases(model, plan)
    attach_plan(model, plan)


def _add_biases(model: nn.Module, plan: CompressionPlan) -> None:
    """Give merged layers the bias of the basis layer that they were."""
    for name, entry in plan.dense.items():
        layer = model.get_submodule(name) if entry.bias else None
        if layer is not None and layer.bias is None:
            channels = entry.params - layer.weight.numel()
            layer.bias = nn.Parameter(layer.weight.new_zeros(channels))


def densified(model: nn.Module) -> nn.Module:
    """A copy of a compressed model with dense layers of the same function, and
    without a plan."""
    model = copy.deepcopy(model)
    replace_modules(model, {
        layer: layer.to_dense()
        for _, layer in basis_layers(model)
    })
    model.__dict__.pop('_mmbasis_plan', None)
    return model


def get_plan(model: nn.Module) -> Optional[CompressionPlan]:
    """The plan that a compressed model carries, None for a dense one."""
    return model.__dict__.get('_mmbasis_plan')


def attach_plan(model: nn.Module, plan: CompressionPlan) -> None:
    """Let a compressed model carry its plan and guard it against weights of
    another structure."""
    model.__dict__['_mmbasis_plan'] = plan
    guard(model)


def guard(model: nn.Module) -> None:
    """Have every loading of weights checked by :func:`check_state_dict`."""
    if not model.__dict__.get('_mmbasis_guarded'):
        model.__dict__['_mmbasis_guarded'] = True
        model._register_load_state_dict_pre_hook(
            check_state_dict, with_module=True)


def check_state_dict(model: nn.Module,
                     state_dict: dict,
                     prefix: str = '',
                     *_) -> None:
    """Refuse weights of another structure than the model's.

    MMEngine loads weights without strictness: a dense checkpoint in a
    compressed model would leave its basis layers as they were.

    Args:
        model (nn.Module): Dense or compressed.
        state_dict (dict): The weights about to be loaded.
        prefix (str): The model's prefix in the keys. Defaults to none.

    Raises:
        RuntimeError: If a layer is dense here and compressed there, or the
            reverse, or of another rank.
    """
    # a shared layer has a key for each of its names
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = {k for k, v in modules.items() if isinstance(v, BasisLayer)}
    found = {
        key[len(prefix):-len(_BASIS_KEY)]
        for key in state_dict
        if key.startswith(prefix) and key.endswith(_BASIS_KEY)
    }
    if expected and not found:
        raise RuntimeError(
            'these weights are dense, but the model is compressed '
            f'({len(expected)} basis layers): give a checkpoint that mmbasis '
            'wrote, or compress the dense one first (tools/compress.py)')
    if found and not expected:
        raise RuntimeError(
            f'these weights are compressed ({len(found)} basis layers), but '
            'the model is dense: use the config that was written beside them '
            '(compressed.py), or mmbasis.load_compressed()')
    if found != expected:
        names = sorted(found ^ expected)
        raise RuntimeError(
            'these weights are of another compression plan: layers '
            f'{names[:3]} ({len(names)} in all) are compressed in only one of '
            'weights and model')
    for name in sorted(expected):
        shape = state_dict[f'{prefix}{name}{_BASIS_KEY}'].shape
        if shape != modules[name].basis.weight.shape:
            raise RuntimeError(
                f'these weights are of another compression plan: {name} has '
                f'basis filters of shape {tuple(shape)}, the model '
                f'{tuple(modules[name].basis.weight.shape)}')


def load_weights(model: nn.Module, checkpoint: Dict[str, Any],
                 path: str) -> None:
    """Load all weights of a model, or none.

    Args:
        model (nn.Module): Of the structure that the weights have.
        checkpoint (dict): What :func:`read_checkpoint` returned.
        path (str): Where it came from, for messages.

    Raises:
        RuntimeError: If weights of the model are missing in the checkpoint or
            have another shape.
    """
    state_dict = checkpoint['state_dict']
    check_state_dict(model, state_dict)
    own = get_state_dict(model)
    wrong = [
        f'{key}: missing' if key not in state_dict else
        f'{key}: {tuple(state_dict[key].shape)}, not {tuple(value.shape)}'
        for key, value in own.items() if 'num_batches_tracked' not in key and (
            key not in state_dict or state_dict[key].shape != value.shape)
    ]
    if wrong:
        raise RuntimeError(f'{path} does not fit the model: '
                           f'{"; ".join(wrong[:3])} ({len(wrong)} of '
                           f'{len(own)} weights)')
    logger = MMLogger.get_current_instance()
    load_state_dict(model, state_dict, strict=False, logger=logger)
