# Copyright (c) mmbasis authors. All rights reserved.
import itertools

import numpy as np
import pytest
import torch
import torch.nn as nn

from mmbasis.factorization import spectrum_of_factor
from mmbasis.layers import BasisLayer, kind_of
from mmbasis.planning import (BudgetPlanner, EnergyPlanner, FixedPlanner,
                              RatioPlanner, find_layers)
from mmbasis.registry import PLANNERS


def analyzed(model, positions=None):
    """Layers with spectra of their weights and given positions."""
    layers = find_layers(model)
    for i, layer in enumerate(layers):
        count = positions[i] if positions else 64
        layer.weight_positions = layer.out_positions = count
        if layer.compressible:
            matrix = layer.kind.to_matrix(layer.module).detach()
            layer.spectrum = spectrum_of_factor(matrix)
    return layers


def make_plan(planner, model, positions=None, **kwargs):
    layers = analyzed(model, positions)
    planner.select(model, layers)
    return planner.plan(layers, **kwargs)


def ranks(plan):
    return {name: entry.rank for name, entry in plan.layers.items()}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 32, 3, groups=32),
        nn.ConvTranspose2d(32, 16, 2), nn.Linear(16, 24))


# ------------------------------------------------------------------ energy
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.63, 0.8])
def test_energy_is_the_papers_rule(model, threshold):
    plan = make_plan(EnergyPlanner(threshold), model)
    for layer in analyzed(model):
        if not layer.compressible:
            continue
        matrix = kind_of(layer.module).to_matrix(layer.module)
        energy = torch.linalg.svdvals(matrix.double()).square().sum(0)
        share = energy.cumsum(0) / energy.sum()
        needed = int((share < threshold).sum()) + 1
        if needed <= layer.break_even():
            assert plan.layers[layer.name].rank == needed
            assert plan.layers[layer.name].energy >= threshold - 1e-6
        else:
            assert 'past break-even' in plan.dense[layer.name].reason


def test_all_energy_keeps_everything_dense(model):
    plan = make_plan(EnergyPlanner(1), model)
    assert not plan.layers
    assert len(plan.dense) == 6


def test_energy_needs_no_data():
    assert not EnergyPlanner(0.5).data_aware
    assert EnergyPlanner(0.5, data_aware=True).data_aware
    assert BudgetPlanner(macs=0.5).data_aware
    assert not BudgetPlanner(macs=0.5, data_aware=False).data_aware


# ------------------------------------------------------------------- ratio
@pytest.mark.parametrize('ratio', [0.2, 0.5, 0.9])
def test_ratio_holds_in_every_layer(model, ratio):
    layers = {layer.name: layer for layer in analyzed(model)}
    plan = make_plan(RatioPlanner(ratio), model)
    assert len(plan.layers) == 5
    for name, entry in plan.layers.items():
        before, after = entry.macs
        assert after <= ratio * before or entry.rank == 1
        if entry.rank < layers[name].break_even():
            assert layers[name].macs(entry.rank + 1) > ratio * before


def test_ratio_of_one_is_dense(model):
    assert not make_plan(RatioPlanner(1.), model).layers


# ------------------------------------------------------------------- fixed
def test_fixed_ranks_by_name_and_class(model):
    plan = make_plan(FixedPlanner({'1': 5, 'Conv2d': 4, 'Linear': 3}), model)
    assert ranks(plan) == {'0': 4, '1': 5, '2': 4, '5': 3}
    assert plan.dense['4'].reason == 'no rank given'
    assert 'depthwise' in plan.dense['3'].reason


def test_fixed_full_rank(model):
    full = dict(ranks={'.*': 'full'})
    plan = make_plan(FixedPlanner(**full, allow_costlier=True), model)
    assert ranks(plan) == {'0': 16, '1': 16, '2': 16, '4': 16, '5': 16}
    plan = make_plan(FixedPlanner(**full), model)
    assert not plan.layers
    assert 'past break-even' in plan.dense['1'].reason


def test_fixed_ranks_are_not_rounded_away(model):
    plan = make_plan(FixedPlanner({'.*': 5}, round_to=4), model)
    assert ranks(plan) == {'0': 8, '1': 8, '2': 8, '4': 8, '5': 8}


@pytest.mark.parametrize('rank', [17, 1000])
def test_fixed_rank_out_of_range(model, rank):
    with pytest.raises(
            ValueError,
            match=rf'rank {rank} given for 1: it must '
            r'be in \[1, 16\]'):
        make_plan(FixedPlanner({'1': rank}), model)


