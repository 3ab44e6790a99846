# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch

from mmbasis.factorization import (
    Spectrum,
    spectrum_of_factor,
    spectrum_of_moment,
)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_orthonormal(vectors):
    identity = torch.eye(vectors.shape[-1], dtype=vectors.dtype)
    assert (vectors.mT @ vectors - identity).abs().max() < 1e-10


def projector(vectors):
    return vectors @ vectors.mT


@pytest.mark.parametrize('groups, rows, in_size', [
    (1, 6, 20),
    (1, 20, 6),
    (1, 8, 8),
    (3, 4, 9),
    (3, 9, 4),
    (1, 1, 5),
    (1, 5, 1),
])
def test_spectrum_is_that_of_the_svd(groups, rows, in_size):
    matrix = random(groups, rows, in_size)
    left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    spectrum = spectrum_of_factor(matrix)
    rank = min(rows, in_size)
    assert spectrum.values.shape == (groups, rank)
    assert spectrum.vectors.shape == (groups, rows, rank)
    torch.testing.assert_close(spectrum.values, values**2)
    assert_orthonormal(spectrum.vectors)
    for q in range(1, rank + 1):
        torch.testing.assert_close(
            projector(spectrum.vectors[..., :q]),
            projector(left[..., :q]),
            rtol=0,
            atol=1e-9)


@pytest.mark.parametrize('rows, in_size', [(12, 7), (7, 12)])
@pytest.mark.parametrize('true_rank', [0, 1, 3])
def test_rank_deficient_weights(rows, in_size, true_rank):
    matrix = random(2, rows, true_rank) @ random(2, true_rank, in_size)
    spectrum = spectrum_of_factor(matrix)
    assert_orthonormal(spectrum.vectors)
    assert (spectrum.values >= 0).all()
    largest = max(spectrum.values.max().item(), 1.)
    assert (spectrum.values[:, true_rank:] < 1e-12 * largest).all()
    kept = projector(spectrum.vectors[..., :max(true_rank, 1)]) @ matrix
    torch.testing.assert_close(kept, matrix)


@pytest.mark.parametrize('rows, in_size', [(30, 8), (8, 30)])
def test_weak_directions_stay_exact(rows, in_size):
    """Singular values over eight decades: as trained layers have."""
    left = torch.linalg.qr(random(1, rows, 8))[0][..., :8]
    right = torch.linalg.qr(random(1, in_size, 8, seed=1))[0][..., :8]
    values = 10.**-torch.arange(8, dtype=torch.float64)
    matrix = left * values @ right.mT
    spectrum = spectrum_of_factor(matrix)
    assert_orthonormal(spectrum.vectors)
    for q in (1, 4, 6):
        lost = matrix - projector(spectrum.vectors[..., :q]) @ matrix
        torch.testing.assert_close(
            lost.norm(), values[q:].norm(), rtol=1e-3, atol=0)


def test_float32_weights_are_decomposed_in_double():
    matrix = random(1, 16, 40).float()
    spectrum = spectrum_of_factor(matrix)
    assert spectrum.values.dtype == spectrum.vectors.dtype == torch.float64
    exact = torch.linalg.svdvals(matrix.double())**2
    torch.testing.assert_close(spectrum.values, exact)


def test_vectors_do_not_depend_on_signs_or_run():
    matrix = random(2, 5, 9)
    once, again = spectrum_of_factor(matrix), spectrum_of_factor(-matrix)
    torch.testing.assert_close(once.vectors, again.vectors)


def test_moment_with_rounding_below_zero():
    moment = torch.diag(torch.tensor([3., -1e-9, 1.])).unsqueeze(0)
    spectrum = spectrum_of_moment(moment)
    torch.testing.assert_close(spectrum.values,
                               torch.tensor([[3., 1., 0.]]).double())


# --------------------------------------------------------------- whitened
def correlated_inputs(groups, size, count, seed=0):
    mixing = random(
        groups, size, size, seed=seed) * torch.logspace(
            0, -2, size, dtype=torch.float64)
    return mixing @ random(groups, size, count, seed=seed + 1)


def output_error(outputs, vectors):
    lost = outputs - projector(vectors) @ outputs
    return lost.square().sum((-2, -1)) / outputs.shape[-1]


