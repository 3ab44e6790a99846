# Copyright (c) mmbasis authors. All rights reserved.
"""Pure tensor mathematics: spectra, basis and coefficients, orthogonality.

A layer with ``G`` groups, ``P`` output channels per group and ``D`` weights
per output channel is a stack of matrices, a tensor ``H`` of shape
``(G, P, D)``. All but orthogonality is computed in float64.
"""
from dataclasses import dataclass
from functools import reduce
from typing import Optional, Tuple

import torch
from torch import Tensor

#: steps of conjugate gradients that fit an input basis
STEPS = 8


def factorize(matrix: Tensor, vectors: Tensor) -> Tuple[Tensor, ...]:
    """Project the weights ``H``, shape ``(G, P, D)``, of a layer on a subspace
    of its outputs, given by orthonormal columns ``U`` of shape ``(G, P, Q)``
    with ``Q <= min(P, D)``, as in Tayyab et al., ICIP 2021.

    Returns:
        tuple[Tensor, Tensor]: A basis ``F``, shape ``(G, Q, D)``, and
        coefficients ``w``, shape ``(G, P, Q)``, float64, with
        ``w F = U U^T H`` and ``F F^T = I``.
    """
    vectors = vectors.double()
    return orthonormalize(vectors.mT @ matrix.double(), vectors)


def orthonormalize(*factors: Tensor) -> Tuple[Tensor, ...]:
    """Make the rows of all factors of a layer but the last orthonormal,
    without changing their product: for ``F^T = Q R`` that of ``(F, w)`` is
    that of ``(Q^T, w R^T)``. Factors as in :func:`merge`, float64."""
    found, last = [], factors[0].double()
    for following in factors[1:]:
        columns, upper = torch.linalg.qr(last.mT)
        # QR is unique up to signs; positive diagonals move the least
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        signs = torch.copysign(torch.ones_like(diagonal), diagonal)
        signs = signs.unsqueeze(-2)
        found.append((columns * signs).mT.contiguous())
        last = widen(following.double(), upper.mT * signs)
    return (*found, last)


def merge(*factors: Tensor) -> Tensor:
    """The dense weights, shape ``(G, P, D)``, that factors stand for, in the
    order in which they are applied: an input basis ``V``, shape
    ``(G, R, C)``, if any, a basis ``F``, shape ``(G, Q, R k)``, and
    coefficients ``w``, shape ``(G, P, Q)``, if any."""
    return reduce(widen, reversed(factors))


def widen(layer: Tensor, basis: Tensor) -> Tensor:
    """The weights, shape ``(G, P, C k)``, of a layer with weights of shape
    ``(G, P, R k)`` (the ``k`` places in the kernel innermost) that sees a
    basis, shape ``(G, R, C)``, of its input channels."""
    blocks = layer.unflatten(-1, (basis.shape[-2], -1))
    return torch.einsum('gprk,grc->gpck', blocks, basis).flatten(-2)


def _deviation(basis: Tensor) -> Tensor:
    """``F F^T - I``, shape ``(G, Q, Q)``."""
    identity = basis.new_ones(basis.shape[-2]).diag()
    return torch.baddbmm(identity, basis, basis.mT, beta=-1)


def orthogonality_penalty(basis: Tensor) -> Tensor:
    """Soft orthogonality ``||F F^T - I||_F^2`` of a basis of shape
    ``(G, Q, D)``: a scalar, zero if and only if its rows are orthonormal."""
    return _deviation(basis).square().sum()


def orthogonality_error(basis: Tensor) -> Tensor:
    """Largest entry of ``|F F^T - I|`` of a basis of shape ``(G, Q, D)``: of
    the order of rounding for orthonormal rows."""
    return _deviation(basis).abs().max()


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
        return int(torch.searchsorted(cumulative, target)) + 1


