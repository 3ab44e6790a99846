# Copyright (c) mmbasis authors. All rights reserved.
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..compression import basis_layers
from ..factorization import merge, spectrum_of_factor
from ..layers import BasisLayer
from ..registry import HOOKS


@HOOKS.register_module()
class SpectrumHook(Hook):
    """Log how orthonormal the bases are and how their spectra develop.

    To MMEngine's visualizer go, after every ``interval`` epochs (or
    iterations): ``orthogonality/mean`` and ``orthogonality/max`` over the
    layers, each of them the largest entry of ``|F F^T - I|`` in a layer, and
    for each layer ``spectrum/<name>``, the effective rank of its weights
    ``w F`` (the exponential of the entropy of its energies) as a fraction of
    its rank: 1 where all directions carry the same energy, near 0 where one
    carries all and the rank could fall.

    Args:
        interval (int): Defaults to 1.
        by_epoch (bool): Whether the interval counts epochs. Defaults to True.
    """

    priority = 'LOW'

    def __init__(self, interval: int = 1, by_epoch: bool = True) -> None:
        if interval < 1:
            raise ValueError(f'interval must be positive, but got {interval}')
        self.interval = interval
        self.by_epoch = by_epoch

    def after_train_iter(self,
                         runner,
                         batch_idx,
                         data_batch=None,
                         outputs=None) -> None:
        if not self.by_epoch and self.every_n_train_iters(
                runner, self.interval):
            self._log(runner, runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        if self.by_epoch and self.every_n_epochs(runner, self.interval):
            self._log(runner, runner.epoch + 1)

    @staticmethod
    @torch.no_grad()
    def _log(runner: Runner, step: int) -> None:
        layers = dict(basis_layers(runner.model))
        if not layers:
            return
        errors = [layer.orthogonality_error for layer in layers.values()]
        scalars = {
            'orthogonality/mean': sum(errors) / len(errors),
            'orthogonality/max': max(errors)
        }
        for name, layer in layers.items():
            scalars[f'spectrum/{name}'] = effective_rank(layer) / layer.rank
        runner.visualizer.add_scalars(scalars, step=step)
        runner.logger.info('Orthonormality error: mean %.2e, max %.2e',
                           scalars['orthogonality/mean'], max(errors))


def effective_rank(layer: BasisLayer) -> float:
    """Effective rank of a layer's weights, in ``[1, rank]``: the exponential
    of the entropy of the energies (Roy and Vetterli, 2007)."""
    weights = merge(*(factor.double() for factor in layer.factors))
    energy = spectrum_of_factor(weights).energy[:layer.rank]
    share = energy / energy.sum()
    return float(torch.exp(torch.special.entr(share).sum()))
