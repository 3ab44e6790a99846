# Copyright (c) mmbasis authors. All rights reserved.
from functools import partial
from typing import Any, Sequence

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from ..compression import recalibrate_if_better, take_batches
from ..datasets import calibration_dataloader
from ..models import unwrap
from ..optim import bare_model
from ..registry import HOOKS
from ..running import adapter_of, evaluation, train_deterministically


@HOOKS.register_module()
class RecalibrationHook(Hook):
    """Compute the statistics of batch normalisations again at the end of
    training, and keep them if the loss falls by it.

    Running averages lag behind weights that move, and come from augmented
    images. The new ones come from training images with the transforms of
    testing, as does the loss. EMA's average of the model gets its own.

    Args:
        num_batches (int): Training batches for the statistics, at least 1.
            Defaults to 32.
        held_out (int): Training batches for the choice, at least 1. Defaults
            to 8. Less raises a ValueError.
    """

    # after the optimizer's step and EMA's, before checkpoints are saved
    priority = 'LOW'

    def __init__(self, num_batches: int = 32, held_out: int = 8) -> None:
        if num_batches < 1 or held_out < 1:
            raise ValueError('num_batches and held_out must be positive, but '
                             f'got {num_batches} and {held_out}')
        self.num_batches = num_batches
        self.held_out = held_out

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Recalibrate after the last iteration."""
        if not self.is_last_train_iter(runner):
            return
        loader = calibration_dataloader(runner, runner.seed)
        batches, held_out = take_batches(loader, self.num_batches,
                                         self.held_out)
        if not held_out:
            runner.logger.warning(
                'No recalibration: %d batches of training images leave none '
                'to choose by', len(batches))
            return
        averages = [
            hook.ema_model.module for hook in runner.hooks
            if isinstance(hook, EMAHook)
        ]
        for model in map(unwrap, [bare_model(runner), *averages]):
            recalibrate_if_better(model, batches,
                                  partial(mean_loss, model, held_out))


def mean_loss(model: torch.nn.Module, batches: Sequence[Any]) -> float:
    """The training loss of a model, with normalisations as in evaluation mode
    and without dropout; mean over batches and processes."""
    adapter = adapter_of(model)
    with evaluation(model):
        train_deterministically(model)
        torch.manual_seed(0)  # two-stage detectors draw among proposals
        losses = [adapter.loss(data) for data in batches]
    total = torch.stack(losses).mean()
    all_reduce(total, 'mean')
    return float(total)
