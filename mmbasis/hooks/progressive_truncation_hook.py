# Copyright (c) mmbasis authors. All rights reserved.
from typing import Dict, Sequence

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..compression import as_planner
from ..registry import HOOKS
from .compression_hook import BasisCompressionHook


@HOOKS.register_module()
class ProgressiveTruncationHook(Hook):
    """Lower the ranks in stages while the model is fine-tuned: compress a
    little, tune, compress more.

    Before the named epochs the model is planned and truncated again, as
    :class:`BasisCompressionHook` does at the start of the run. The optimizer's
    state is carried over to the new factors and the schedules go on; EMA's
    average starts afresh. Resuming is exact.

    Examples:
        >>> custom_hooks = [
        >>>     dict(type='mmbasis.BasisCompressionHook',
        >>>          planner=dict(type='BudgetPlanner', macs=0.6)),
        >>>     dict(type='mmbasis.ProgressiveTruncationHook',
        >>>          stages=[
        >>>              dict(epoch=1,
        >>>                   planner=dict(type='BudgetPlanner', macs=0.45)),
        >>>              dict(epoch=2,
        >>>                   planner=dict(type='BudgetPlanner', macs=0.36))])
        >>> ]

    Args:
        stages (Sequence[dict]): ``epoch``, counted from 0, before which the
            stage is reached, and ``planner``, whose budget is that of the
            dense model.

    Raises:
        ValueError: If a stage is malformed or out of order.
    """

    # when the other hooks are done with the epoch before
    priority = 'VERY_LOW'

    def __init__(self, stages: Sequence[dict]) -> None:
        self.planners: Dict[int, dict] = {}
        for stage in stages:
            epoch = stage.get('epoch')
            if set(stage) != {'epoch', 'planner'
                              } or not isinstance(epoch, int) or epoch < 1:
                raise ValueError(
                    'a stage of ProgressiveTruncationHook is dict(epoch=N, '
                    'planner=dict(…)) with an epoch of at least 1 (the first '
                    'plan is that of BasisCompressionHook), but got '
                    f'{dict(stage)}')
            if self.planners and epoch <= max(self.planners):
                raise ValueError('the epochs of the stages must rise, but '
                                 f'{epoch} follows {max(self.planners)}')
            as_planner(stage['planner'])  # complains at once
            self.planners[epoch] = dict(stage['planner'])

    def before_train(self, runner: Runner) -> None:
        """Check that the run compresses and counts epochs."""
        self._compression(runner)
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            raise RuntimeError('ProgressiveTruncationHook counts epochs, but '
                               f'train_cfg has {type(runner.train_loop)}')

    def before_train_epoch(self, runner: Runner) -> None:
        """Truncate where a stage begins."""
        planner = self.planners.get(runner.epoch)
        if planner is not None:
            self._compression(runner).truncate(runner, planner)

    @staticmethod
    def _compression(runner: Runner) -> BasisCompressionHook:
        for hook in runner.hooks:
            if isinstance(hook, BasisCompressionHook):
                return hook
        raise RuntimeError('ProgressiveTruncationHook lowers the ranks of a '
                           'compressed model: add BasisCompressionHook')
