# Copyright (c) mmbasis authors. All rights reserved.
"""Hooks that look at the basis layers at regular times in training."""
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..compression import basis_layers
from ..factorization import merge, spectrum_of_factor
from ..layers import BasisLayer
from ..registry import HOOKS


class PeriodicHook(Hook):
    """Do something at regular times in training.

    Args:
        interval (int): Iterations or epochs from one time to the next, at
            least 1, or a ValueError is raised. Defaults to 1.
        by_epoch (bool): Whether the interval counts epochs. Defaults to True.
    """

    def __init__(self, interval: int = 1, by_epoch: bool = True) -> None:
        if interval < 1:
            raise ValueError(f'interval must be positive, but got {interval}')
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
    coefficients make up for it, so that the model computes the same. It is
    the hard form of the penalty ``BasisModel(orthogonality=…)``. For arguments
    see :class:`PeriodicHook`."""

    # after the optimizer's step, before EMA averages and checkpoints are saved
    priority = 'HIGH'

    def act(self, runner: Runner, step: int) -> None:
        for _, layer in basis_layers(runner.model):
            layer.retract()


@HOOKS.register_module()
class SpectrumHook(PeriodicHook):
    """Log how orthonormal the bases are and how their spectra develop.

    MMEngine's visualizer gets ``orthogonality/mean`` and ``orthogonality/max``
    over the layers, each of them the largest entry of ``|F F^T - I|`` in a
    layer, and ``spectrum/<name>`` for each layer: the effective rank of its
    weights ``w F`` as a fraction of its rank, 1 where all directions carry the
    same energy. For arguments see :class:`PeriodicHook`.
    """

    priority = 'LOW'

    @torch.no_grad()
    def act(self, runner: Runner, step: int) -> None:
        layers = dict(basis_layers(runner.model))
        if not layers:
            return
        errors = [layer.orthogonality_error for layer in layers.values()]
        mean, largest = sum(errors) / len(errors), max(errors)
        scalars = {f'spectrum/{k}': _evenness(v) for k, v in layers.items()}
        scalars['orthogonality/mean'] = mean
        scalars['orthogonality/max'] = largest
        runner.visualizer.add_scalars(scalars, step=step)
        runner.logger.info('Orthonormality error: mean %.2e, max %.2e', mean,
                           largest)


def _evenness(layer: BasisLayer) -> float:
    """Effective rank over rank: the exponential of the entropy of the
    energies (Roy and Vetterli, 2007)."""
    weights = merge(*(factor.double() for factor in layer.factors))
    energy = spectrum_of_factor(weights).energy[:layer.rank]
    share = energy / energy.sum()
    return float(torch.exp(torch.special.entr(share).sum())) / layer.rank
