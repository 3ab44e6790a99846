# Copyright (c) mmbasis authors. All rights reserved.
"""Hooks that help fine-tuning."""
from functools import partial
from typing import Any, Sequence

import numpy as np
import torch
from mmengine.dataset import worker_init_fn
from mmengine.dist import get_rank
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import EpochBasedTrainLoop, Runner, set_random_seed
from torch import Tensor

from ..compression import basis_layers, recalibrate_if_better, take_batches
from ..datasets import calibration_dataloader
from ..factorization import merge, orthogonality_error, spectrum_of_factor
from ..layers import as_square, retract
from ..models import unwrap
from ..optim import bare_model
from ..registry import HOOKS
from ..running import adapter_of, evaluation, train_deterministically
from ..utils.collectives import shared_errors, together
from ..utils.schema import BOOL, COUNT, WHOLE


class PeriodicHook(Hook):
    """Do something at regular times in training.

    Args:
        interval (int): Iterations or epochs from one time to the next; with
            0 there is none. Defaults to 1.
        by_epoch (bool): Whether the interval counts epochs. Defaults to True.
    """

    def __init__(self, interval: int = 1, by_epoch: bool = True) -> None:
        WHOLE.check(f'{type(self).__name__}: interval', interval)
        BOOL.check(f'{type(self).__name__}: by_epoch', by_epoch)
        self.interval = interval
        self.by_epoch = by_epoch

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
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
    """Make the basis filters orthonormal again while they are trained; the
    function of the model stays. It is the hard form of the penalty
    ``BasisModel(orthogonality=…)``. Arguments: see :class:`PeriodicHook`."""

    # after the optimizer's step, before EMA averages and checkpoints are saved
    priority = 'HIGH'

    def act(self, runner: Runner, step: int) -> None:
        retract([layer for _, layer in basis_layers(runner.model)])


@HOOKS.register_module()
class SpectrumHook(PeriodicHook):
    """Log how orthonormal the bases are and how their spectra develop.

    MMEngine's visualizer gets ``orthogonality/mean`` and ``orthogonality/max``
    over the layers, of the largest entry of a layer's ``|F F^T - I|``, and
    ``spectrum/<name>``: the effective rank of its weights ``w F`` as a
    fraction of its rank, 1 where all directions carry the same energy.
    Arguments: see :class:`PeriodicHook`.
    """

    priority = 'LOW'

    @torch.no_grad()
    def act(self, runner: Runner, step: int) -> None:
        deviations, ranks = [], {}
        for name, layer in basis_layers(runner.model):
            deviations.append(
                torch.stack([orthogonality_error(x.float())
                             for x in layer.bases]).max())
            weights = merge(*(factor.double() for factor in layer.factors))
            # of an input form, the basis decides what rank there can be
            basis = layer.factors[layer.parts.index(layer.basis)]
            if layer.spatial:
                weights = as_square(weights, basis.shape[-1])
            energy = spectrum_of_factor(weights).energy[:min(basis.shape[1:])]
            # the exponential of the entropy (Roy and Vetterli, 2007)
            entropy = torch.special.entr(energy / energy.sum()).sum()
            ranks[f'spectrum/{name}'] = entropy.exp() / len(energy)
        if not deviations:
            return
        # read at once: a GPU is waited for a single time
        scalars = dict(zip(ranks, torch.stack([*ranks.values()]).tolist()))
        errors = torch.stack(deviations).tolist()
        mean, largest = sum(errors) / len(errors), max(errors)
        scalars['orthogonality/mean'] = mean
        scalars['orthogonality/max'] = largest
        runner.visualizer.add_scalars(scalars, step=step)
        runner.logger.info('Orthonormality error: mean %.2e, max %.2e', mean,
                           largest)


@HOOKS.register_module()
class RecalibrationHook(Hook):
    """Compute the statistics of batch normalisations again at the end of
    training, and keep them if the loss clearly falls by it.

    Running averages lag behind weights that move, and come from augmented
    images. The new ones come from training images with the transforms of
    testing, as does the loss. EMA's average of the model gets its own.

    Args:
        num_batches (int): Training batches for the statistics, at least 1, or
            a ValueError is raised. Defaults to 32.
        held_out (int): The same for the choice. Defaults to 8.
    """

    # after the optimizer's step and EMA's, before checkpoints are saved
    priority = 'LOW'

    def __init__(self, num_batches: int = 32, held_out: int = 8) -> None:
        COUNT.check('RecalibrationHook: num_batches', num_batches)
        COUNT.check('RecalibrationHook: held_out', held_out)
        self.num_batches = num_batches
        self.held_out = held_out

    def after_train_iter(self, runner: Runner, *_: Any, **__: Any) -> None:
        """Recalibrate after the last iteration."""
        if self.is_last_train_iter(runner):
            self._recalibrate(runner)

    @shared_errors('recalibration')
    def _recalibrate(self, runner: Runner) -> None:
        batches, held_out = take_batches(
            calibration_dataloader(runner, runner.seed), self.num_batches,
            self.held_out)
        found = together('recalibration', (len(batches), len(held_out)))
        if not min(found)[0] or not sum(count for _, count in found):
            runner.logger.warning(
                'No recalibration: %d batches of training images leave none '
                'to choose by', len(batches))
            return
        models = [bare_model(runner)]
        models += [hook.ema_model.module for hook in runner.hooks
                   if isinstance(hook, EMAHook)]
        for model in map(unwrap, models):
            recalibrate_if_better(model, batches,
                                  partial(losses_of, model, held_out))


def losses_of(model: torch.nn.Module, batches: Sequence[Any]) -> Tensor:
    """The training loss of a model on each batch of this process, with
    normalisations as in evaluation mode and without dropout."""
    adapter = adapter_of(model)
    with evaluation(model):
        train_deterministically(model)
        torch.manual_seed(0)  # two-stage detectors draw among proposals
        losses = [adapter.loss(data).cpu() for data in batches]
    return torch.stack(losses) if losses else torch.zeros(0)


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Seed the random numbers of each training epoch from the runner's seed,
    the epoch and the rank. MMEngine seeds once, so that a resumed run draws
    other augmentations and dropout masks than the uninterrupted one.

    Resume is exact if ``randomness=dict(seed=...)`` is set, the loop is by
    epoch, checkpoints are saved at the end of epochs, and ``num_workers``
    stays the same. Workers that persist raise a ValueError.

    Args:
        enabled (bool): False changes nothing. Defaults to True.
    """

    # after other hooks have drawn numbers of their own
    priority = 'VERY_LOW'

    def __init__(self, enabled: bool = True) -> None:
        BOOL.check('EpochSeedHook: enabled', enabled)
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