def spectrum_of_moment(moment: Tensor,
                       matrix: Optional[Tensor] = None) -> Spectrum:
    """Eigendecomposition of a symmetric, positive semi-definite moment: ``R``
    is ``P``, or ``min(P, D)`` where ``H`` is given.

    Args:
        moment (Tensor): Shape ``(G, P, P)``: for example the covariance of a
            layer's outputs.
        matrix (Tensor, optional): The layer's weights ``H``, shape
            ``(G, P, D)``. Where ``D < P`` all outputs lie in the range of
            ``H``, and so do the vectors then: with all of them nothing is
            lost, even of inputs that the moment knows nothing of.
    """
    moment = moment.double()
    if matrix is None or matrix.shape[-1] >= matrix.shape[-2]:
        return _spectrum(moment)
    columns = torch.linalg.qr(matrix.double())[0]
    return _spectrum(columns.mT @ moment @ columns, columns)


def spectrum_of_factor(matrix: Tensor,
                       input_moment: Optional[Tensor] = None) -> Spectrum:
    """Spectrum of ``H C H^T``, in which ``R = min(P, D)``.

    Args:
        matrix (Tensor): ``H``, shape ``(G, P, D)``.
        input_moment (Tensor, optional): ``C``, the second moment (or the
            covariance) of the layer's input, shape ``(G, D, D)``. Defaults to
            the identity: left singular vectors and squared singular values.
    """
    matrix, columns = matrix.double(), None
    if matrix.shape[-1] < matrix.shape[-2]:
        # H = Q R: the eigenvectors lie in the range of H, and Q keeps those
        # of the small problem orthonormal, also where eigenvalues are zero
        columns, matrix = torch.linalg.qr(matrix)
    half = matrix if input_moment is None else matrix @ input_moment.double()
    return _spectrum(half @ matrix.mT, columns)


def _spectrum(moment: Tensor, columns: Optional[Tensor] = None) -> Spectrum:
    """Of a moment, in the coordinates of orthonormal columns, if given."""
    values, vectors = torch.linalg.eigh(moment)
    vectors = vectors.flip(-1)
    if columns is not None:
        vectors = columns @ vectors
    # the largest entry of each column is positive, for reproducibility
    largest = vectors.abs().argmax(dim=-2, keepdim=True)
    return Spectrum(
        values.flip(-1).clamp_min(0),
        vectors * vectors.gather(-2, largest).sign())


@dataclass
class InputSpectrum:
    """Directions of a layer's input channels, the most important first, and
    what dropping each of them costs.

    Args:
        values (Tensor): Increase of the loss, or energy of the output that is
            lost, by each direction, float64, shape ``(G, C)``.
        narrow (Tensor): Columns ``B``, float64, shape ``(G, C, C)``: the
            first ``R`` coordinates of an input ``x`` are ``B_R^T x``.
        widen (Tensor): Columns ``A`` of the same shape: ``A_R B_R^T x`` is
            the best that these say of ``x``.
    """
    values: Tensor
    narrow: Tensor
    widen: Tensor

    @property
    def shares(self) -> Tensor:
        """Of all that can be lost, by direction, shape ``(C, )``."""
        losses = self.values.sum(0)
        return losses / losses.sum().clamp_min(1e-300)


def spectrum_of_input(matrix: Tensor,
                      channels: int,
                      covariance: Optional[Tensor] = None,
                      gradient: Optional[Tensor] = None) -> InputSpectrum:
    """The directions that matter most of a layer's input.

    With ``C = S S`` and eigenvectors ``v`` of ``S G S``, dropping the
    coordinate ``v^T S^-1 x`` of a centred input ``x`` costs the eigenvalue,
    ``E[(v^T S^-1 x)^2] (S v)^T G (S v)``.

    Args:
        matrix (Tensor): The weights ``H``, shape ``(G, P, C k)``.
        channels (int): ``C``, input channels of a group.
        covariance (Tensor, optional): Of the input channels, shape
            ``(G, C, C)``. Defaults to the identity.
        gradient (Tensor, optional): ``G``, second moment of the loss'
            gradients at the input, shape ``(G, C, C)``. By default the energy
            of the output counts, ``sum_k H_k^T H_k``.
    """
    if gradient is None:
        blocks = matrix.double().unflatten(-1, (channels, -1))
        gradient = torch.einsum('gpck,gpdk->gcd', blocks, blocks)
    if covariance is None:
        covariance = gradient.new_ones(channels).diag().expand_as(gradient)
    covariance = covariance.to(gradient)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp_min(1e-10 * values.amax(-1, True)).clamp_min(1e-300)
    root = values.sqrt().unsqueeze(-2)
    forth, back = vectors * root @ vectors.mT, vectors / root @ vectors.mT
    values, vectors = torch.linalg.eigh(forth @ gradient @ forth)
    vectors = vectors.flip(-1)
    return InputSpectrum(
        values.flip(-1).clamp_min(0), back @ vectors, forth @ vectors)


