# Copyright (c) mmbasis authors. All rights reserved.
import numpy as np
import pytest
import torch

from mmbasis.layers import BasisLayer
from mmbasis.planning import (
    BudgetPlanner,
    EnergyPlanner,
    FixedPlanner,
    Form,
    RatioPlanner,
)
from mmbasis.registry import PLANNERS
from tests.analyses import (
    analysis_of,
    chain,
    costs_of,
    make_plan,
    random_layers,
    ranks,
)


@pytest.fixture
def model():
    return chain()


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
    """What it was constructed with, from which the same one is built."""
    made = PLANNERS.build(dict(planner, exclude=['1']))
    assert made.config == dict(planner, exclude=['1'])
    plan = make_plan(made, model)
    record = {
        k: v
        for k, v in plan.planner.items()
        if k not in ('data_aware', 'loss_aware')
    }
    assert record == made.config
    assert plan.planner['data_aware'] == made.data_aware
    again = make_plan(PLANNERS.build(record), model)
    assert ranks(again) == ranks(plan)


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


def test_override_never_makes_a_layer_costlier(model):
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


@planners
def test_unknown_key(planner):
    with pytest.raises(TypeError, match='treshold'):
        PLANNERS.build(dict(planner, treshold=0.5))


def test_unknown_planner():
    with pytest.raises(KeyError, match='EnergiePlanner'):
        PLANNERS.build(dict(type='EnergiePlanner', threshold=0.5))


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


@pytest.mark.parametrize('seed', range(25))
def test_no_plan_makes_a_layer_costlier(seed):
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
        extras = dict(bias=bool(rng.integers(2)), norm=bool(rng.integers(2)))
        analysis = analysis_of(model, planner, positions)
        costs = costs_of(analysis)
        plan = planner.plan(analysis, Form(**extras))
        assert set(plan.layers) | set(plan.dense) == set(costs)
        for name, entry in plan.layers.items():
            compressed += 1
            dense = model.get_submodule(name)
            basis = BasisLayer(dense, entry.rank, **extras)
            assert entry.params == [
                sum(p.numel() for p in module.parameters())
                for module in (dense, basis)
            ]
            assert entry.params[1] < entry.params[0]
            known = analysis.statistics[name]
            macs = (
                basis.basis.weight.numel() * known.weight_positions +
                basis.coefficients.weight.numel() * known.out_positions)
            assert entry.macs == [costs[name].macs(), macs]
            assert macs < costs[name].macs()
        if isinstance(planner, BudgetPlanner):
            totals = plan.totals()[planner.metric]
            assert totals['after'] <= planner.budget * totals['before'] * (
                1 + 1e-9)
    assert compressed > 20
