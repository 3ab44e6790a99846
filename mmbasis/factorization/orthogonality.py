# Copyright (c) mmbasis authors. All rights reserved.
import torch
from torch import Tensor


def _deviation(basis: Tensor) -> Tensor:
    """``F F^T - I``, shape ``(G, Q, Q)``."""
    gram = basis @ basis.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram - identity


def orthogonality_penalty(basis: Tensor) -> Tensor:
    """Soft orthogonality ``||F F^T - I||_F^2`` of a basis of shape
    ``(G, Q, D)``: a scalar, zero if and only if its rows are orthonormal."""
    return _deviation(basis).square().sum()


def orthogonality_error(basis: Tensor) -> Tensor:
    """Largest entry of ``|F F^T - I|`` of a basis of shape ``(G, Q, D)``: of
    the order of rounding for orthonormal rows."""
    return _deviation(basis).abs().max()
