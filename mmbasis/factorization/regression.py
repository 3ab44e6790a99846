# Copyright (c) mmbasis authors. All rights reserved.
from typing import Optional, Tuple

import torch
from torch import Tensor

from .spectrum import spectrum_of_factor

#: Weights of directions that the loss does not feel at all, as a fraction of
#: the largest: nothing is thrown away for free.
WEIGHT_FLOOR = 1e-3


def reduced_rank_regression(
        cross: Tensor,
        second: Tensor,
        prior: Tensor,
        rank: Optional[int] = None,
        weight: Optional[Tensor] = None,
        ridge: float = 1e-4) -> Tuple[Tensor, Tensor, Tensor]:
    """Minimise ``E ||y - M r||^2 + lambda ||M - M0||^2`` over ``M``, and keep
    the directions of ``y`` in which the prediction has most energy, in the
    metric of ``weight`` (reduced-rank regression; Izenman, 1975).

    Args:
        cross (Tensor): ``E[(y - M0 r) r^T]``, centred, float64, shape
            ``(G, P, N)``. Being zero where nothing has changed, it leaves
            ``M0`` untouched there, whatever the condition of ``second``.
        second (Tensor): ``E[r r^T]``, centred, not zero, shape ``(G, N, N)``.
        prior (Tensor): ``M0``, shape ``(G, P, N)``.
        rank (int, optional): ``Q``. Defaults to full rank.
        weight (Tensor, optional): ``W``, positive semi-definite, shape
            ``(G, P, P)``: an error ``e`` counts ``e^T W e``. Defaults to the
            identity. At full rank it does not matter.
        ridge (float): ``lambda`` over the top eigenvalue of ``second``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Coefficients ``(G, P, Q)`` and a basis
        ``(G, Q, N)``, whose product is the map, and how much of
        ``E ||y - M0 r||^2`` full rank explains, a scalar.
    """
    root = _cholesky(second, ridge)
    # M - M0 = cross (L L^T)^-1
    change = torch.cholesky_solve(cross.mT, root).mT
    mapping = prior + change
    # with W = C C^T: left singular vectors of C^T M L, by predicted energy
    metric = torch.eye(mapping.shape[-2]).to(mapping)
    if weight is not None:
        metric = _cholesky(weight.double(), WEIGHT_FLOOR).mT
    weighted = metric @ mapping
    vectors = spectrum_of_factor(weighted @ root).vectors[..., :rank]
    coefficients = torch.linalg.solve_triangular(metric, vectors, upper=True)
    return coefficients, vectors.mT @ weighted, (cross * change).sum()


def _cholesky(moment: Tensor, ridge: float) -> Tensor:
    """Lower Cholesky factor of a moment whose diagonal is raised by a
    fraction of the largest eigenvalue, or by 1 where the moment is zero."""
    strength = ridge * _largest_eigenvalue(moment)
    strength = torch.where(strength > 0, strength, torch.ones_like(strength))
    identity = torch.eye(moment.shape[-1]).to(moment)
    return torch.linalg.cholesky(moment + strength.view(-1, 1, 1) * identity)


def _largest_eigenvalue(moment: Tensor, iterations: int = 20) -> Tensor:
    """Power iteration, within a few per cent, for less than ``eigh``."""
    vector = (moment.sum(-1) + moment.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1)
    for _ in range(iterations):
        size = vector.norm(dim=-2, keepdim=True).clamp_min(1e-300)
        vector = moment @ (vector / size)
    return vector.norm(dim=(-2, -1))
