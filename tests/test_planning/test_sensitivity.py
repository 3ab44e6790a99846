# Copyright (c) mmbasis authors. All rights reserved.
import copy
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmpretrain.models.backbones import ResNet
from torch.utils.checkpoint import checkpoint

from mmbasis.compression import compress
from mmbasis.planning import BudgetPlanner
from mmbasis.running import UnknownLossError
from mmbasis.running.adapter import sampled_labels
from tests.analyses import measured, ranks
from tests.toy import ToyNet


class Classifier(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))


class Last(nn.Module):
    """Logits of the last of several maps."""

    def forward(self, maps):
        return maps[-1].mean((2, 3))


def analyzed(model, batches):
    return measured(model, batches, loss=True).statistics


def test_against_gradients_computed_directly():
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(16, 3, 6, 6)
    layer = analyzed(model, [x])['conv']
    y = model.conv(x).detach().requires_grad_()
    logits = model.fc(y.mean((2, 3)))
    loss = F.cross_entropy(logits, sampled_labels(logits, 0), reduction='sum')
    gradient, = torch.autograd.grad(loss, y)
    along = torch.einsum('pr,npxy->nrxy', layer.spectrum.vectors[0].float(),
                         gradient)
    # summed over the positions of an image
    expected = layer.spectrum.energy * along.square().sum((2, 3)).mean(0)
    torch.testing.assert_close(
        layer.sensitivity, expected.double(), rtol=1e-4, atol=1e-12)


def test_importance_against_gradients_computed_directly():
    """Of every sample, in units of the image's mean."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(4, 5))
    batches = [torch.randn(n, 3, 8, 8) for n in (4, 3)]
    found = analyzed(model, batches)['0'].importance
    assert [len(x) for x in found] == [4 * 36, 3 * 36]
    for index, x in enumerate(batches):
        y = model[0](x).detach().requires_grad_()
        logits = model[1:](y)
        loss = F.cross_entropy(
            logits, sampled_labels(logits, index), reduction='sum')
        norms = torch.autograd.grad(loss, y)[0].norm(dim=1).flatten(1)
        expected = (norms / norms.mean(1, True)).flatten().double()
        torch.testing.assert_close(found[index], expected, rtol=1e-4,
                                   atol=1e-6)


class Twice(nn.Module):
    """A layer that runs on a large and then on a small map, maybe recomputed
    in the backward pass: then the small map comes first."""

    def __init__(self, recomputed):
        super().__init__()
        self.recomputed = recomputed
        self.conv = nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 5)

    def part(self, x):
        return self.conv(x).relu().mean((2, 3))

    def forward(self, x):
        run = self.part
        if self.recomputed:
            run = partial(checkpoint, self.part, use_reentrant=True)
        return self.fc(run(x) + run(x[..., ::2, ::2]))


@pytest.mark.parametrize('recomputed', [False, True])
def test_importance_is_in_the_order_of_calls_or_unknown(recomputed):
    torch.manual_seed(0)
    found = analyzed(Twice(recomputed), [torch.randn(2, 3, 10, 10)])['conv']
    assert found.sensitivity is not None
    assert [len(x) for x in found.importance] == (
        [] if recomputed else [2 * 64, 2 * 9])


def test_vanishing_gradients():
    """They are right where their squares are no float32 numbers."""
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(16, 3, 6, 6)
    model.fc.bias.data.zero_()
    model.fc.weight.data *= 1e-7
    expected = analyzed(model, [x])['conv'].gradient
    model.fc.weight.data *= 1e-15
    gradient = analyzed(model, [x])['conv'].gradient
    assert 0 < gradient.max() < 1e-45
    torch.testing.assert_close(
        gradient * 1e30, expected, rtol=1e-4, atol=1e-4 * expected.max())


def test_unused_direction_costs_nothing():
    """Channels that the loss does not depend on are worth nothing, whatever
    their energy."""
    torch.manual_seed(0)
    model = Classifier()
    model.fc.weight.data[:, :4] = 0
    model.conv.weight.data[:4] *= 10
    layer = analyzed(model, [torch.randn(16, 3, 6, 6)])['conv']
    vectors = layer.spectrum.vectors[0]
    unused = vectors[4:].square().sum(0) < .05
    energy = layer.spectrum.energy
    assert energy[unused].sum() > .9 * energy.sum()
    assert layer.sensitivity[unused].sum() < .1 * layer.sensitivity.sum()


def test_batch_split_and_seed(monkeypatch):
    """The same images give the same result, and labels follow the images
    through any split over processes."""
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(16, 3, 6, 6)
    a, b = (analyzed(model, [x])['conv'].sensitivity for _ in range(2))
    assert torch.equal(a, b)
    logits = torch.randn(12, 5)
    whole = sampled_labels(logits, 3)
    monkeypatch.setattr('mmbasis.running.adapter.get_world_size',
                        lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(
            'mmbasis.running.adapter.get_rank', lambda rank=rank: rank)
        assert torch.equal(sampled_labels(logits[rank::2], 3), whole[rank::2])


class Queries(nn.Module):
    """The queries know nothing of the image, as in DETR."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(4, 6))
        self.proj = nn.Linear(6, 8)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        queries = self.act(self.proj(self.queries)).mean(0)
        return self.fc(x.flatten(2).mean(2).repeat(1, 2) + queries)