def narrow(matrix: Tensor, spectrum: InputSpectrum,
           rank: int) -> Tuple[Tensor, Tensor]:
    """Let a layer see the first directions of its input channels only.

    Args:
        matrix (Tensor): ``H``, shape ``(G, P, C k)``, the ``k`` places in
            the kernel innermost.
        spectrum (InputSpectrum): The directions.
        rank (int): ``R``, how many of them, in ``[1, C]``.

    Returns:
        tuple[Tensor, Tensor]: An input basis ``V`` with orthonormal rows,
        shape ``(G, R, C)``, and the layer behind it, shape ``(G, P, R k)``,
        both float64.
    """
    columns, upper = torch.linalg.qr(spectrum.narrow[..., :rank])
    mapping = spectrum.widen[..., :rank] @ upper.mT
    return columns.mT, widen(matrix.double(), mapping)


def reduced_rank_regression(
    cross: Tensor,
    second: Tensor,
    prior: Tensor,
    rank: Optional[int] = None,
    weight: Optional[Tensor] = None,
    ridge: float = 1e-4
) -> Tuple[Tensor, Tensor, Tensor]:
    """Minimise ``E ||y - M r||^2 + lambda ||M - M0||^2`` over ``M``, and keep
    the directions of ``y`` in which the prediction has most energy, in the
    metric of ``weight`` (Izenman, 1975).

    Args:
        cross (Tensor): ``E[(y - M0 r) r^T]``, centred, float64, shape
            ``(G, P, N)``. Where it is zero, ``M0`` stays.
        second (Tensor): ``E[r r^T]``, centred, not zero, shape ``(G, N, N)``.
        prior (Tensor): ``M0``, shape ``(G, P, N)``.
        rank (int, optional): ``Q``. Defaults to full rank.
        weight (Tensor, optional): ``W``, positive semi-definite, shape
            ``(G, P, P)``: an error ``e`` counts ``e^T W e``. Defaults to the
            identity. At full rank it does not matter.
        ridge (float): ``lambda`` over the top eigenvalue of ``second``.

    Returns:
        tuple[Tensor, Tensor, Tensor]: Coefficients ``(G, P, Q)`` and a basis
        ``(G, Q, N)`` with the map as product, and how much of
        ``E ||y - M0 r||^2`` full rank explains, a scalar.
    """
    root = torch.linalg.cholesky(_raised(second, ridge))
    # M - M0 = cross (L L^T)^-1
    change = torch.cholesky_solve(cross.mT, root).mT
    metric = None if weight is None else metric_of(weight)
    return (*_truncate(prior + change, root, metric, rank),
            (cross * change).sum())


