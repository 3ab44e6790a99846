# Copyright (c) mmbasis authors. All rights reserved.
"""Putting a plan into a model, and keeping wrong checkpoints out of it."""
from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from math import prod
from typing import Any, Iterator, Mapping, Tuple

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import BaseAveragedModel
from torch.nn.parameter import is_lazy

from ..layers import BasisLayer, copy_module, kind_of, why_not
from ..planning import (
    CompressionPlan,
    DensePlan,
    LayerPlan,
    find_layers,
)
from ..running import kept_random
from .merging import keep_structure

#: where a model keeps its plan: None for a dense one whose loading is guarded
_PLAN = '_mmbasis'
#: of a basis layer, each in some forms only
_PARTS = ('input_basis', 'coefficients')

#: where the basis of a layer comes from: see :meth:`BasisLayer.project`
Bases = Mapping[str, Tuple[Any, ...]]


def basis_layers(model: nn.Module) -> Iterator[tuple[str, BasisLayer]]:
    """The basis layers of a model with their names."""
    return ((name, module) for name, module in model.named_modules()
            if isinstance(module, BasisLayer))


def replace_modules(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Replace modules, given by the old ones, wherever they hang. What is
    attached to a dense layer goes to its basis layer, and back; moving
    averages inside the model follow. If that fails, the model is as before.
    """
    with all_or_nothing(model):
        for old, module in new.items():
            if isinstance(module, BasisLayer):
                module.take_over(old)
            elif isinstance(old, BasisLayer):
                old.hand_back(module)
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child in new:
                    parent._modules[name] = new[child]
        for average in _averages(model):
            average.avg_parameters = (
                average.module.state_dict() if average.update_buffers else
                dict(average.module.named_parameters()))


@contextmanager
def all_or_nothing(model: nn.Module, values: bool = False) -> Iterator[None]:
    """Leave the modules of a model as they were if an error is raised; with
    ``values`` also what stands in parameters and buffers, of which a copy is
    kept."""
    before = [(table, dict(table)) for module in model.modules()
              for table in (vars(module), *vars(module).values())
              if isinstance(table, dict)]
    grads = [(x, x.requires_grad, x.grad) for x in model.parameters()]
    tensors = [*model.parameters(), *model.buffers()] if values else []
    kept = [(x, x.detach().clone()) for x in tensors if not is_lazy(x)]
    try:
        yield
    except BaseException:
        for table, content in before:
            table.clear()
            table.update(content)
        for parameter, requires_grad, grad in grads:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
        raise


def _averages(model: nn.Module) -> list[BaseAveragedModel]:
    return [x for x in model.modules() if isinstance(x, BaseAveragedModel)]


def _followers(model: nn.Module) -> Mapping[nn.Module, list[nn.Module]]:
    """The layers of moving averages (momentum encoders) by the layer that they
    are the average of: projected on one subspace, factors can be averaged."""
    found = defaultdict(list)
    for average in _averages(model):
        inside = set(average.modules())
        # the first of several alike
        sources = {_shapes(x): x for x in reversed([*model.modules()])
                   if x not in inside}
        sources.pop(frozenset(), None)  # without parameters
        # the averaged module as a whole may exist nowhere else
        parts = [average.module]
        while parts:
            part = parts.pop()
            source = sources.get(_shapes(part))
            if source is None:
                parts += part.children()
            else:
                for name, layer in source.named_modules():
                    found[layer].append(part.get_submodule(name))
    return found


def _shapes(model: nn.Module) -> frozenset:
    return frozenset((name, x.shape) for name, x in model.named_parameters())


def _check_plan(model: nn.Module, plan: CompressionPlan) -> None:
    modules = dict(model.named_modules())
    entries: dict[str, Any] = {**plan.layers, **plan.dense}
    problems = {name: _problem(modules.get(name), entry)
                for name, entry in entries.items()}
    if plan.dense:  # it speaks of all layers, unless it is written by hand
        problems.update({x.name: 'not in the plan' for x in find_layers(model)
                         if x.name not in problems})
    wrong = [f'{name}: {why}' for name, why in problems.items() if why]
    if wrong:
        raise ValueError(
            f'the plan is of another model: {len(wrong)} layers do not fit '
            f'({"; ".join(wrong[:3])})')


def _problem(module: nn.Module | None,
             entry: LayerPlan | DensePlan) -> str | None:
    """Why an entry of a plan is not of a module, None if it is."""
    if module is None:
        return 'no such layer'
    if isinstance(module, BasisLayer):
        return 'compressed already'
    if isinstance(entry, DensePlan) and not entry.bias:
        return None  # fine-tuned for other classes, say
    kind, weight = kind_of(module), getattr(module, 'weight', None)
    if isinstance(entry, LayerPlan) and (
            kind is None or kind.name != entry.kind):
        return f'a {type(module).__name__} is no {entry.kind}'
    if weight is None or entry.bias and kind is None:
        return f'a {type(module).__name__} is no such layer'
    if not is_lazy(weight) and list(weight.shape) != list(entry.shape):
        return f'weights of shape {list(weight.shape)}, not {entry.shape}'
    return why_not(module) if isinstance(entry, LayerPlan) else None


def apply_plan(model: nn.Module, plan: CompressionPlan,
               bases: Bases | None = None, project: bool = True) -> None:
    """Replace the layers of a dense model as a plan says.

    Args:
        model (nn.Module): The dense model, changed in place, or not at all
            if an error is raised.
        plan (CompressionPlan): The plan.
        bases (Mapping[str, tuple[Tensor | None, Tensor | None]], optional):
            For layers by name: ``vectors`` of shape ``(G, P / G, R)`` that
            span the subspace of its outputs, and the ``mean`` output, shape
            ``(G, P / G)``, see :meth:`BasisLayer.project`. Others are
            compressed by their weights alone.
        project (bool): False leaves the factors zero, for weights that are
            loaded afterwards. Defaults to True.

    Raises:
        ValueError: If the plan is of another model.
    """
    _check_plan(model, plan)
    new = _build_layers(model, plan, bases or {}, project)
    with all_or_nothing(model):
        replace_modules(model, new)
        _add_biases(model, plan)
        kept = attach_plan(model, plan)
    if project and kept:
        MMLogger.get_current_instance().info(
            '%d blocks (%s, …) that can be merged for deployment hold basis '
            'layers and will not be merged: compressing the deployed form of '
            'the model (deploy=True, or switch_to_deploy() before) is better',
            len(kept), kept[0])


def _build_layers(model: nn.Module, plan: CompressionPlan, bases: Bases,
                  project: bool) -> dict[nn.Module, nn.Module]:
    """The basis layers of a plan by the dense ones, moving averages' too."""
    followers = _followers(model)
    new: dict[nn.Module, nn.Module] = {}
    with kept_random():  # new layers draw numbers that nobody keeps
        for name, entry in plan.layers.items():
            module = model.get_submodule(name)
            for dense in (module, *followers.get(module, ())):
                layer = BasisLayer(dense, entry.rank, entry.bias, plan.norm,
                                   entry.input_rank, entry.spatial)
                if project:
                    layer.project(dense, *bases.get(name, ()))
                new[dense] = layer
    return new


def _add_biases(model: nn.Module, plan: CompressionPlan) -> None:
    """Give merged layers the bias of the basis layer that they were."""
    for name, entry in plan.dense.items():
        # offset branches of basis layers are elsewhere now
        layer = model.get_submodule(name) if entry.bias else None
        if layer is not None and layer.bias is None:
            kind = kind_of(layer)
            assert kind is not None  # see _problem
            channels = prod(kind.matrix_shape(layer)[:2])
            layer.bias = nn.Parameter(layer.weight.new_zeros(channels))


def densified(model: nn.Module) -> nn.Module:
    """A copy of a compressed model with dense layers of the same function, and
    without a plan."""
    model = copy_module(model)
    _make_dense(model)
    return model


def _make_dense(model: nn.Module) -> None:
    replace_modules(model, {x: x.to_dense() for _, x in basis_layers(model)})
    if _PLAN in vars(model):
        vars(model)[_PLAN] = None


def restructure(model: nn.Module, plan: CompressionPlan) -> None:
    """Give a model the structure of a plan, whichever it has now, for weights
    that are loaded afterwards; see :func:`apply_plan`."""
    with all_or_nothing(model):
        _make_dense(model)
        apply_plan(model, plan, project=False)


def get_plan(model: nn.Module) -> CompressionPlan | None:
    """The plan that a compressed model carries, None for a dense one."""
    return getattr(model, _PLAN, None)


def attach_plan(model: nn.Module, plan: CompressionPlan) -> list[str]:
    """Have a compressed model carry its plan, :func:`guard` it, and return
    what :func:`keep_structure` returns."""
    guard(model)
    vars(model)[_PLAN] = plan
    return keep_structure(model)


def guard(model: nn.Module) -> None:
    """Have every loading of weights checked by :func:`check_state_dict`."""
    if _PLAN not in vars(model):
        vars(model)[_PLAN] = None
        model._register_load_state_dict_pre_hook(
            check_state_dict, with_module=True)


def check_state_dict(model: nn.Module, state_dict: dict, prefix: str = '',
                     *_) -> None:
    """Refuse weights of another structure than the model's, which MMEngine,
    loading without strictness, would leave as it was.

    Raises:
        RuntimeError: If a layer is dense here and compressed there, or the
            reverse, or of another rank or form.
    """
    # a shared layer has a key for each of its names
    modules = dict(model.named_modules(remove_duplicate=False))
    expected = {
        name: _structure(module.basis.weight, module._modules)
        for name, module in modules.items() if isinstance(module, BasisLayer)}
    found = _structures(modules, state_dict, prefix)
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
    other = 'these weights are of another compression plan: '
    names = sorted(found.keys() ^ expected.keys())
    if names:
        raise RuntimeError(
            f'{other}layers {names[:3]} ({len(names)} in all) are compressed '
            'in only one of weights and model')
    for name, words in expected.items():
        if found[name] != words:
            raise RuntimeError(f'{other}{name} has {found[name]}, that of the '
                               f'model {words}')


def _structure(basis: torch.Tensor, parts: Mapping[str, Any]) -> str:
    """What tells the structure of a basis layer, in words."""
    others = ' and '.join(x for x in _PARTS if parts.get(x) is not None)
    return f'basis filters of shape {list(basis.shape)}, {others}'


def _structures(modules: dict[str, nn.Module], state_dict: dict,
                prefix: str) -> dict[str, str]:
    """Structures of the basis layers in weights; not of modules of the model
    that have parts of the same names themselves."""
    found = {}
    for key, value in state_dict.items():
        name, basis, rest = key[len(prefix):].rpartition('.basis.weight')
        parts = {part: state_dict.get(f'{prefix}{name}.{part}.weight')
                 for part in _PARTS}
        if (basis and not rest and key.startswith(prefix)
                and torch.is_tensor(value)
                and (isinstance(modules.get(name), BasisLayer)
                     or any(x is not None for x in parts.values())
                     and f'{name}.basis' not in modules)):
            found[name] = _structure(value, parts)
    return found
