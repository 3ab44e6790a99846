# Copyright (c) mmbasis authors. All rights reserved.
"""Bases of inputs, alone and beside those of outputs."""
import pytest
import torch

from mmbasis.factorization import (
    merge,
    narrow,
    reduced_rank_regression,
    spectrum_of_input,
    two_sided_regression,
    widen,
)

G, P, C, K, R, Q = 2, 10, 6, 9, 3, 4


def random(*shape):
    return torch.randn(G, *shape, dtype=torch.float64)


def moment(size):
    x = random(size, 3 * size)
    return x @ x.mT / x.shape[-1]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def lost(matrix, found, second, weight):
    error = matrix - found
    return float(torch.einsum('gpq,gqd,gde,gpe->', weight, error, second,
                              error))


@pytest.mark.parametrize('given', [False, True])
def test_all_directions_lose_nothing(given):
    matrix = random(P, C * K)
    spectrum = spectrum_of_input(matrix, C, *[moment(C), moment(C)] * given)
    basis, layer = narrow(matrix, spectrum, C)
    torch.testing.assert_close(merge(basis, layer), matrix)
    assert float(spectrum.shares.sum()) == pytest.approx(1)


@pytest.mark.parametrize('rank', range(1, C))
def test_values_are_what_is_lost(rank):
    """Where the places in the kernel are independent, exactly: dropping
    directions loses the sum of their values."""
    matrix, covariance, weight = random(P, C * K), moment(C), moment(P)
    blocks = matrix.unflatten(-1, (C, K))
    gradient = torch.einsum('gpck,gpq,gqdk->gcd', blocks, weight, blocks)
    spectrum = spectrum_of_input(matrix, C, covariance, gradient)
    second = torch.einsum('gcd,kl->gckdl', covariance,
                          torch.eye(K).double()).flatten(1, 2).flatten(2)
    basis, layer = narrow(matrix, spectrum, rank)
    found = lost(matrix, merge(basis, layer), second, weight)
    assert found == pytest.approx(float(spectrum.values[:, rank:].sum()))
    other = torch.linalg.qr(random(C, rank))[0].mT
    best = torch.linalg.solve(
        torch.einsum('grc,gcd,gsd->grs', other, covariance, other),
        torch.einsum('grc,gcd->grd', other, covariance))
    others = widen(widen(matrix, best.mT), other)
    assert found <= lost(matrix, others, second, weight)


def test_two_sided_regression_finds_two_sided_layers():
    """A layer of these ranks is found again, and V has orthonormal rows."""
    front = torch.linalg.qr(random(C, R))[0].mT
    matrix = merge(front, random(Q, R * K), random(P, Q))
    second = moment(C * K)
    start, _ = narrow(matrix, spectrum_of_input(matrix, C), R)
    coefficients, basis, _, found = two_sided_regression(
        torch.zeros_like(matrix), second, matrix, start, Q, ridge=1e-12)
    torch.testing.assert_close(merge(found, basis, coefficients), matrix)
    eye = torch.eye(R).double().expand(G, -1, -1)
    torch.testing.assert_close(found @ found.mT, eye)


def test_rounds_never_lose_more():
    matrix, second, weight = random(P, C * K), moment(C * K), moment(P)
    start, _ = narrow(matrix, spectrum_of_input(matrix, C), R)
    losses = []
    for rounds in (0, 1, 2, 5):
        w, basis, _, front = two_sided_regression(
            torch.zeros_like(matrix), second, matrix, start, Q, weight,
            rounds=rounds)
        losses.append(lost(matrix, merge(front, basis, w), second, weight))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < .99 * losses[0]


def test_a_round_is_nearly_as_good_as_the_best_basis():
    """As that which solves all the equations, for the layer of before."""
    matrix, second, weight = random(P, C * K), moment(C * K), moment(P)
    start, _ = narrow(matrix, spectrum_of_input(matrix, C), R)

    def fit(basis, rounds):
        w, layer, _, front = two_sided_regression(
            torch.zeros_like(matrix), second, matrix, basis, None, weight,
            rounds=rounds)
        return w @ layer, front, lost(matrix, merge(front, layer, w), second,
                                      weight)

    layer, _, before = fit(start, 0)
    right = torch.linalg.cholesky(second)
    left = torch.linalg.cholesky(weight).mT
    best = []
    for g in range(G):
        columns = torch.stack([
            (left[g] @ merge(x[None], layer[g:g + 1])[0] @ right[g]).flatten()
            for x in torch.eye(R * C).double().view(-1, R, C)], 1)
        wanted = (left[g] @ matrix[g] @ right[g]).flatten()
        best.append(torch.linalg.lstsq(columns, wanted).solution.view(R, C))
    basis = torch.linalg.qr(torch.stack(best).mT)[0].mT
    least = fit(basis, 0)[2]
    assert least < .99 * before
    assert fit(start, 1)[2] - least < .05 * (before - least)


def test_without_input_basis_it_is_the_one_sided_regression():
    cross, second, prior = random(P, C * K), moment(C * K), random(P, C * K)
    weight = moment(P)
    w, basis, explained = reduced_rank_regression(cross, second, prior, Q,
                                                  weight)
    eye = torch.eye(C).double().expand(G, -1, -1)
    two = two_sided_regression(cross, second, prior, eye, Q, weight, rounds=0)
    torch.testing.assert_close(two[0] @ two[1], w @ basis, rtol=1e-3,
                               atol=1e-3)
    torch.testing.assert_close(two[2], explained)
