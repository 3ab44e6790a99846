# Copyright (c) mmbasis authors. All rights reserved.
from functools import partial

import numpy as np
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed

from ..registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed the random numbers of each training epoch from its number.

    MMEngine seeds once and saves no state of the generators: a resumed run
    draws other augmentations and dropout masks than the uninterrupted one.
    With this hook they depend on the runner's seed, the epoch and the rank.

    Resume is exact if ``randomness=dict(seed=...)`` is set, the loop is
    epoch-based, checkpoints are saved at the end of epochs, and
    ``num_workers`` is the same in both runs. Workers that persist raise a
    ValueError.

    Args:
        enabled (bool): False leaves everything as MMEngine does it. Defaults
            to True.
    """

    # after other hooks have drawn numbers of their own
    priority = 'VERY_LOW'

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def before_train(self, runner: Runner) -> None:
        """Check the data loader and free its workers of the fixed seed."""
        if not self.enabled:
            return
        loader = runner.train_dataloader
        if getattr(loader, 'persistent_workers', False):
            raise ValueError(
                'EpochSeedHook cannot seed workers that persist: set '
                'train_dataloader.persistent_workers to False, or '
                'enabled=False in the hook to give up exact resume')
        if not isinstance(runner.train_loop, EpochBasedTrainLoop):
            runner.logger.warning(
                'EpochSeedHook seeds whole epochs: with '
                f'{type(runner.train_loop).__name__} a resumed run draws '
                'other random numbers than an uninterrupted one')
        # MMEngine seeds workers with the same number in every epoch, PyTorch
        # from the main process
        init_fn = getattr(loader, 'worker_init_fn', None)
        if isinstance(init_fn, partial) and init_fn.func is worker_init_fn:
            loader.worker_init_fn = None

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed Python, NumPy and PyTorch for the epoch."""
        if self.enabled:
            state = np.random.SeedSequence(
                [runner.seed, runner.epoch, get_rank()])
            set_random_seed(int(state.generate_state(1)[0]))
