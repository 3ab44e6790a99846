# Copyright (c) mmbasis authors. All rights reserved.
from typing import Tuple

import torch
from torch import Tensor


def factorize(matrix: Tensor, vectors: Tensor) -> Tuple[Tensor, Tensor]:
    """Project a layer on a subspace of its outputs: ``H ~ U U^T H = w F``
    with ``F F^T = I``, as in Tayyab et al., ICIP 2021.

    Args:
        matrix (Tensor): The dense weights ``H``, shape ``(G, P, D)``.
        vectors (Tensor): Orthonormal columns ``U``, shape ``(G, P, Q)`` with
            ``Q <= min(P, D)``.

    Returns:
        tuple[Tensor, Tensor]: The basis ``F``, shape ``(G, Q, D)``, and the
        coefficients ``w``, shape ``(G, P, Q)``, both float64.
    """
    vectors = vectors.double()
    return orthonormalize(vectors.mT @ matrix.double(), vectors)


def orthonormalize(basis: Tensor,
                   coefficients: Tensor) -> Tuple[Tensor, Tensor]:
    """Make the rows of a basis orthonormal without changing the product.

    With ``F^T = Q R`` the pair ``(Q^T, w R^T)`` has the product of
    ``(F, w)``.

    Args:
        basis (Tensor): ``F``, shape ``(G, Q, D)`` with ``Q <= D``.
        coefficients (Tensor): ``w``, shape ``(G, P, Q)``.

    Returns:
        tuple[Tensor, Tensor]: Basis and coefficients, float64, of the same
        shapes.
    """
    columns, upper = torch.linalg.qr(basis.double().mT)
    # QR is unique up to signs; positive diagonals move the basis the least
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    signs = torch.copysign(torch.ones_like(diagonal), diagonal)
    columns = columns * signs.unsqueeze(-2)
    upper = upper * signs.unsqueeze(-1)
    return columns.mT.contiguous(), coefficients.double() @ upper.mT


def merge(basis: Tensor, coefficients: Tensor) -> Tensor:
    """The dense weights ``w F``, shape ``(G, P, D)``, that a basis of shape
    ``(G, Q, D)`` and coefficients of shape ``(G, P, Q)`` stand for."""
    return coefficients @ basis
