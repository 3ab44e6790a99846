# Copyright (c) mmbasis authors. All rights reserved.
"""What a runner holds besides the layers of its model, when these change."""
import copy
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Mapping, Optional

import torch
import torch.nn as nn
from mmengine.hooks import EMAHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from .factorization import merge, widen
from .layers import BasisLayer, as_square
from .registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Automatic mixed precision on CPUs, in bfloat16, which halves the time
    of a step where they have the instructions. MMEngine's ``AmpOptimWrapper``
    refuses CPUs. bfloat16 has the range of float32, so no loss is scaled. The
    same config on a GPU computes in bfloat16 there."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(
                device, dtype=torch.bfloat16):
            yield


def bare_model(runner: Runner) -> Any:
    """The model without distributed wrapper and test-time augmentation."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model


def strategy_of(runner: Any) -> Any:
    """What MMEngine's ``FlexibleRunner`` leaves its model, optimizer and
    schedulers to; None of a ``Runner``."""
    return getattr(runner, 'strategy', None)


def set_model(runner: Runner, model: nn.Module) -> None:
    """Give the runner a model, wrapped as its config says."""
    strategy = strategy_of(runner)
    if isinstance(runner.model, BaseTTAModel):
        return  # changed in place
    if strategy is not None:
        runner.model = strategy.model = strategy._wrap_model(model)
    else:
        runner.model = runner.wrap_model(
            copy.deepcopy(runner.cfg.get('model_wrapper_cfg')), model)


@contextmanager
def replaced_parameters(runner: Runner,
                        before: Optional[nn.Module] = None) -> Iterator[None]:
    """Replace parameters of the model meanwhile; afterwards the distributed
    wrapper, EMA, optimizer and schedulers hold the new ones. The optimizer is
    built from the config again; without one, they take the places of the old.
    Given the model before, which must stay as it is, the optimizer's state and
    the schedules go on; otherwise they begin again."""
    model = bare_model(runner)
    named = dict(model.named_parameters())
    dense = {old: named[new] for new, old in _dense_names(model).items()}
    yield
    set_model(runner, model)
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            hook.before_run(runner)
    if not isinstance(runner.optim_wrapper, OptimWrapper):
        return  # testing
    wrappers = _parts(runner.optim_wrapper)
    schedulers = _parts(runner.param_schedulers or [])
    if runner.cfg.get('optim_wrapper') is None:
        for wrapper in wrappers:
            _regroup(wrapper.optimizer, {**dense, **named}, model)
    else:
        _build_again(runner, model)
    if before is not None:
        for old, new in zip(wrappers, _parts(runner.optim_wrapper)):
            carry_over(before, old, model, new)
        for old, new in zip(schedulers, _parts(runner.param_schedulers or [])):
            new.load_state_dict(old.state_dict())
    runner.optim_wrapper.initialize_count_status(
        runner.model, runner.iter, runner.train_loop.max_iters)


def _parts(whole: Any) -> List[Any]:
    """Wrappers or schedulers, of one optimizer or of several, as a list."""
    if isinstance(whole, (dict, OptimWrapperDict)):
        return [part for one in whole.values() for part in _parts(one)]
    return whole if isinstance(whole, list) else [whole]


def _build_again(runner: Runner, model: nn.Module) -> None:
    """Optimizer and schedulers from the config."""
    config = _with_custom_keys(runner.cfg.optim_wrapper, model)
    schedule = copy.deepcopy(runner.cfg.get('param_scheduler'))
    strategy = strategy_of(runner)
    # who scales refuses to under schedulers, which are stale anyway
    runner.param_schedulers = None
    if strategy is None:
        runner.optim_wrapper = runner.build_optim_wrapper(config)
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if schedule is not None:
            runner.param_schedulers = runner.build_param_scheduler(schedule)
        return
    vars(strategy).pop('param_schedulers', None)
    runner.optim_wrapper = strategy.optim_wrapper = (
        strategy.build_optim_wrapper(config, runner.model))
    strategy._scale_lr()
    if schedule is not None:
        runner.param_schedulers = strategy.param_schedulers = (
            strategy.build_param_scheduler(schedule, runner.optim_wrapper))


def _dense_names(model: nn.Module) -> Dict[str, str]:
    """The name that each parameter of a basis layer has in the dense model:
    ``conv.weight`` for ``conv.basis.weight`` and so on."""
    names = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BasisLayer):
            for parameter, _ in layer.named_parameters():
                part, _, own = parameter.partition('.')
                dense = 'weight' if part == 'norm' else own
                names[f'{name}.{parameter}'] = f'{name}.{dense}'
    return names


def _with_custom_keys(optim_wrapper: Mapping[str, Any],
                      model: nn.Module) -> Dict[str, Any]:
    """A copy of an optimizer's config, in which ``custom_keys`` that name
    parameters of dense layers speak of the factors in their place."""
    config = copy.deepcopy(dict(optim_wrapper))
    keys = (config.get('paramwise_cfg') or {}).get('custom_keys') or {}
    # MMEngine's order: the longest key that a name contains decides
    order = sorted(sorted(keys), key=len, reverse=True)
    for name, dense in _dense_names(model).items():
        meant = next((k for k in order if k in dense), '')
        found = next((k for k in order if k in name), '')
        if meant not in name and len(found) < len(meant):
            keys[name] = keys[meant]
    return config


def _regroup(optimizer: torch.optim.Optimizer,
             before: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Put the parameters of a model in the place of those before: factors go
    into the group of the weights that they stand for."""
    dense = _dense_names(model)
    new: Dict[nn.Parameter, List[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        old = dense.get(name, name)
        # compression gives biases to layers that had none
        weight = f'{old.rpartition(".")[0]}.weight'
        origins = [before[x] for x in (name, old, weight) if x in before]
        if origins and parameter.requires_grad:
            new[origins[0]].append(parameter)
    for group in optimizer.param_groups:
        group['params'] = [x for old in group['params'] for x in new[old]]


@torch.no_grad()
def carry_over(old_model: nn.Module, old: OptimWrapper, new_model: nn.Module,
               new: OptimWrapper) -> None:
    """Have the optimizer of a model go on where that of the same model with
    other ranks stands; it may be the same object. Parameters that are there in
    both keep their state. Averaged gradients of factors are turned into one of
    the product and from there into those of the new factors; entries of other
    kinds keep their mean."""
    state = dict(old.optimizer.state)
    new.optimizer.state.clear()
    before = dict(old_model.named_parameters())
    dense = _dense_names(new_model)
    for name, other in _dense_names(old_model).items():
        if name.endswith('bias'):  # it moves between parts with the form
            before.setdefault(other, before[name])
    for name, parameter in new_model.named_parameters():
        # biases and offset branches move when a layer gets a basis
        same = before.get(name, before.get(dense.get(name, ''), parameter))
        if same in state and same.shape == parameter.shape:
            new.optimizer.state[parameter] = state[same]
    modules = dict(old_model.named_modules())
    for name, layer in new_model.named_modules():
        if isinstance(layer, BasisLayer) and not _is_same(
                modules[name], layer):
            new.optimizer.state.update(_mapped(modules[name], layer, state))
    # how far the schedule has taken the learning rates of all groups
    first = old.optimizer.param_groups[0]
    ratio = first['lr'] / first.get('initial_lr', first['lr'])
    for group in new.optimizer.param_groups:
        group['lr'] = group.get('initial_lr', group['lr']) * ratio
    if hasattr(old, 'loss_scaler'):
        new.loss_scaler.load_state_dict(old.loss_scaler.state_dict())


def _is_same(old: nn.Module, new: BasisLayer) -> bool:
    """Whether the factors are those of before: of the same ranks, they may
    still be rotated."""
    return isinstance(old, BasisLayer) and len(old.parts) == len(
        new.parts) and all(map(torch.equal, old.weights, new.weights))


def _mapped(old: nn.Module, new: BasisLayer,
            state: Mapping[nn.Parameter, Dict]) -> Dict[nn.Parameter, Dict]:
    """State of a layer's new factors."""
    weights = new.weights
    sources = old.weights if isinstance(old, BasisLayer) else [old.weight]
    if not all(state.get(source) for source in sources):
        return {}
    # copies, as optimizers count steps in place
    found = {weight: copy.deepcopy(state[sources[0]]) for weight in weights}
    for key, value in state[sources[0]].items():
        if getattr(value, 'shape', None) != sources[0].shape:
            continue
        values = [state[source][key] for source in sources]
        if key in ('momentum_buffer', 'exp_avg'):  # averages of gradients
            values = _gradients(old, new, values)
        else:
            mean = torch.cat([x.flatten() for x in values]).mean()
            values = [mean.expand_as(weight) for weight in weights]
        for weight, x in zip(weights, values):
            found[weight][key] = x.reshape_as(weight).to(weight).clone()
    return found


def _gradients(old: nn.Module, new: BasisLayer,
               values: List[Tensor]) -> List[Tensor]:
    """Gradients of a layer's new factors, from those of the old factors or of
    the dense weights. Between them is the gradient ``M`` of the product
    ``H = w F``, of least norm among those with the old gradients ``w^T M`` and
    ``M F^T``; its shape is ``(G, P / G, D)``."""
    if isinstance(old, BasisLayer):
        product = _of_product(old, [x.double() for x in old.factors],
                              [x.double() for x in old.matrices(values)])
    else:
        dense = SimpleNamespace(weight=values[0], groups=new.groups)
        product = new.kind.to_matrix(dense).double()
    with torch.enable_grad():
        factors = [x.detach().double().requires_grad_() for x in new.factors]
        found = torch.autograd.grad(merge(*factors), factors, product)
    return [new.kind.from_matrix(x, part) if part is new.basis else x
            for part, x in zip(new.parts, found)]


def _of_product(layer: BasisLayer, factors: List[Tensor],
                gradients: List[Tensor]) -> Tensor:
    """The gradient of the product of a layer's factors; that of the input
    basis follows from it."""
    product, has_coefficients = gradients[-1], layer.rank is not None
    if layer.spatial:
        for pair in (factors, gradients):
            pair[-1] = as_square(pair[-1], factors[0].shape[1])
    if has_coefficients:
        (basis, w), (by_basis, by_w) = factors[-2:], gradients[-2:]
        inside = by_w @ basis.mT.pinverse()
        rest = w.mT.pinverse() @ by_basis
        product = inside + rest - rest @ basis.pinverse() @ basis
    if layer.spatial:
        blocks = product.unflatten(1, (-1, layer.weights[-1].shape[-1]))
        return blocks.transpose(2, 3).flatten(2)
    front = factors[:len(factors) - 1 - has_coefficients]
    return widen(product, front[0].mT.pinverse()) if front else product
