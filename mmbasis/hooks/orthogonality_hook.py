# Copyright (c) mmbasis authors. All rights reserved.
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..compression import basis_layers
from ..registry import HOOKS


@HOOKS.register_module()
class OrthogonalityHook(Hook):
    """Make the basis filters orthonormal again while they are trained.

    The retraction does not change what the model computes: what it takes
    from the basis it gives to the coefficients. It is the hard form of the
    penalty ``BasisModel(orthogonality=dict(weight=…))``.

    Args:
        interval (int): Iterations or epochs between two retractions.
            Defaults to 1.
        by_epoch (bool): Whether the interval counts epochs. Defaults to True.

    Raises:
        ValueError: If the interval is not positive.
    """

    # after the optimizer's step, before EMA averages and checkpoints are saved
    priority = 'HIGH'

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
            self._retract(runner)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self._retract(runner)

    @staticmethod
    def _retract(runner: Runner) -> None:
        for _, layer in basis_layers(runner.model):
            layer.retract()