def test_layer_that_the_image_does_not_reach():
    torch.manual_seed(0)
    model, x = Queries(), torch.randn(16, 4, 6, 6)
    layer = analyzed(model, [x])['proj']
    y = model.proj(model.queries).detach().requires_grad_()
    logits = model.fc(x.mean((2, 3)).repeat(1, 2) + y.relu().mean(0))
    loss = F.cross_entropy(logits, sampled_labels(logits, 0), reduction='sum')
    gradient, = torch.autograd.grad(loss, y)
    expected = gradient.T @ gradient / len(gradient)
    torch.testing.assert_close(layer.gradient[0].float(), expected)
    assert layer.sensitivity[0] > 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_checkpointed_activations():
    """They are computed twice, and counted once."""
    images, found = torch.randn(4, 3, 32, 32), []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = ResNet(
            18, stem_channels=8, base_channels=8, with_cp=with_cp)
        model = nn.Sequential(backbone, Last())
        found.append(analyzed(model, [images]))
    for name, layer in found[0].items():
        torch.testing.assert_close(found[1][name].sensitivity,
                                   layer.sensitivity)
        assert layer.sensitivity.sum() > 0


def test_wide_layer(monkeypatch):
    """What gradients say of outputs that do not occur is not kept, and changes
    neither ranks nor layers."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 64, 1), nn.ReLU(),
        nn.Conv2d(64, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 5))
    images, found = torch.randn(64, 3, 6, 6), []
    for limit in (64, 32):
        monkeypatch.setattr('mmbasis.planning.sensitivity.MAX_ROWS', limit)
        layer = analyzed(model, [images])['2']
        compressed = copy.deepcopy(model)
        plan = compress(compressed, BudgetPlanner(macs=.5), [images])
        assert plan.layers['2'].rank < 8
        found.append((layer, ranks(plan), compressed(images)))
    (full, chosen, outputs), (layer, same_ranks, same) = found
    vectors = full.spectrum.vectors
    assert layer.gradient.shape == (1, 8, 8)
    torch.testing.assert_close(
        layer.gradient,
        vectors.mT @ full.gradient @ vectors,
        rtol=1e-4,
        atol=1e-8)
    torch.testing.assert_close(
        layer.sensitivity, full.sensitivity, rtol=1e-4, atol=0)
    assert chosen == same_ranks
    assert (outputs - same).norm() < .02 * (outputs - model(images)).norm()


def test_training_loss_of_an_engine_model():
    """A model that returns no logits is asked for its loss; frozen layers are
    no obstacle."""

    class Regressor(ToyNet):

        def forward(self, inputs, data_samples=None, mode='tensor'):
            out = super().forward(inputs)
            if mode == 'loss':
                return dict(loss=(out - 1).square().mean())
            return (out, out) if mode == 'tensor' else list(out)

    torch.manual_seed(0)
    model = Regressor(frozen=True)
    layers = analyzed(
        model,
        [dict(inputs=torch.rand(4, 3, 8, 8), data_samples=torch.zeros(4))])
    assert all(x.sensitivity.sum() > 0 for x in layers.values())
    assert all(p.grad is None for p in model.parameters())


def test_what_a_loss_leaves_behind():
    """Heads may keep what they return (CondInst), which cannot be copied; and
    trackers have nothing to show in mode tensor."""

    class Tracker(ToyNet):

        def __init__(self):
            super().__init__()
            self.infos, self.seen, self.last = dict(), [1], None

        def forward(self, inputs, data_samples=None, mode='tensor'):
            if mode == 'tensor':
                raise NotImplementedError
            out = super().forward(inputs)
            if mode == 'predict':
                return list(out)
            self.infos['out'] = self.last = self.new = out
            self.seen.append(out)
            self.alias = next(self.children())
            return dict(loss=out.square().mean())

    torch.manual_seed(0)
    model = Tracker()
    infos, seen = model.infos, model.seen
    data = dict(inputs=torch.rand(4, 3, 8, 8), data_samples=torch.zeros(4))
    layers = analyzed(model, [data])
    assert all(x.sensitivity.sum() > 0 for x in layers.values())
    assert model.infos is infos == {} and model.seen is seen == [1]
    assert model.last is None
    assert not hasattr(model, 'new') and not hasattr(model, 'alias')
    plan = compress(model, BudgetPlanner(macs=.5), [data, data], num_batches=1)
    assert plan.layers


def test_unknown_loss():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(UnknownLossError, match='loss_aware=False'):
        analyzed(model, [torch.rand(2, 3, 8, 8)])


def test_planner_spends_where_the_loss_is():
    """With equal spectra and costs the layer that the loss feels keeps the
    higher rank."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        dict(
            a=nn.Conv2d(8, 16, 3, padding=1), b=nn.Conv2d(8, 16, 3,
                                                          padding=1)))
    model.b.load_state_dict(model.a.state_dict())
    model.forward = lambda x: (model.a(x) + .01 * model.b(x)).mean((2, 3))
    analysis = measured(model, [torch.randn(8, 8, 6, 6)], loss=True)
    plan = BudgetPlanner(macs=.4, forms=['output']).plan(analysis)
    assert plan.layers['a'].rank > 2 * plan.layers['b'].rank
    plan = BudgetPlanner(macs=.4).plan(analysis)
    assert plan.layers['a'].macs[1] > 2 * plan.layers['b'].macs[1]


