# Copyright (c) mmbasis authors. All rights reserved.
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor


@dataclass
class Spectrum:
    """Eigenvalues and eigenvectors of a layer's outputs, largest first.

    Args:
        values (Tensor): Eigenvalues, float64, shape ``(G, R)``, not negative,
            in falling order in each group.
        vectors (Tensor): Orthonormal columns, float64, shape ``(G, P, R)``.
    """
    values: Tensor
    vectors: Tensor

    @property
    def energy(self) -> Tensor:
        """Energy of each direction, summed over groups, shape ``(R, )``."""
        return self.values.sum(0)

    def energy_kept(self, rank: int) -> float:
        """Fraction of the energy in the first ``rank`` directions, rounded to
        six digits; 1 where all energy is zero."""
        total = float(self.energy.sum())
        kept = float(self.energy[:rank].sum())
        return round(kept / total, 6) if total > 0 else 1.

    def rank_for_energy(self, threshold: float) -> int:
        """The smallest rank in ``[1, R]`` whose cumulative energy reaches a
        fraction in ``(0, 1]`` of all (Tayyab et al., ICIP 2021); 1 where all
        energy is zero."""
        cumulative = self.energy.cumsum(0)
        # a hair below, so that threshold 1 is reached in spite of rounding
        target = threshold * cumulative[-1] * (1 - 1e-12)
        rank = int(torch.searchsorted(cumulative, target)) + 1
        return min(rank, len(cumulative))


def _fix_signs(vectors: Tensor) -> Tensor:
    """Make the largest entry of each column positive, for reproducibility."""
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    signs = vectors.gather(-2, largest).sign()
    return vectors * torch.where(signs == 0, torch.ones_like(signs), signs)


def spectrum_of_moment(moment: Tensor,
                       matrix: Optional[Tensor] = None) -> Spectrum:
    """Eigendecomposition of a symmetric, positive semi-definite moment.

    Args:
        moment (Tensor): Shape ``(G, P, P)``: for example the covariance of a
            layer's outputs.
        matrix (Tensor, optional): The layer's weights ``H``, shape
            ``(G, P, D)``. Where ``D < P`` all outputs lie in the range of
            ``H``, and so do the vectors then: with all of them nothing is
            lost, even of inputs that the moment knows nothing of.

    Returns:
        Spectrum: With ``R = P``, or ``min(P, D)`` where ``H`` is given.
    """
    moment = moment.double()
    if matrix is not None and matrix.shape[-1] < matrix.shape[-2]:
        orthonormal = torch.linalg.qr(matrix.double())[0]
        return _within(orthonormal, orthonormal.mT @ moment @ orthonormal)
    values, vectors = torch.linalg.eigh(moment)
    return Spectrum(values.flip(-1).clamp_min(0), _fix_signs(vectors.flip(-1)))


def spectrum_of_factor(matrix: Tensor,
                       input_moment: Optional[Tensor] = None) -> Spectrum:
    """Spectrum of ``H C H^T``, whichever of ``P`` and ``D`` is smaller.

    Args:
        matrix (Tensor): ``H``, shape ``(G, P, D)``.
        input_moment (Tensor, optional): ``C``, the second moment (or the
            covariance) of the layer's input, shape ``(G, D, D)``. Defaults to
            the identity: left singular vectors and squared singular values.

    Returns:
        Spectrum: With ``R = min(P, D)``.
    """
    matrix = matrix.double()
    rows, in_size = matrix.shape[-2:]
    if rows <= in_size:
        return spectrum_of_moment(_sandwich(matrix, input_moment))
    # H = Q R: the eigenvectors lie in the range of H, and Q keeps those of
    # the small problem orthonormal, also where eigenvalues are zero
    orthonormal, small = torch.linalg.qr(matrix)
    return _within(orthonormal, _sandwich(small, input_moment))


def _within(orthonormal: Tensor, moment: Tensor) -> Spectrum:
    """Spectrum in the space that orthonormal columns span, of a moment given
    in their coordinates."""
    spectrum = spectrum_of_moment(moment)
    return Spectrum(spectrum.values,
                    _fix_signs(orthonormal @ spectrum.vectors))


def _sandwich(matrix: Tensor, moment: Optional[Tensor]) -> Tensor:
    """``H C H^T``, or ``H H^T`` without ``C``."""
    inner = matrix if moment is None else matrix @ moment.double()
    return inner @ matrix.mT
