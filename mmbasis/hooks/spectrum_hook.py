# Copyright (c) mmbasis authors. All rights reserved.
import torch
from mmengine.runner import Runner

from ..compression import basis_layers
from ..factorization import merge, spectrum_of_factor
from ..layers import BasisLayer
from ..registry import HOOKS
from .orthogonality_hook import PeriodicHook


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
