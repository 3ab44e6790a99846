# Copyright (c) mmbasis authors. All rights reserved.
import copy
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.nn as nn
from mmcv.ops import DeformConv2d

import mmbasis
from mmbasis.compression import (
    Recipe,
    basis_layers,
    layer_regression,
    pipeline,
)
from mmbasis.factorization import reduced_rank_regression
from mmbasis.planning import (
    FixedPlanner,
    LayerStatistics,
    Ranks,
    find_layers,
    samples,
)
from mmbasis.running import SumWatch, adapter_of


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


class Given(FixedPlanner):
    """Gives layers ranks of any form, whatever they cost."""
    forms = ('output', 'input', 'both', 'spatial')

    def __init__(self, ranks):
        super().__init__(dict.fromkeys(ranks, 'full'), allow_costlier=True)
        self.given = ranks

    def choose(self, free, decided):
        return [self.given[x.layer.name] for x in free]


def compressed(model, batches, reconstruction, ranks, **planner):
    """Ranks by layer, those of the output form by pattern, too; or a form for
    0.4 of the MACs."""
    model = copy.deepcopy(model)
    if isinstance(ranks, str):
        planner = dict(
            type='BudgetPlanner', macs=.4, loss_aware=False, forms=[ranks])
    elif any(isinstance(x, Ranks) for x in ranks.values()):
        planner = Given(ranks)
    else:
        planner = dict(type='FixedPlanner', ranks=ranks, **planner)
    plan = mmbasis.compress(
        model, planner, batches, reconstruction=reconstruction)
    if isinstance(ranks, str):
        assert {x.form for x in plan.layers.values()} == {ranks}
    elif isinstance(planner, Given):
        assert {name: x.ranks for name, x in plan.layers.items()} == {
            name: Ranks.of(x) for name, x in ranks.items()}
    return model


RANKS = dict(stem=5, left=3, shared=6, expand=7)
every_form = pytest.mark.parametrize(
    'ranks', [RANKS, 'input', 'both', 'spatial'],
    ids=['output', 'input', 'both', 'spatial'])


@every_form
def test_makes_up_for_earlier_layers(model, batches, ranks):
    """On images that were not seen, the sequential fit is nearer to the dense
    outputs than the local one."""
    torch.manual_seed(2)
    unseen = torch.randn(32, 3, 12, 12)
    errors = [
        error(compressed(model, batches, way, ranks), model, unseen)
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
        allow_costlier=True,
        prediction_layers=True)
    assert len(dict(basis_layers(full))) == 5
    assert error(full, model, batches[0]) < 1e-4


@every_form
def test_bases_are_orthonormal(model, batches, ranks):
    result = compressed(model, batches, 'sequential', ranks)
    assert max(x.orthogonality_error for _, x in basis_layers(result)) < 1e-5