@pytest.mark.parametrize('rank', [0, -3, 2.5, '4', 'all', None, True])
def test_fixed_rank_of_a_wrong_type(rank):
    with pytest.raises(ValueError, match="ranks\\['.*'\\] must be a positive"):
        FixedPlanner({'.*': rank})


def test_fixed_needs_ranks():
    with pytest.raises(ValueError, match='ranks is empty'):
        FixedPlanner({})


# ------------------------------------------------------------------ budget
def lost_energy(model, plan):
    total = 0.
    for layer in analyzed(model):
        if layer.name in plan.layers:
            energy = layer.spectrum.energy
            rank = plan.layers[layer.name].rank
            total += float(energy[rank:].sum() / energy.sum())
    return total


@pytest.mark.parametrize('metric', ['macs', 'params'])
@pytest.mark.parametrize('kwargs', [{}, dict(bias=True), dict(norm=True)])
@pytest.mark.parametrize('fraction', [0.2, 0.35, 0.5, 0.8, 0.99, 1.])
def test_budget_is_kept_and_used(model, metric, fraction, kwargs):
    positions = [900, 400, 100, 100, 256, 1]
    planner = BudgetPlanner(**{metric: fraction})
    plan = make_plan(planner, model, positions, **kwargs)
    totals = plan.totals()[metric]
    kept = totals['after'] / totals['before']
    assert kept <= fraction * (1 + 1e-9)
    # what is left would not pay for one more rank of the dearest layer
    assert kept > fraction - 0.15


def test_whole_budget_is_dense(model):
    plan = make_plan(BudgetPlanner(macs=1.), model)
    assert not plan.layers
    assert plan.dense['1'].reason == 'worth more dense than what it costs'


@pytest.mark.parametrize('fraction', [0.3, 0.5, 0.7])
def test_budget_is_close_to_the_best_combination(fraction):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 5, 3))
    # spectra that differ
    with torch.no_grad():
        model[1].weight[1:] *= 0.1
        model[2].weight[:2] *= 5
    positions = [100, 30, 60]
    layers = analyzed(model, positions)
    budget = fraction * sum(layer.macs() for layer in layers)

    def loss(layer, rank):
        if rank is None:
            return 0.
        energy = layer.spectrum.energy
        return float(energy[rank:].sum() / energy.sum())

    options = [[*range(1, layer.break_even() + 1), None] for layer in layers]
    best = min(
        sum(loss(layer, rank) for layer, rank in zip(layers, chosen))
        for chosen in itertools.product(*options) if sum(
            layer.macs(rank) for layer, rank in zip(layers, chosen)) <= budget)
    plan = make_plan(BudgetPlanner(macs=fraction), model, positions)
    step = max(
        loss(layer, a) - loss(layer, b)
        for layer, ranks in zip(layers, options)
        for a, b in zip(ranks, ranks[1:]))
    assert best - 1e-9 <= lost_energy(model, plan) <= best + step


