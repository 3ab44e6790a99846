# Copyright (c) mmbasis authors. All rights reserved.
import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.analysis import FlopAnalyzer

from mmbasis.layers import BasisLayer
from mmbasis.planning import Costs, Form, LayerStatistics, find_layers
from mmbasis.planning.costs import Cost
from tests.analyses import costs_of, measured, random_layers


class Mixed(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.groups = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, groups=2)
        self.dilated = nn.Conv2d(6, 6, (1, 3), dilation=2)
        self.tokens = nn.Linear(6, 5)
        self.fc = nn.Linear(5, 7)

    def forward(self, x):
        x = self.depthwise(self.groups(self.stem(x)))
        x = self.dilated(self.up(x)).flatten(2).transpose(1, 2)
        return self.fc(self.tokens(x).mean(1))


def test_macs_are_those_of_mmengine():
    model = Mixed().eval()
    layers = costs_of(measured(model, [torch.rand(5, 3, 19, 17)]))
    counted = FlopAnalyzer(model, torch.rand(1, 3, 19, 17)).by_module()
    assert len(layers) == 7
    for name, costs in layers.items():
        assert costs.macs() == counted[name], name


@pytest.mark.parametrize('name',
                         ['stem', 'groups', 'up', 'dilated', 'tokens', 'fc'])
def test_macs_after_are_those_of_mmengine(name):
    model = Mixed().eval()
    costs = costs_of(measured(model, [torch.rand(5, 3, 19, 17)]))[name]
    setattr(model, name, BasisLayer(costs.layer.module, 2))
    counted = FlopAnalyzer(model, torch.rand(1, 3, 19, 17)).by_module()
    assert costs.macs(2) == counted[name]
    assert costs.params(2) == sum(p.numel()
                                  for p in getattr(model, name).parameters())


@pytest.mark.parametrize('extras', [{}, dict(bias=True), dict(norm=True)])
@pytest.mark.parametrize('seed', range(5))
def test_break_even_is_the_last_rank_that_pays(seed, extras):
    rng = np.random.default_rng(seed)
    model, positions = random_layers(rng, 40)
    for layer, at in zip(find_layers(model), positions):
        if layer.obstacle is not None:
            continue
        known = LayerStatistics(*at, in_positions=at[0])
        costs = Costs(layer, known, Form(**extras))
        dense = sum(p.numel() for p in layer.module.parameters())
        cheaper = []
        for rank in range(1, layer.full_rank + 1):
            basis = BasisLayer(layer.module, rank, **extras)
            params = sum(p.numel() for p in basis.parameters())
            assert costs.params(rank) == params
            if costs.macs(rank) < costs.macs() and params < dense:
                cheaper.append(rank)
        assert costs.break_even == max(cheaper, default=0)


@pytest.mark.parametrize('metric', ['macs', 'params'])
def test_ranks_that_pay(metric):
    cost = Cost(metric)
    layer, = find_layers(nn.Conv2d(16, 16, 3))
    costs = Costs(layer, LayerStatistics(10, 10, in_positions=10))
    assert cost.ranks(costs, 1) == tuple(range(1, 15))
    assert cost.ranks(costs, 4) == (4, 8, 12)
    assert cost.ranks(costs, 16) == ()
    assert 'multiples of 16' in cost.why_not(costs, 16)
    assert cost.budget(.5, [costs] * 3) == 1.5 * cost.of(costs, None)


def test_a_normalisation_and_a_bias_cost_parameters():
    layer, = find_layers(nn.Conv2d(6, 8, 3, groups=2, bias=False))
    known = LayerStatistics(10, 10, in_positions=10)
    plain = Costs(layer, known)
    assert Costs(layer, known, Form(bias=True)).params(2) == (
        plain.params(2) + 8)
    assert Costs(layer, known, Form(norm=True)).params(2) == (
        plain.params(2) + 2 * 2 * 2)
    assert Costs(layer, known, Form(True, True)).macs(2) == plain.macs(2)
