# Copyright (c) mmbasis authors. All rights reserved.
import random
from functools import partial

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop

from mmbasis.registry import HOOKS


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed the random numbers of each training epoch from its number.

    MMEngine seeds once, when the runner is built, and saves no state of the
    generators: a resumed run draws other augmentations and dropout masks than
    the uninterrupted one. With this hook the numbers of an epoch depend on
    the runner's seed, the epoch and the rank only, so both runs draw the same
    ones.

    It also takes away the ``worker_init_fn`` that MMEngine gives its data
    loaders. That one seeds new workers with the same number in every epoch,
    so that all epochs draw the same crops and flips; without it PyTorch seeds
    each worker from the main process, whose numbers the hook has just set.

    Resume is exact under these conditions:

    - ``randomness=dict(seed=...)`` is set: the sampler's order comes from it
      before the checkpoint is read.
    - The loop is epoch-based and checkpoints are saved at the end of epochs.
    - ``num_workers`` is the same in both runs, and workers do not persist:
      their state would outlive the epoch.

    Args:
        enabled (bool): False leaves everything as MMEngine does it. Defaults
            to True.

    Examples:
        >>> randomness = dict(seed=0)
        >>> train_dataloader = dict(persistent_workers=False, ...)
        >>> custom_hooks = [dict(type='mmbasis.EpochSeedHook')]
    """

    # after other hooks have drawn numbers of their own
    priority = 'VERY_LOW'

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def before_train(self, runner) -> None:
        """Check the data loader and free its workers of the fixed seed.

        Args:
            runner (Runner): The runner of the training process.

        Raises:
            ValueError: If the data loader keeps its workers.
        """
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
        init_fn = getattr(loader, 'worker_init_fn', None)
        if isinstance(init_fn, partial) and init_fn.func is worker_init_fn:
            loader.worker_init_fn = None

    def before_train_epoch(self, runner) -> None:
        """Seed Python, NumPy and PyTorch for the epoch.

        Args:
            runner (Runner): The runner of the training process.
        """
        if not self.enabled:
            return
        state = np.random.SeedSequence([runner.seed, runner.epoch, get_rank()])
        seed = int(state.generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
