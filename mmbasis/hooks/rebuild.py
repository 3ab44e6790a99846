# Copyright (c) mmbasis authors. All rights reserved.
"""What a runner holds besides the model."""
import copy
from typing import Any, List, Optional

import torch.nn as nn
from mmengine.hooks import EMAHook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from ..optim import carry_over, keep_custom_keys, regroup


class Managed:
    """The parameters that a runner manages. Make it before layers are
    replaced; afterwards :meth:`rebuild` gives the runner the new ones."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.before = dict(bare_model(runner).named_parameters())

    def set_model(self, model: nn.Module) -> None:
        """Give the runner a model, wrapped as its config says."""
        runner = self.runner
        if isinstance(runner.model, BaseTTAModel):
            return  # the model inside was changed in place
        runner.model = runner.wrap_model(
            copy.deepcopy(runner.cfg.get('model_wrapper_cfg')), model)

    def rebuild(self,
                model: nn.Module,
                carry_over_from: Optional[nn.Module] = None) -> None:
        """Have distributed wrapper, EMA, optimizer and schedulers hold the
        parameters of the changed model. The optimizer is built from the
        config again; without one, they take the places of the old ones.

        Args:
            model (nn.Module): The changed model.
            carry_over_from (nn.Module, optional): The model before, whose
                optimizer's state and schedules go on.
        """
        runner = self.runner
        self.set_model(model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.before_run(runner)
        old = runner.optim_wrapper
        if not isinstance(old, OptimWrapper):
            return  # testing
        schedulers = runner.param_schedulers
        states = [_state(x) for x in _wrappers(old)]
        if runner.cfg.get('optim_wrapper') is None:
            for wrapper in _wrappers(old):
                regroup(wrapper, self.before, model)
        else:
            self._build(model)
        if carry_over_from is not None:
            for state, new in zip(states, _wrappers(runner.optim_wrapper)):
                carry_over(carry_over_from, state, model, new)
            _go_on(schedulers, runner.param_schedulers)
        runner.optim_wrapper.initialize_count_status(
            runner.model, runner.iter, runner.train_loop.max_iters)

    def _build(self, model: nn.Module) -> None:
        """Optimizer and schedulers from the config."""
        runner = self.runner
        runner.optim_wrapper = runner.build_optim_wrapper(
            keep_custom_keys(runner.cfg.optim_wrapper, model))
        # the runner refuses to scale under schedulers, which are stale anyway
        runner.param_schedulers = None
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if runner.cfg.get('param_scheduler') is not None:
            runner.param_schedulers = runner.build_param_scheduler(
                copy.deepcopy(runner.cfg.param_scheduler))
        runner.logger.info('Optimizer and parameter schedulers are built '
                           'again for the compressed model')


def _wrappers(wrapper: OptimWrapper) -> List[OptimWrapper]:
    if isinstance(wrapper, OptimWrapperDict):
        return list(wrapper.values())
    return [wrapper]


def _state(wrapper: OptimWrapper) -> OptimWrapper:
    """A wrapper as it is now, whatever becomes of its optimizer's state."""
    state, optimizer = copy.copy(wrapper), copy.copy(wrapper.optimizer)
    optimizer.state = dict(optimizer.state)
    state.optimizer = optimizer
    return state


def _go_on(old: Any, new: Any) -> None:
    """Set schedulers to where others stand."""
    if isinstance(old, dict):
        for key, schedulers in old.items():
            _go_on(schedulers, new[key])
    else:
        for one, other in zip(old or [], new or []):
            if one is not other:
                other.load_state_dict(one.state_dict())


def bare_model(runner: Runner) -> Any:
    """The model without distributed wrapper and test-time augmentation."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
