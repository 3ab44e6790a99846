# Copyright (c) mmbasis authors. All rights reserved.
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from mmbasis.planning import BudgetPlanner
from tests.analyses import analysis_of, chain, costs_of, make_plan, ranks


@pytest.fixture
def model():
    return chain()


def lost_energy(model, plan):
    statistics = analysis_of(model).statistics
    return sum(
        energy_lost(statistics[name], entry.rank)
        for name, entry in plan.layers.items())


def energy_lost(known, rank):
    """Share of a layer's energy past a rank; None is the dense layer."""
    if rank is None:
        return 0.
    energy = known.spectrum.energy
    return float(energy[rank:].sum() / energy.sum())


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
    # what is left would not pay for one more rank of the costliest layer
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
    analysis = analysis_of(model, positions=positions)
    costs = list(costs_of(analysis).values())
    budget = fraction * sum(x.macs() for x in costs)

    def loss(costs, rank):
        return energy_lost(costs.statistics, rank)

    options = [[*range(1, x.break_even + 1), None] for x in costs]
    best = min(
        sum(loss(x, rank) for x, rank in zip(costs, chosen))
        for chosen in itertools.product(*options)
        if sum(x.macs(rank) for x, rank in zip(costs, chosen)) <= budget)
    plan = make_plan(BudgetPlanner(macs=fraction), model, positions)
    step = max(
        loss(x, a) - loss(x, b) for x, ranks in zip(costs, options)
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
    costs = costs_of(analysis_of(model))
    assert totals['before'] == sum(costs[name].macs() for name in '045')
    assert totals['after'] <= 0.5 * totals['before']


def test_dense_overrides_count(model):
    plan = make_plan(BudgetPlanner(macs=0.6, overrides={'0': 'dense'}), model)
    totals = plan.totals()['macs']
    costs = costs_of(analysis_of(model))
    assert totals['before'] == sum(costs[name].macs() for name in '01245')
    assert totals['after'] <= 0.6 * totals['before']
    assert plan.dense['0'].reason == 'dense by override'


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


# ---------------------------------------------------- unknown sensitivities
def with_sensitivities(analysis, scales):
    """Sensitivities of some layers: their energies, times a scale."""
    statistics = dict(analysis.statistics)
    for name, scale in scales.items():
        energy = statistics[name].spectrum.energy
        statistics[name] = replace(
            statistics[name], sensitivity=scale * energy / energy.sum())
    return replace(analysis, statistics=statistics)


@pytest.fixture
def alike():
    """Layers between which only the sensitivity makes a difference."""
    torch.manual_seed(0)
    convs = [nn.Conv2d(16, 16, 3) for _ in range(5)]
    for conv in convs:
        conv.load_state_dict(convs[0].state_dict())
    return analysis_of(nn.Sequential(*convs))


@pytest.mark.parametrize('scale', [1e-30, 1., 1e12])
@pytest.mark.parametrize('dead', [[], ['0', '1', '2']])
def test_unknown_sensitivity_is_that_of_a_typical_layer(alike, scale, dead):
    """In whatever unit the loss is, and however many layers are worth
    nothing to it."""
    scales = dict.fromkeys(['0', '1', '2', '3'], scale)
    scales.update(dict.fromkeys(dead, 0.))
    plan = BudgetPlanner(macs=.25).plan(with_sensitivities(alike, scales))
    found = ranks(plan)
    assert abs(found['4'] - found['3']) <= 1 < found['4']
    for name in dead:
        assert found[name] == 1


def test_without_any_sensitivity_energy_counts(alike):
    expected = BudgetPlanner(macs=.5, data_aware=False).plan(alike)
    plan = BudgetPlanner(macs=.5).plan(with_sensitivities(alike, {}))
    assert ranks(plan) == ranks(expected)
    nothing = with_sensitivities(alike, dict.fromkeys('01', 0.))
    assert ranks(BudgetPlanner(macs=.5).plan(nothing))['4'] > 1
