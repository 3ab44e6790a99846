# Copyright (c) mmbasis authors. All rights reserved.
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..compression import basis_layers
from ..registry import HOOKS


class PeriodicHook(Hook):
    """Do something with the basis layers at regular times in training.

    Args:
        interval (int): Iterations or epochs from one time to the next.
            Defaults to 1.
        by_epoch (bool): Whether the interval counts epochs. Defaults to True.

    Raises:
        ValueError: If the interval is not positive.
    """

    def __init__(self, interval: int = 1, by_epoch: bool = True) -> None:
        if interval < 1:
            raise ValueError(f'interval must be positive, but got {interval}')
        self.interval = interval
        self.by_epoch = by_epoch

    def after_train_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None,
                         outputs: Optional[dict] = None) -> None:
        if not self.by_epoch and self.every_n_train_iters(
                runner, self.interval):
            self.act(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self.act(runner, runner.epoch + 1)

    def act(self, runner: Runner, step: int) -> None:
        """What is done after a number of iterations or epochs."""
        raise NotImplementedError


@HOOKS.register_module()
class OrthogonalityHook(PeriodicHook):
    """Make the basis filters orthonormal again while they are trained.

    The retraction does not change what the model computes: what it takes
    from the basis it gives to the coefficients. It is the hard form of the
    penalty ``BasisModel(orthogonality=dict(weight=…))``. For arguments see
    :class:`PeriodicHook`.
    """

    # after the optimizer's step, before EMA averages and checkpoints are saved
    priority = 'HIGH'

    def act(self, runner: Runner, step: int) -> None:
        for _, layer in basis_layers(runner.model):
            layer.retract()