def test_more_budget_loses_less(model):
    lost = [
        lost_energy(model, make_plan(BudgetPlanner(macs=f), model))
        for f in (0.1, 0.3, 0.5, 0.7, 0.9)
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[0] > lost[-1]


def test_layers_of_low_rank_give_way_to_others():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        low = torch.randn(16, 2) @ torch.randn(2, 144)
        model[0].weight.copy_(low.view(16, 16, 3, 3))
    plan = make_plan(BudgetPlanner(macs=0.5), model)
    assert plan.layers['0'].rank == 2
    assert '1' in plan.dense or plan.layers['1'].rank > 8


def test_excluded_layers_do_not_count(model):
    plan = make_plan(BudgetPlanner(macs=0.5, exclude=['1', '2']), model)
    totals = plan.totals()['macs']
    rest = [layer for layer in analyzed(model) if layer.name in '045']
    assert totals['before'] == sum(layer.macs() for layer in rest)
    assert totals['after'] <= 0.5 * totals['before']


def test_dense_overrides_count(model):
    plan = make_plan(BudgetPlanner(macs=0.6, overrides={'0': 'dense'}), model)
    totals = plan.totals()['macs']
    everything = [x for x in analyzed(model) if x.compressible]
    assert totals['before'] == sum(layer.macs() for layer in everything)
    assert totals['after'] <= 0.6 * totals['before']
    assert plan.dense['0'].reason == 'dense by override'


# ---------------------------------------------------------- what all share
planners = pytest.mark.parametrize(
    'planner', [
        dict(type='EnergyPlanner', threshold=0.5),
        dict(type='RatioPlanner', ratio=0.5),
        dict(type='BudgetPlanner', macs=0.5),
        dict(type='BudgetPlanner', params=0.5),
        dict(type='FixedPlanner', ranks={'.*': 8}),
    ],
    ids=lambda cfg: cfg['type'])


@planners
def test_record_of_the_planner(model, planner):
    plan = make_plan(PLANNERS.build(planner), model)
    assert plan.planner['type'] == planner['type']
    assert not [key for key in plan.planner if key.startswith('_')]
    again = dict(plan.planner)
    for key in ('metric', 'budget'):
        again.pop(key, None)
    if planner['type'] == 'BudgetPlanner':
        assert plan.planner['budget'] == 0.5
    else:
        assert ranks(make_plan(PLANNERS.build(again), model)) == ranks(plan)


@planners
@pytest.mark.parametrize('round_to', [2, 4])
def test_rounded_ranks(model, planner, round_to):
    plan = make_plan(PLANNERS.build(dict(planner, round_to=round_to)), model)
    assert plan.layers
    for entry in plan.layers.values():
        assert entry.rank % round_to == 0
    if planner['type'] == 'BudgetPlanner':
        key = 'macs' if 'macs' in planner else 'params'
        totals = plan.totals()[key]
        assert totals['after'] <= 0.5 * totals['before'] * (1 + 1e-9)


def test_rounding_goes_up_to_keep_the_energy(model):
    exact = make_plan(EnergyPlanner(0.3), model)
    rounded = make_plan(EnergyPlanner(0.3, round_to=4), model)
    for name, entry in rounded.layers.items():
        assert entry.rank == -(-exact.layers[name].rank // 4) * 4


def test_no_multiple_pays(model):
    plan = make_plan(EnergyPlanner(0.3, round_to=16), model)
    assert 'ranks are multiples of 16' in plan.dense['1'].reason


@planners
def test_overrides(model, planner):
    planner = dict(planner, overrides={'2': 3, 'Linear': 'dense', '[12]': 7})
    plan = make_plan(PLANNERS.build(planner), model)
    assert plan.layers['2'].rank == 3  # the first that matches
    assert plan.layers['1'].rank == 7
    assert plan.dense['5'].reason == 'dense by override'


@planners
def test_include_and_exclude(model, planner):
    planner = dict(planner, include=['Conv2d'], exclude=['1'])
    plan = make_plan(PLANNERS.build(planner), model)
    assert set(plan.layers) <= {'0', '2'} and plan.layers
    assert plan.dense['4'].reason == plan.dense['5'].reason == 'not included'
    assert plan.dense['1'].reason == "excluded by '1'"


def test_override_never_makes_a_layer_dearer(model):
    plan = make_plan(BudgetPlanner(macs=0.9, overrides={'1': 16}), model)
    assert 'past break-even' in plan.dense['1'].reason


@planners
@pytest.mark.parametrize('key, value', [
    ('include', ['nothing']),
    ('exclude', ['nothing']),
    ('overrides', dict(nothing=3)),
])
def test_pattern_without_match(model, planner, key, value):
    with pytest.raises(ValueError, match=f"{key}: the pattern 'nothing'"):
        make_plan(PLANNERS.build({**planner, key: value}), model)


def test_fixed_pattern_without_match(model):
    with pytest.raises(ValueError, match="ranks: the pattern 'nothing'"):
        make_plan(FixedPlanner({'.*': 1, 'nothing': 3}), model)


@planners
def test_unknown_key(planner):
    with pytest.raises(TypeError, match='treshold'):
        PLANNERS.build(dict(planner, treshold=0.5))


def test_unknown_planner():
    with pytest.raises(KeyError, match='EnergiePlanner'):
        PLANNERS.build(dict(type='EnergiePlanner', threshold=0.5))


@pytest.mark.parametrize('value', [
    0, -0.1, 1.0001, 50,
    float('nan'),
    float('inf'), '0.5', None, [0.5], True
])
@pytest.mark.parametrize('planner, key', [
    (EnergyPlanner, 'threshold'),
    (RatioPlanner, 'ratio'),
    (BudgetPlanner, 'macs'),
    (BudgetPlanner, 'params'),
])
def test_fraction_out_of_range(planner, key, value):
    with pytest.raises(ValueError, match=key):
        planner(**{key: value})


def test_both_budgets_or_none():
    with pytest.raises(ValueError, match='exactly one of macs and params'):
        BudgetPlanner(macs=0.5, params=0.5)
    with pytest.raises(ValueError, match='exactly one of macs and params'):
        BudgetPlanner()


@pytest.mark.parametrize('key', ['macs', 'params'])
def test_budget_below_rank_one_everywhere(model, key):
    with pytest.raises(
            ValueError,
            match=f'{key}=0.001 cannot be met: the '
            'smallest ranks cost'):
        make_plan(BudgetPlanner(**{key: 0.001}), model)


@pytest.mark.parametrize('kwargs, message', [
    (dict(include='conv1'), 'lists of patterns'),
    (dict(exclude='conv1'), 'lists of patterns'),
    (dict(round_to=0), 'round_to must be a positive integer'),
    (dict(round_to=1.5), 'round_to must be a positive integer'),
    (dict(overrides={'a': 0}), "overrides\\['a'\\]"),
    (dict(overrides={'a': 'Dense'}), "overrides\\['a'\\]"),
    (dict(overrides={'a': 2.}), "overrides\\['a'\\]"),
])
def test_wrong_types(kwargs, message):
    with pytest.raises(ValueError, match=message):
        EnergyPlanner(0.5, **kwargs)


def test_override_out_of_range(model):
    with pytest.raises(ValueError, match='rank 40 given for 1'):
        make_plan(EnergyPlanner(0.5, overrides={'1': 40}), model)


# ------------------------------------------------------------- break-even
def random_layers(rng, count):
    layers, positions = [], []
    for _ in range(count):
        groups = int(rng.choice([1, 1, 2, 3]))
        c_in, c_out = (int(groups * rng.integers(1, 12)) for _ in range(2))
        kernel = int(rng.integers(1, 4))
        kind = rng.choice(['conv', 'transpose', 'linear'])
        if kind == 'linear':
            layer = nn.Linear(c_in, c_out, bias=bool(rng.integers(2)))
        else:
            cls = nn.Conv2d if kind == 'conv' else nn.ConvTranspose2d
            layer = cls(
                c_in, c_out, kernel, groups=groups, bias=bool(rng.integers(2)))
        layers.append(layer)
        # transposed convolutions: inputs and outputs differ in size
        at_input = int(rng.integers(1, 400))
        at_output = at_input * (4 if kind == 'transpose' else 1)
        positions.append((at_input, at_output))
    return nn.Sequential(*layers), positions


@pytest.mark.parametrize('seed', range(25))
def test_no_plan_makes_a_layer_dearer(seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model, positions = random_layers(rng, 30)
    compressed = 0
    for planner in (EnergyPlanner(rng.uniform(0.3, 1)),
                    RatioPlanner(rng.uniform(0.3, 1)),
                    BudgetPlanner(macs=rng.uniform(0.6, 1)),
                    BudgetPlanner(params=rng.uniform(0.6, 1)),
                    FixedPlanner({'.*': 'full'}),
                    EnergyPlanner(0.9, round_to=int(rng.integers(1, 5)))):
        layers = analyzed(model, [1] * 30)
        for layer, at in zip(layers, positions):
            layer.weight_positions, layer.out_positions = at
        planner.select(model, layers)
        extras = dict(bias=bool(rng.integers(2)), norm=bool(rng.integers(2)))
        plan = planner.plan(layers, **extras)
        assert set(plan.layers) | set(plan.dense) == {x.name for x in layers}
        for layer in layers:
            if layer.name not in plan.layers:
                continue
            compressed += 1
            entry = plan.layers[layer.name]
            basis = BasisLayer(layer.module, entry.rank, **extras)
            assert entry.params == [
                sum(p.numel() for p in module.parameters())
                for module in (layer.module, basis)
            ]
            assert entry.params[1] < entry.params[0]
            macs = (
                basis.basis.weight.numel() * layer.weight_positions +
                basis.coefficients.weight.numel() * layer.out_positions)
            assert entry.macs == [layer.macs(), macs]
            assert macs < layer.macs()
        if isinstance(planner, BudgetPlanner):
            totals = plan.totals()[planner.metric]
            assert totals['after'] <= planner.budget * totals['before'] * (
                1 + 1e-9)
    assert compressed > 20


@pytest.mark.parametrize('extras', [{}, dict(bias=True), dict(norm=True)])
@pytest.mark.parametrize('seed', range(5))
def test_break_even_is_the_last_rank_that_pays(seed, extras):
    rng = np.random.default_rng(seed)
    model, positions = random_layers(rng, 40)
    for layer, at in zip(find_layers(model), positions):
        if not layer.compressible:
            continue
        layer.weight_positions, layer.out_positions = at
        dense = sum(p.numel() for p in layer.module.parameters())
        cheaper = []
        for rank in range(1, layer.full_rank + 1):
            basis = BasisLayer(layer.module, rank, **extras)
            params = sum(p.numel() for p in basis.parameters())
            assert layer.params(rank, **extras) == params
            if layer.macs(rank) < layer.macs() and params < dense:
                cheaper.append(rank)
        assert layer.break_even(**extras) == max(cheaper, default=0)