@every_form
def test_how_images_are_batched_does_not_matter(model, batches, ranks):
    split = [half for x in batches for half in x.chunk(2)]
    a, b = (
        compressed(model, data, 'sequential', ranks)
        for data in (batches, split))
    torch.testing.assert_close(
        a(batches[0]), b(batches[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('form', ['input', 'spatial'])
@pytest.mark.parametrize('least', [40, 1e9], ids=['weights', 'outputs'])
def test_few_samples_fit_what_is_behind_the_front(model, batches, form, least,
                                                  monkeypatch):
    """All weights of the part behind, or combinations of its outputs alone:
    nearer than the local fit, and the front stays."""
    torch.manual_seed(2)
    unseen = torch.randn(32, 3, 12, 12)
    monkeypatch.setattr(layer_regression, 'SAMPLES_PER_WEIGHT', least)
    monkeypatch.setattr(samples, 'is_expansion', lambda layer: False)
    local, sequential = (compressed(model, batches, way, form)
                         for way in ('local', 'sequential'))
    assert error(sequential, model, unseen) < .95 * error(local, model, unseen)
    if least > 1e3:  # those of few weights see enough
        for (_, a), (_, b) in zip(basis_layers(local),
                                  basis_layers(sequential)):
            torch.testing.assert_close(a.factors[0], b.factors[0])


def test_first_layer_is_the_best_projection(model, batches):
    """Nothing has changed before the first layer: there sequential is
    local."""
    ranks = dict(stem=5)
    a, b = (
        compressed(model, batches, way, ranks)
        for way in ('local', 'sequential'))
    torch.testing.assert_close(
        a.stem(batches[0]), b.stem(batches[0]), rtol=1e-3, atol=1e-4)


def test_shared_layer_is_fitted_to_all_its_calls(model, batches):
    """A layer that runs twice makes up for those before it, too, in one
    module."""
    errors = []
    for way in ('local', 'sequential'):
        result = compressed(model, batches, way, dict(stem=5, shared=14))
        outputs = {}
        for name, net in (('dense', model), ('small', result)):
            found = outputs[name] = []
            handle = net.shared.register_forward_hook(
                lambda _, args, y, found=found: found.append(y))
            with torch.no_grad():
                net(batches[0])
            handle.remove()
        assert len(outputs['small']) == 2
        errors.append(
            sum((a - b).square().sum()
                for a, b in zip(outputs['small'], outputs['dense'])))
    assert errors[1] < .8 * errors[0]


def test_kept_layers_make_up_too_but_not_excluded_ones(model, batches):
    """A prediction layer is fitted at full rank, frozen or not; what the user
    excluded is left alone."""
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
        assert not torch.equal(small.head['fc'].weight, model.fc.weight)
        assert small.head['fc'].weight.requires_grad is not frozen


class LeftHalf(nn.Module):
    """Makes use of the left half of a map; on the right other channels have
    more energy."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(self.conv(x)[..., :5].relu().mean((2, 3)))


class WithLoss(Given):
    """Gives ranks, and knows the loss."""
    loss_aware = True


@pytest.fixture
def with_importance(monkeypatch):
    """Compress a copy of a model with a changed importance of samples."""
    analyze = pipeline.analyze

    def compress(model, ranks, batches, change):
        recipe = Recipe.of(planner=WithLoss(ranks))
        analysis = analyze(model, recipe, batches)
        analysis = replace(analysis, statistics={
            name: replace(x, importance=change(x.importance))
            for name, x in analysis.statistics.items()})
        monkeypatch.setattr(pipeline, 'analyze', lambda *_: analysis)
        basis = copy.deepcopy(model)
        pipeline.run_recipe(basis, recipe, batches, [])
        return basis

    return compress


def keep(importance):
    return importance


def forget(importance):
    return ()


@pytest.mark.parametrize('ranks', [
    Ranks(2), Ranks(None, 1), Ranks(2, 1), Ranks(2, None, True)
], ids=['output', 'input', 'both', 'spatial'])
def test_what_matters_is_fitted(ranks, with_importance, monkeypatch):
    """Errors at samples that the loss does not feel hardly count."""
    monkeypatch.setattr(layer_regression, 'MIN_IMPORTANCE', 1e-3)
    torch.manual_seed(0)
    model = LeftHalf().eval()
    batches = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    for x in batches:
        x[:, 2, :, :5] *= .2
        x[:, :2, :, 5:] *= .2
        x[:, 2, :, 5:] *= 5
    errors = {}
    for change in (keep, forget):
        basis = with_importance(model, dict(conv=ranks), batches, change)
        with torch.no_grad():
            errors[change] = sum(
                (basis.conv(x) - model.conv(x))[..., :5].square().sum()
                for x in batches)
    assert errors[keep] < .95 * errors[forget]


@torch.no_grad()
def test_importance_weighs_squares():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(400, 3)
    wanted = torch.randn(400, 2) + x[:, :2].abs() + 3 * model(x).detach()
    importance = torch.rand(400).double()
    layer, = find_layers(model)
    parts = [(importance[part], x[part], wanted[part].T[None])
             for part in (slice(0, 150), slice(150, 400))]
    regression = layer_regression.LayerRegression(
        layer, LayerStatistics(), [x[2] for x in parts])
    for part in parts:
        regression.add(*part)
    (basis, coefficients), bias = regression.solve(None, True)
    root = (importance + layer_regression.MIN_IMPORTANCE).sqrt()[:, None]
    regressors = torch.cat([x, torch.ones(400, 1)], 1).double()
    expected = torch.linalg.lstsq(
        regressors * root, wanted.double() * root).solution.T
    found = torch.cat([coefficients[0] @ basis[0], bias[:, None]], 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_importance_of_other_samples_does_not_count(model, batches,
                                                    with_importance):
    """As of other proposals in training than in testing."""
    ranks = dict(stem=5, shared=6, expand=7)
    found, none, other = (
        torch.cat([x.flatten() for x in with_importance(
            model, ranks, batches, change).state_dict().values()])
        for change in (keep, forget, lambda known: tuple(
            x[1:] for x in known)))
    assert torch.equal(other, none)
    assert not torch.allclose(found, none, rtol=1e-3)


class Block(nn.Module):
    """A stem and two residual blocks, as in a ResNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 24, 3, padding=1, bias=False)
        self.down = nn.Conv2d(16, 24, 1, bias=False)
        self.conv4 = nn.Conv2d(24, 24, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        out = self.bn2(self.conv2(self.conv1(x).relu()))
        out += x
        x = out.relu()
        x = self.conv3(x) + self.down(x)
        y = self.conv4(x)
        z = y.relu()
        return torch.cat([x + y, z], 1)


def test_finds_layers_that_end_in_a_sum():
    """Through a normalisation, in place or not; of two that meet, the one that
    runs last; none whose output is used elsewhere."""
    watch, model = SumWatch(), Block().eval()
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    }
    with torch.no_grad():
        watch.probe(adapter_of(model), layers, torch.randn(2, 3, 8, 8))
    assert watch.residual == {'conv2', 'down'}
    assert watch.order == list(layers)


@pytest.mark.parametrize('conv2', [
    10, Ranks(None, 10), Ranks(12, 12), Ranks(18, None, True)],
                         ids=['output', 'input', 'both', 'spatial'])
def test_last_layer_of_a_block_makes_up_for_the_shortcut(batches, conv2):
    """The sum is nearer to the dense one than where the branch alone is fitted
    to its own target."""
    torch.manual_seed(0)
    model = Block().eval()
    nn.init.uniform_(model.bn2.running_var, .5, 2)
    nn.init.normal_(model.bn2.weight)
    torch.manual_seed(2)
    unseen = torch.randn(32, 3, 12, 12)
    errors = []
    for blind in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if blind:
                patch.setattr(SumWatch, '_at_sum', lambda *_: None)
            small = compressed(model, batches, 'sequential',
                               dict(stem=6, conv2=conv2))
        sums = []
        for net in (model, small):
            net.conv3.register_forward_pre_hook(
                lambda _, args, sums=sums: sums.append(args[0]))
            with torch.no_grad():
                net(unseen)
        errors.append((sums[-1] - sums[-2]).norm())
    assert errors[1] < .9 * errors[0]


@pytest.mark.parametrize(
    'ranks', [dict(stem=6, conv2=10, down=8), 'input', 'both', 'spatial'],
    ids=['output', 'input', 'both', 'spatial'])
def test_passes_go_on_as_before(batches, ranks):
    """A stopped and patched pass returns what the fitted model returns."""
    torch.manual_seed(0)
    model = Block().eval()
    outputs = []

    class Recorded(Block):

        def forward(self, x):
            y = super().forward(x)
            outputs.append(y)
            return y

    model.__class__ = Recorded
    small = compressed(model, batches, 'sequential', ranks)
    last = outputs[-2 * len(batches):][1::2]
    with torch.no_grad():
        for x, y in zip(batches, last):
            torch.testing.assert_close(small(x), y, rtol=1e-4, atol=1e-5)


def test_unrelated_passes_are_not_regressed(batches):
    """Where the layer sees other things in the two passes (here: noise that
    no generator of ours controls), it keeps its local basis."""

    class Noisy(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 12, 3)

        def forward(self, x):
            Noisy.calls += 1
            noise = torch.Generator().manual_seed(Noisy.calls)
            return self.conv(torch.randn(x.shape, generator=noise))

    torch.manual_seed(0)
    model = Noisy()
    Noisy.calls = 0
    a = compressed(model, batches, 'local', dict(conv=4))
    Noisy.calls = 0
    b = compressed(model, batches, 'sequential', dict(conv=4))
    torch.testing.assert_close(a.conv.basis.weight, b.conv.basis.weight)


def test_errors_in_a_pass_surface(model, batches):
    with pytest.raises(RuntimeError, match='channels'):
        compressed(model, batches + [torch.randn(1, 4, 12, 12)], 'sequential',
                   RANKS)


def test_passes_that_are_left_end(model, batches):
    """When a batch fails, the others stand in the middle of the model."""
    before = threading.active_count()
    with pytest.raises(RuntimeError, match='channels'):
        compressed(model, batches + [torch.randn(1, 4, 12, 12)], 'sequential',
                   RANKS)
    assert threading.active_count() == before


def test_states_stay_those_of_a_pass(batches):
    """A pass that stops where gradients are switched on leaves the others, and
    who called, as they were."""
    seen = []

    class Switching(Block):

        def forward(self, x):
            seen.append(torch.is_grad_enabled())
            with torch.enable_grad():
                return super().forward(x)

    torch.manual_seed(0)
    model = Switching().eval()
    with torch.no_grad():
        compressed(model, batches, 'sequential', dict(stem=6, conv2=10))
        assert not torch.is_grad_enabled()
    # of the dense and of the compressed model
    assert seen[-2 * len(batches):] == [False] * (2 * len(batches))


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
    coefficients, basis, explained = reduced_rank_regression(
        cross[None], second[None], prior[None], ridge=1e-12)
    best = torch.linalg.lstsq(r, y).solution.T
    torch.testing.assert_close((coefficients @ basis)[0], best)
    change = (y - r @ prior.T).square().sum() / 400
    left = (y - r @ best.T).square().sum() / 400
    torch.testing.assert_close(change - explained, left)

    factor = torch.randn(9, 9).double()
    for weight in (torch.eye(9).double(), factor @ factor.T):
        coefficients, basis, _ = reduced_rank_regression(
            cross[None], second[None], prior[None], 3, weight[None], 1e-12)
        mapping = (coefficients @ basis)[0]

        metric = weight + 1e-3 * torch.linalg.norm(weight, 2) * torch.eye(9)

        def error(m, metric=metric):
            e = y - r @ m.T
            return (e @ metric * e).sum()

        for _ in range(20):
            u, s, v = torch.linalg.svd(mapping + .01 * torch.randn(9, 6))
            assert error(u[:, :3] * s[:3] @ v[:3]) > error(mapping)


class Offset(nn.Module):
    """A deformable convolution whose offsets another layer makes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.offset = nn.Conv2d(16, 18, 3, padding=1)
        self.deform = DeformConv2d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.deform(x, self.offset(x))


def test_layer_of_two_inputs_is_left_as_it_was(batches):
    torch.manual_seed(0)
    model = Offset().eval()
    ranks = dict(stem=5, deform=6)
    local = compressed(model, batches, 'local', ranks)
    sequential = compressed(model, batches, 'sequential', ranks)
    torch.testing.assert_close(sequential.deform.weight, local.deform.weight)
    assert not torch.equal(sequential.stem.weight, local.stem.weight)


class Sometimes(nn.Module):
    """A residual layer and a plain one that run on bright images only."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.plain = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        y = self.stem(x)
        if x.mean() > 0:
            y = self.plain((y + self.branch(y)).relu())
        return self.last(y.relu()).mean((2, 3))


SOMETIMES = dict(stem=9, branch=5, plain=5, last=8)


def compress_sometimes(rank, world, path, ranks, bright=0):
    """Compress with all batches, or as one of several processes."""
    torch.manual_seed(0)
    model = Sometimes().eval()
    images = torch.rand(2, 32, 3, 12, 12) * torch.tensor(
        [1., -1.]).view(2, 1, 1, 1, 1)
    if world > 1:
        torch.distributed.init_process_group(
            'gloo', f'file://{path}.store', rank=rank, world_size=world,
            timeout=timedelta(seconds=60))
    batches = [*images] if world == 1 else [images[rank ^ bright]]
    small = compressed(model, batches, 'sequential', ranks)
    weights = {name: getattr(small, name).weight for name in ranks}
    torch.save((small.state_dict(), weights), f'{path}.{world}.{rank}')


@pytest.mark.parametrize('ranks, bright', [
    (SOMETIMES, 0),
    (SOMETIMES, 1),
    (dict(SOMETIMES, branch=Ranks(9, 9), plain=Ranks(None, 9)), 1),
])
def test_processes_fit_layers_that_only_one_of_them_runs(
        tmp_path, ranks, bright):
    path = tmp_path / 'small'
    compress_sometimes(0, 1, path, ranks)
    torch.multiprocessing.spawn(
        compress_sometimes, (2, path, ranks, bright), nprocs=2)
    one, first, second = (
        torch.load(f'{path}.{end}', weights_only=True)
        for end in ('1.0', '2.0', '2.1'))
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=1e-6)
    for name in ('branch', 'plain'):
        torch.testing.assert_close(
            one[1][name], first[1][name], rtol=1e-2, atol=1e-3)
