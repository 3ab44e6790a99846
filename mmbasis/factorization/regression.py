# Copyright (c) mmbasis authors. All rights reserved.
from typing import Optional, Tuple

import torch
from torch import Tensor

from .spectrum import spectrum_of_factor


def reduced_rank_regression(
        cross: Tensor,
        second: Tensor,
        prior: Tensor,
        rank: Optional[int] = None,
        ridge: float = 1e-4) -> Tuple[Tensor, Tensor, Tensor]:
    """The best map of given rank from regressors ``r`` to targets ``y``.

    Minimises ``E ||y - M r||^2 + lambda ||M - M0||^2`` over ``M`` and then
    keeps the directions of ``y`` in which the prediction has most energy
    (reduced-rank regression; Izenman, 1975).

    Args:
        cross (Tensor): ``E[(y - M0 r) r^T]``, centred, float64, shape
            ``(G, P, N)``. Being zero where nothing has changed, it leaves
            ``M0`` untouched there, whatever the condition of ``second``.
        second (Tensor): ``E[r r^T]``, centred, not zero, shape ``(G, N, N)``.
        prior (Tensor): ``M0``, shape ``(G, P, N)``, what the map would be if
            nothing had changed.
        rank (int, optional): ``Q``. Defaults to full rank.
        ridge (float): ``lambda`` as a fraction of the largest eigenvalue of
            ``second``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: ``U`` of shape ``(G, P, Q)`` with
        orthonormal columns, ``U^T M`` of shape ``(G, Q, N)``, and how much of
        ``E ||y - M0 r||^2`` full rank explains, a scalar.
    """
    strength = ridge * torch.linalg.matrix_norm(second, ord=2)
    identity = torch.eye(second.shape[-1]).to(second)
    root = torch.linalg.cholesky(second + strength.view(-1, 1, 1) * identity)
    # M - M0 = cross (L L^T)^-1
    change = torch.cholesky_solve(cross.mT, root).mT
    mapping = prior + change
    # the left singular vectors of M L order the directions of y by the
    # energy that is predicted
    vectors = spectrum_of_factor(mapping @ root).vectors[..., :rank]
    return vectors, vectors.mT @ mapping, (cross * change).sum()