# ------------------------------------------------ where no gradient arrives
class Cut(nn.Module):
    """A body behind which gradients end, in one of several ways."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
            nn.Conv2d(24, 24, 3, padding=1))
        self.neck = nn.Conv2d(24, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        with torch.set_grad_enabled(self.way != 'no_grad'
                                    and torch.is_grad_enabled()):
            y = self.body(self.stem(x).relu())
        if self.way == 'detach':
            y = y.detach()
        if self.way == 'zero':
            y = 0 * y + x.repeat(1, 8, 1, 1)
        if self.way == 'nan':
            y = y + (0 * y).sqrt()  # the slope is 0 times infinity
        return self.fc(self.neck(y).relu().mean((2, 3)))


def cut(way):
    torch.manual_seed(0)
    return Cut(way)


BEHIND = ['stem', 'body.0', 'body.2']
ways = pytest.mark.parametrize(
    'way', ['no_grad', 'detach', 'zero', 'nan'])


@ways
def test_no_gradient_is_not_zero_sensitivity(way):
    x = torch.randn(8, 3, 9, 9)
    with patch('mmengine.logging.MMLogger.warning') as warning:
        found = analyzed(cut(way), [x])
    for name in BEHIND:
        assert found[name].gradient is found[name].sensitivity is None
        assert found[name].spectrum is not None
    assert found['neck'].sensitivity.sum() > 0
    (text, *values), _ = warning.call_args
    text %= tuple(values)
    assert '3 of 5 layers' in text and 'stem, body.0, body.2' in text


def test_model_without_any_gradient():
    """Energy counts in all of it."""

    class Inference(Cut):
        forward = torch.no_grad()(Cut.forward)

    torch.manual_seed(0)
    model, images = Inference('all'), [torch.randn(8, 3, 9, 9)]
    found = analyzed(model, images)
    assert all(x.sensitivity is None for x in found.values())
    by_energy = copy.deepcopy(model)
    plan = compress(model, BudgetPlanner(macs=.5), images)
    assert plan.layers and ranks(plan) == ranks(
        compress(by_energy, BudgetPlanner(macs=.5, loss_aware=False), images))


def test_no_warning_where_all_gradients_arrive():
    with patch('mmengine.logging.MMLogger.warning') as warning:
        found = analyzed(cut('all'), [torch.randn(8, 3, 9, 9)])
    assert all(x.sensitivity.sum() > 0 for x in found.values())
    assert not warning.called


@ways
@pytest.mark.parametrize('metric', ['macs', 'params'])
def test_layers_behind_get_their_share_of_the_budget(way, metric):
    model = cut(way)
    plan = compress(model, BudgetPlanner(**{metric: .5}),
                    [torch.randn(8, 3, 9, 9)] * 2)
    totals = plan.totals()[metric]
    assert .9 * .5 <= totals['after'] / totals['before'] <= .5
    for name in BEHIND:
        assert name in plan.dense or all(
            rank is None or rank > 1 for rank in plan.layers[name].ranks[:2])


def test_frozen_layers_are_like_others():
    """They are measured, planned and fitted as if they were to be trained, and
    stay frozen."""
    images = [torch.randn(16, 3, 9, 9) for _ in range(2)]
    results = []
    for frozen in (False, True):
        model = cut('all')
        model.body.requires_grad_(not frozen)
        dense = copy.deepcopy(model)
        known = analyzed(model, images)
        plan = compress(
            model, BudgetPlanner(macs=.6, overrides={'body.2': 'dense'}),
            images)
        assert 'body.0' in plan.layers
        assert not torch.equal(model.body[2].weight, dense.body[2].weight)
        assert {x.requires_grad
                for x in model.body.parameters()} == {not frozen}
        assert all(x.requires_grad for x in model.neck.parameters())
        results.append((known, plan, model.state_dict()))
    (known, plan, state), (same, same_plan, same_state) = results
    for name, value in known.items():
        assert torch.equal(value.sensitivity, same[name].sensitivity)
    assert plan == same_plan
    assert all(torch.equal(state[k], v) for k, v in same_state.items())


class Sometimes(nn.Module):
    """One layer that no gradient reaches, and one that sees some images."""

    def __init__(self):
        super().__init__()
        self.never = nn.Conv2d(3, 8, 3)
        self.bright = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        y = self.never(x).detach() + x.mean((1, 2, 3)).view(-1, 1, 1, 1)
        if x.mean() > 0:
            y = y + self.bright(x)
        return self.fc(y.mean((2, 3)))


def sometimes(rank, world, path):
    """What one of several processes finds in its part of two batches."""
    torch.manual_seed(0)
    model = Sometimes()
    bright, dark = torch.rand(8, 3, 6, 6), -torch.rand(8, 3, 6, 6)
    if world > 1:
        torch.distributed.init_process_group(
            'gloo', f'file://{path}.store', rank=rank, world_size=world)
    found = analyzed(model, [bright, dark] if world == 1 else
                     [(bright, dark)[rank]])
    torch.save({k: (x.gradient, x.sensitivity)
                for k, x in found.items()}, f'{path}.{world}.{rank}')


def test_two_processes_know_the_same(tmp_path):
    """A layer that gradients reach in one process only is known in both, and
    what no process reached stays unknown."""
    path = tmp_path / 'found'
    sometimes(0, 1, path)
    torch.multiprocessing.spawn(sometimes, (2, path), nprocs=2)
    one, first, second = (
        torch.load(f'{path}.{end}', weights_only=True)
        for end in ('1.0', '2.0', '2.1'))
    assert one['never'] == first['never'] == second['never'] == (None, None)
    assert one['bright'][1].sum() > 0
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first['bright'][1].sum() > 0
