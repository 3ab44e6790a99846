# Copyright (c) mmbasis authors. All rights reserved.
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmpretrain.models.backbones import ResNet

from mmbasis.compression import compress
from mmbasis.planning import BudgetPlanner
from mmbasis.running import UnknownLossError
from mmbasis.running.loss import sampled_labels
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
    monkeypatch.setattr('mmbasis.running.loss.get_world_size',
                        lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(
            'mmbasis.running.loss.get_rank', lambda rank=rank: rank)
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
    plan = BudgetPlanner(macs=.4).plan(analysis)
    assert plan.layers['a'].rank > 2 * plan.layers['b'].rank