@pytest.mark.parametrize('groups, rows, in_size', [
    (1, 6, 10),
    (1, 10, 6),
    (2, 4, 7),
    (2, 7, 4),
])
def test_whitened_basis_loses_least_of_the_outputs(groups, rows, in_size):
    inputs = correlated_inputs(groups, in_size, 400)
    matrix = random(groups, rows, in_size, seed=5)
    moment = inputs @ inputs.mT / inputs.shape[-1]
    spectrum = spectrum_of_factor(matrix, moment)
    outputs = matrix @ inputs
    for q in range(1, min(rows, in_size)):
        error = output_error(outputs, spectrum.vectors[..., :q])
        # what is lost is exactly the tail of the eigenvalues …
        torch.testing.assert_close(error, spectrum.values[:, q:].sum(-1))
        # … and no other subspace of that size loses less
        plain = spectrum_of_factor(matrix).vectors[..., :q]
        assert (error <= output_error(outputs, plain) * (1 + 1e-9)).all()
        for seed in range(20):
            other = torch.linalg.qr(random(groups, rows, q, seed=seed))[0]
            assert (error < output_error(outputs, other)).all()


@pytest.mark.parametrize('rows, in_size', [(6, 10), (10, 6)])
def test_both_sides_give_the_same_spectrum(rows, in_size):
    inputs = correlated_inputs(1, in_size, 300)
    matrix = random(1, rows, in_size, seed=9)
    of_input = spectrum_of_factor(matrix, inputs @ inputs.mT)
    outputs = matrix @ inputs
    of_output = spectrum_of_moment(outputs @ outputs.mT)
    rank = min(rows, in_size)
    torch.testing.assert_close(of_input.values, of_output.values[:, :rank])
    torch.testing.assert_close(
        projector(of_input.vectors[..., :3]),
        projector(of_output.vectors[..., :3]))


@pytest.mark.parametrize('rows, in_size', [(9, 6), (5, 6)])
def test_all_directions_hold_the_weights(rows, in_size):
    """Even if the inputs seen were few."""
    inputs = random(1, in_size, 2) @ random(1, 2, 50, seed=1)
    matrix = random(1, rows, in_size, seed=2)
    outputs = matrix @ inputs
    for spectrum in (spectrum_of_factor(matrix, inputs @ inputs.mT),
                     spectrum_of_moment(outputs @ outputs.mT, matrix)):
        assert spectrum.vectors.shape == (1, rows, min(rows, in_size))
        assert_orthonormal(spectrum.vectors)
        torch.testing.assert_close(
            projector(spectrum.vectors) @ matrix, matrix)
        error = output_error(outputs, spectrum.vectors[..., :2])
        assert error.item() < 1e-12


@pytest.mark.parametrize('rows, in_size', [(9, 6), (5, 6)])
def test_singular_input_moment(rows, in_size):
    inputs = random(1, in_size, 2) @ random(1, 2, 50, seed=1)
    matrix = random(1, rows, in_size, seed=2)
    spectrum = spectrum_of_factor(matrix, inputs @ inputs.mT / 50)
    assert_orthonormal(spectrum.vectors)
    error = output_error(matrix @ inputs, spectrum.vectors[..., :2])
    assert error.item() < 1e-12


# ----------------------------------------------------------------- ranks
def spectrum_of(*values):
    values = torch.tensor(values, dtype=torch.float64)
    values = values.view(-1, values.shape[-1])
    return Spectrum(values,
                    torch.eye(values.shape[-1]).expand(len(values), -1, -1))


@pytest.mark.parametrize('threshold, rank', [
    (1e-9, 1),
    (0.5, 1),
    (0.500001, 2),
    (0.75, 2),
    (0.8, 3),
    (0.999, 4),
    (1, 4),
])
def test_rank_is_the_smallest_that_reaches_the_energy(threshold, rank):
    assert spectrum_of(4., 2., 1., 1.).rank_for_energy(threshold) == rank


def test_rank_of_all_energy_leaves_out_what_has_none():
    assert spectrum_of(2., 1., 0., 0.).rank_for_energy(1) == 2


def test_rank_of_no_energy():
    assert spectrum_of(0., 0., 0.).rank_for_energy(0.63) == 1
    assert spectrum_of(5.).rank_for_energy(1) == 1


def test_rank_of_all_energy_in_spite_of_rounding():
    values = torch.rand(500, dtype=torch.float64).sort(descending=True)[0]
    assert spectrum_of(*values.tolist()).rank_for_energy(1) == 500


def test_groups_share_one_rank():
    spectrum = spectrum_of([8., 0., 0.], [1., 1., 0.])
    torch.testing.assert_close(spectrum.energy,
                               torch.tensor([9., 1., 0.]).double())
    assert spectrum.rank_for_energy(0.9) == 1
    assert spectrum.rank_for_energy(0.95) == 2
