# Copyright (c) mmbasis authors. All rights reserved.
from typing import Any, Optional

import torch
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint

from ..compression.integrity import (
    check_weights,
    essential,
    not_finite,
    weights_of,
)
from ..models import unwrap
from ..optim import bare_model
from ..registry import HOOKS

#: steps in a row that a loss scaler may skip; without one there is none
SKIPPED = 20


@HOOKS.register_module()
class IntegrityHook(Hook):
    """Keep broken weights out of a run, and out of its checkpoints.

    Weights that are loaded for a test, to resume or to be compressed must be
    complete, of the right shape and finite; those that a dense model is
    trained from may be a part. A loss that is not finite ends training, and
    weights that are not finite are not saved: the error names the last
    checkpoint, which is sound. With a loss scaler, which skips such steps,
    20 of them in a row do.

    :class:`BasisCompressionHook` does all that, and so do ``tools/train.py``
    and ``tools/test.py`` for any model.
    """

    # before weights are copied into the model, and before anything is saved
    priority = 'VERY_HIGH'
    _broken_steps = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Check the weights that are about to be loaded."""
        owner = f'checkpoint {runner._load_from or "of this run"}'
        check_weights(
            unwrap(bare_model(runner)), weights_of(checkpoint, owner), owner,
            self._wants_all(runner), not self._goes_on(runner))

    def _wants_all(self, runner: Runner) -> bool:
        """Whether all weights must be there."""
        return self._goes_on(runner)

    @staticmethod
    def _goes_on(runner: Runner) -> bool:
        """Whether the run is a test, or resumed; not a training that starts,
        which may be for other classes."""
        return bool(runner._resume) or not isinstance(
            runner._train_loop, BaseLoop)

    def after_train_iter(self, runner: Runner, batch_idx: int,
                         data_batch: Any = None,
                         outputs: Optional[dict] = None) -> None:
        """End training if the loss is not finite."""
        values = {k: x for k, x in (outputs or {}).items()
                  if 'loss' in k and torch.is_tensor(x)}
        total = values.get('loss')
        # RuntimeInfoHook waits for the GPU in each step, too
        if total is None or bool(torch.isfinite(total).all()):
            self._broken_steps = 0
            return
        self._broken_steps += 1
        scales = getattr(runner.optim_wrapper, 'loss_scaler', None) is not None
        if self._broken_steps >= (SKIPPED if scales else 1):
            found = ', '.join(f'{k} {float(x.sum()):g}'
                              for k, x in values.items())
            raise RuntimeError(
                f'the loss is not finite in iteration {runner.iter + 1} of '
                f'epoch {runner.epoch + 1}: {found}. {_last(runner)}. A lower '
                'learning rate, or optim_wrapper.clip_grad, may help')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Refuse to save weights that are not finite."""
        keys = essential(unwrap(bare_model(runner)))
        broken = not_finite(checkpoint['state_dict'], sorted(keys))
        if broken:
            raise RuntimeError(
                f'after epoch {runner.epoch + 1}, {broken[0]} is NaN or '
                f'infinite ({len(broken)} of {len(keys)} weights): they are '
                f'not saved. {_last(runner)}')


def _last(runner: Runner) -> str:
    path = find_latest_checkpoint(runner.work_dir)
    return (f'The last checkpoint is {path}' if path else
            'There is no checkpoint yet')