def two_sided_regression(
    cross: Tensor,
    second: Tensor,
    prior: Tensor,
    input_basis: Tensor,
    rank: Optional[int] = None,
    weight: Optional[Tensor] = None,
    ridge: float = 1e-4,
    rounds: int = 1
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`reduced_rank_regression` of a layer behind a basis of its input
    channels, which is fitted, too: Tucker-2 in the metric of the data, by
    alternating least squares. ``input_basis``, shape ``(G, R, C)``, is what it
    starts from; it is fitted ``rounds`` times. The other arguments and what is
    returned are as there; the input basis, with orthonormal rows, comes last.
    """
    second = _raised(second, ridge)
    change = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(second)).mT
    mapping = prior + change
    metric = None if weight is None else metric_of(weight)
    for left in range(rounds, -1, -1):
        behind, inner = _behind(mapping, second, input_basis)
        coefficients, basis = _truncate(behind, inner, metric, rank)
        if left:
            wanted, layer = mapping, coefficients @ basis
            if metric is not None:
                wanted, layer = metric @ wanted, metric @ layer
            input_basis = _fit_input_basis(wanted, second, layer, input_basis)
    return coefficients, basis, (cross * change).sum(), input_basis


def metric_of(weight: Tensor) -> Tensor:
    """Upper triangular ``C^T`` with ``W = C C^T``, for ``W`` of shape
    ``(G, P, P)``, positive semi-definite."""
    # what the loss does not feel counts a little, too
    return torch.linalg.cholesky(_raised(weight.double(), 1e-3)).mT


def _truncate(mapping: Tensor, root: Tensor, metric: Optional[Tensor],
              rank: Optional[int]) -> Tuple[Tensor, Tensor]:
    """The left singular vectors of ``C^T M L`` with most energy, or the whole
    mapping."""
    if rank is None:
        identity = mapping.new_ones(mapping.shape[-2]).diag()
        return identity.expand(len(mapping), -1, -1), mapping
    weighted = mapping if metric is None else metric @ mapping
    vectors = spectrum_of_factor(weighted @ root).vectors[..., :rank]
    basis = vectors.mT @ weighted
    if metric is not None:
        vectors = torch.linalg.solve_triangular(metric, vectors, upper=True)
    return vectors, basis


def _behind(mapping: Tensor, second: Tensor,
            basis: Tensor) -> Tuple[Tensor, Tensor]:
    """The best mapping from what an input basis lets through, and the Cholesky
    factor of its second moment."""
    half = _see(second, basis)
    root = torch.linalg.cholesky(_raised(_see(half.mT, basis), 1e-8))
    return torch.cholesky_solve((mapping @ half).mT, root).mT, root


def _see(matrix: Tensor, basis: Tensor) -> Tensor:
    """Columns ``C k`` of a matrix, as an input basis lets them through."""
    blocks = matrix.unflatten(-1, (basis.shape[-1], -1))
    return torch.einsum('gnck,grc->gnrk', blocks, basis).flatten(-2)


def _fit_input_basis(mapping: Tensor, second: Tensor, layer: Tensor,
                     basis: Tensor) -> Tensor:
    """Nearer to the input basis with which a layer is closest to a mapping, by
    conjugate gradients from a basis on; with orthonormal rows."""
    rank, channels = basis.shape[-2:]
    blocks = layer.unflatten(-1, (rank, -1))
    places = blocks.shape[-1]
    moments = second.unflatten(-1, (channels, -1)).unflatten(1, (channels, -1))
    pairs = torch.einsum('gpsl,gprk->gsrkl', blocks, blocks)
    # one matrix for each side, as preconditioner
    left = torch.linalg.inv(_raised(
        torch.einsum('gsrkk->gsr', pairs), 1e-6))
    right = torch.linalg.inv(_raised(
        torch.einsum('gckdk->gcd', moments), 1e-6))
    moments, pairs = moments.flatten(2), pairs.flatten(2)

    def normal(x: Tensor) -> Tensor:
        seen = (x @ moments).unflatten(-1, (places, channels, places))
        return pairs @ seen.transpose(-1, -2).flatten(1, 3)

    wanted = (mapping @ second).unflatten(-1, (channels, places))
    rest = torch.einsum('gprk,gpck->grc', blocks, wanted) - normal(basis)
    step = direction = left @ rest @ right
    size = (rest * step).sum((1, 2), True)
    for _ in range(STEPS):
        along = normal(direction)
        length = size / (direction * along).sum((1, 2), True).clamp_min(1e-300)
        basis, rest = basis + length * direction, rest - length * along
        step = left @ rest @ right
        size, before = (rest * step).sum((1, 2), True), size
        direction = step + size / before.clamp_min(1e-300) * direction
    return torch.linalg.qr(basis.mT)[0].mT


def _raised(moment: Tensor, ridge: float) -> Tensor:
    """A moment whose diagonal is raised by a fraction of the largest
    eigenvalue, or by 1 where the moment is zero."""
    # power iteration: within a few per cent, for less than eigh
    vector = (moment.sum(-1) + moment.diagonal(dim1=-2, dim2=-1)).unsqueeze(-1)
    for _ in range(20):
        size = vector.norm(dim=-2, keepdim=True).clamp_min(1e-300)
        vector = moment @ (vector / size)
    strength = ridge * vector.norm(dim=-2, keepdim=True)
    raised = moment.clone()
    raised.diagonal(dim1=-2, dim2=-1).add_(
        (strength + (strength == 0)).squeeze(-1))
    return raised
