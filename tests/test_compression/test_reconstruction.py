# Copyright (c) mmbasis authors. All rights reserved.
import copy

import pytest
import torch
import torch.nn as nn

import mmbasis
from mmbasis.compression import basis_layers
from mmbasis.factorization import reduced_rank_regression


class Residual(nn.Module):
    """Branches, a shared layer, an expansion, groups, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.left = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.shared = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.expand = nn.Conv2d(16, 48, 1, stride=2)
        self.fc = nn.Linear(48, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = x + self.left(x).relu()
        x = x + self.shared(self.shared(x).relu())
        return self.fc(self.expand(x).relu().mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Residual().eval()
    nn.init.uniform_(model.bn.running_var, .5, 2)
    # correlated channels, as those of trained networks are
    for layer in (model.stem, model.left, model.shared, model.expand):
        weight = layer.weight.data.flatten(1)
        mix = torch.randn(len(weight), 4) @ torch.randn(4, len(weight))
        layer.weight.data += .3 * (mix @ weight).view_as(layer.weight)
    return model


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 12, 12) for _ in range(3)]


def error(model, reference, x):
    """Of the outputs, relative to their deviation from the mean."""
    with torch.no_grad():
        y, target = model(x), reference(x)
    return float((y - target).norm() / (target - target.mean(0)).norm())


def compressed(model, batches, reconstruction, ranks, **planner):
    model = copy.deepcopy(model)
    mmbasis.compress(
        model,
        dict(type='FixedPlanner', ranks=ranks, **planner),
        batches,
        reconstruction=reconstruction)
    return model


RANKS = dict(stem=5, left=3, shared=6, expand=7)


def test_makes_up_for_earlier_layers(model, batches):
    """On images that were not seen, the sequential fit is nearer to the dense
    outputs than the local one."""
    torch.manual_seed(2)
    unseen = torch.randn(32, 3, 12, 12)
    errors = [
        error(compressed(model, batches, way, RANKS), model, unseen)
        for way in ('local', 'sequential')
    ]
    assert errors[1] < .8 * errors[0]


def test_full_rank_is_the_dense_model(model, batches):
    ranks = {'.*': 'full'}
    full = compressed(
        model,
        batches,
        'sequential',
        ranks,
        allow_dearer=True,
        prediction_layers=True)
    assert len(dict(basis_layers(full))) == 5
    assert error(full, model, batches[0]) < 1e-4


def test_bases_are_orthonormal(model, batches):
    result = compressed(model, batches, 'sequential', RANKS)
    assert max(x.orthogonality_error for _, x in basis_layers(result)) < 1e-5


def test_how_images_are_batched_does_not_matter(model, batches):
    split = [half for x in batches for half in x.chunk(2)]
    a, b = (
        compressed(model, data, 'sequential', RANKS)
        for data in (batches, split))
    torch.testing.assert_close(
        a(batches[0]), b(batches[0]), rtol=1e-3, atol=1e-4)


def test_first_layer_is_the_best_projection(model, batches):
    """Nothing has changed before the first layer: there sequential is
    local."""
    ranks = dict(stem=5)
    a, b = (
        compressed(model, batches, way, ranks)
        for way in ('local', 'sequential'))
    torch.testing.assert_close(
        a.stem(batches[0]), b.stem(batches[0]), rtol=1e-3, atol=1e-4)


def test_shared_layer_stays_shared_and_local(model, batches):
    a, b = (
        compressed(model, batches, way, RANKS)
        for way in ('local', 'sequential'))
    torch.testing.assert_close(a.shared.basis.weight, b.shared.basis.weight)


def test_kept_layers_make_up_too_but_not_excluded_ones(model, batches):
    """A prediction layer is fitted at full rank; what the user excluded, or
    froze, is left alone."""
    result = compressed(model, batches, 'sequential', dict(stem=4, left=2))
    torch.testing.assert_close(result.expand.weight, model.expand.weight)

    class Classifier(nn.Module):

        def __init__(self):
            super().__init__()
            self.head = nn.ModuleDict(dict(fc=model.fc))
            self.backbone = model.stem

        def forward(self, x):
            return self.head['fc'](
                self.backbone(x).relu().mean((2, 3)).repeat(1, 3))

    for frozen in (False, True):
        net = Classifier()
        net.head['fc'].requires_grad_(not frozen)
        small = compressed(net, batches, 'sequential', {'backbone': 4})
        changed = not torch.equal(small.head['fc'].weight, model.fc.weight)
        assert changed is not frozen


def test_unrelated_passes_are_not_regressed(batches):
    """Where the layer sees other things in the two passes (here: noise, as
    with proposals that differ), it keeps its local basis."""

    class Noisy(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 12, 3)

        def forward(self, x):
            return self.conv(torch.randn_like(x))

    torch.manual_seed(0)
    model = Noisy()
    rng = torch.get_rng_state()
    a = compressed(model, batches, 'local', dict(conv=4))
    torch.set_rng_state(rng)
    b = compressed(model, batches, 'sequential', dict(conv=4))
    torch.testing.assert_close(a.conv.basis.weight, b.conv.basis.weight)


def test_errors_in_a_pass_surface(model, batches):
    with pytest.raises(RuntimeError, match='channels'):
        compressed(model, batches + [torch.randn(1, 4, 12, 12)], 'sequential',
                   RANKS)


def test_unknown_way(model, batches):
    with pytest.raises(ValueError, match="'local' or 'sequential'"):
        compressed(model, batches, 'global', RANKS)


def test_regression_against_brute_force():
    """At full rank the ridge solution; at lower rank nothing of that rank
    predicts better on the same samples."""
    torch.manual_seed(0)
    r = torch.randn(400, 6).double()
    y = r @ torch.randn(6, 9).double() + .1 * torch.randn(400, 9).double()
    prior = torch.randn(9, 6).double()
    cross = (y - r @ prior.T).T @ r / 400
    second = r.T @ r / 400
    vectors, projected, explained = reduced_rank_regression(
        cross[None], second[None], prior[None], ridge=1e-12)
    best = torch.linalg.lstsq(r, y).solution.T
    torch.testing.assert_close((vectors @ projected)[0], best)
    change = (y - r @ prior.T).square().sum() / 400
    left = (y - r @ best.T).square().sum() / 400
    torch.testing.assert_close(change - explained, left)

    vectors, projected, _ = reduced_rank_regression(
        cross[None], second[None], prior[None], 3, ridge=1e-12)
    mapping = (vectors @ projected)[0]
    error = (y - r @ mapping.T).square().sum()
    for _ in range(20):
        other = mapping + .01 * torch.randn_like(mapping)
        u, s, v = torch.linalg.svd(other)
        other = u[:, :3] * s[:3] @ v[:3]
        assert (y - r @ other.T).square().sum() > error
