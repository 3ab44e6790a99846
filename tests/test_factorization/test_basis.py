# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch

from mmbasis.factorization import (
    factorize,
    merge,
    orthogonality_error,
    orthogonality_penalty,
    orthonormalize,
    spectrum_of_factor,
)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthonormal_rows(*shape, seed=0):
    return torch.linalg.qr(random(*shape, seed=seed).mT)[0].mT


@pytest.mark.parametrize('groups, rows, in_size, rank', [
    (1, 6, 20, 3),
    (1, 6, 20, 6),
    (1, 20, 6, 6),
    (3, 5, 4, 2),
    (1, 4, 9, 1),
])
def test_factors_are_the_projection(groups, rows, in_size, rank):
    matrix = random(groups, rows, in_size)
    # any subspace, not only that of the SVD
    vectors = torch.linalg.qr(random(groups, rows, rank, seed=1))[0]
    basis, coefficients = factorize(matrix, vectors)
    assert basis.shape == (groups, rank, in_size)
    assert coefficients.shape == (groups, rows, rank)
    assert orthogonality_error(basis) < 1e-12
    torch.testing.assert_close(
        merge(basis, coefficients), vectors @ vectors.mT @ matrix)


@pytest.mark.parametrize('rows, in_size', [(6, 20), (20, 6)])
def test_singular_vectors_give_the_truncated_svd(rows, in_size):
    matrix = random(2, rows, in_size)
    vectors = spectrum_of_factor(matrix).vectors[..., :4]
    values = torch.linalg.svdvals(matrix)
    lost = matrix - merge(*factorize(matrix, vectors))
    torch.testing.assert_close(lost.square().sum((-2, -1)),
                               values[:, 4:].square().sum(-1))


def test_full_rank_loses_nothing():
    matrix = random(2, 7, 5)
    vectors = spectrum_of_factor(matrix).vectors
    torch.testing.assert_close(merge(*factorize(matrix, vectors)), matrix)


def test_rank_deficient_weights_have_an_orthonormal_basis():
    matrix = random(1, 6, 2) @ random(1, 2, 9)
    vectors = torch.linalg.qr(random(1, 6, 4))[0]
    basis, coefficients = factorize(matrix, vectors)
    assert orthogonality_error(basis) < 1e-12
    torch.testing.assert_close(
        merge(basis, coefficients), vectors @ vectors.mT @ matrix)


def test_float32_weights_do_not_lose_precision():
    matrix = random(1, 8, 30).float()
    vectors = spectrum_of_factor(matrix).vectors
    basis, coefficients = factorize(matrix, vectors)
    assert basis.dtype == coefficients.dtype == torch.float64
    torch.testing.assert_close(merge(basis, coefficients), matrix.double())


# --------------------------------------------------------- orthogonality
def test_penalty_is_zero_for_orthonormal_rows_alone():
    basis = orthonormal_rows(2, 4, 10)
    assert orthogonality_penalty(basis) < 1e-24
    assert orthogonality_error(basis) < 1e-12
    for change in (basis * 1.1, basis + 0.1 * random(2, 4, 10),
                   torch.cat([basis[:, :2], basis[:, :2]], 1)):
        assert orthogonality_penalty(change) > 1e-2
        assert orthogonality_error(change) > 1e-2


def test_penalty_in_numbers():
    basis = torch.tensor([[[2., 0., 0.], [1., 1., 0.]]])
    # F F^T - I = [[3, 2], [2, 1]]
    assert orthogonality_penalty(basis).item() == pytest.approx(18)
    assert orthogonality_error(basis).item() == pytest.approx(3)
    stacked = torch.cat([basis, torch.eye(3)[None, :2]])
    assert orthogonality_penalty(stacked).item() == pytest.approx(18)


def test_gradient_of_the_penalty():
    basis = random(2, 3, 7).requires_grad_()
    penalty = orthogonality_penalty(basis)
    penalty.backward()
    identity = torch.eye(3, dtype=basis.dtype)
    expected = 4 * (basis @ basis.mT - identity) @ basis
    torch.testing.assert_close(basis.grad, expected.detach())
    assert basis.grad.abs().max() > 0.1


def test_descent_along_the_gradient_makes_rows_orthonormal():
    basis = (orthonormal_rows(1, 4, 9) +
             0.2 * random(1, 4, 9, seed=1)).requires_grad_()
    for _ in range(300):
        grad, = torch.autograd.grad(orthogonality_penalty(basis), basis)
        basis = (basis - 0.05 * grad).detach().requires_grad_()
    assert orthogonality_error(basis) < 1e-6


# ------------------------------------------------------------ retraction
@pytest.mark.parametrize('groups, rank, in_size', [(1, 3, 8), (2, 5, 5)])
def test_retraction_keeps_the_product(groups, rank, in_size):
    basis = random(groups, rank, in_size)
    coefficients = random(groups, 6, rank, seed=1)
    new_basis, new_coefficients = orthonormalize(basis, coefficients)
    assert orthogonality_error(new_basis) < 1e-12
    torch.testing.assert_close(
        merge(new_basis, new_coefficients), merge(basis, coefficients))


def test_retraction_leaves_an_orthonormal_basis():
    basis = orthonormal_rows(2, 4, 9)
    coefficients = random(2, 6, 4)
    new_basis, new_coefficients = orthonormalize(basis, coefficients)
    torch.testing.assert_close(new_basis, basis)
    torch.testing.assert_close(new_coefficients, coefficients)


def test_retraction_of_dependent_rows():
    row = random(1, 1, 6)
    basis = torch.cat([row, row, torch.zeros(1, 1, 6)], 1).double()
    coefficients = random(1, 4, 3)
    new_basis, new_coefficients = orthonormalize(basis, coefficients)
    assert orthogonality_error(new_basis) < 1e-12
    torch.testing.assert_close(
        merge(new_basis, new_coefficients), merge(basis, coefficients))
