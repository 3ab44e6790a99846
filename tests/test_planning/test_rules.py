# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch

from mmbasis.layers import kind_of
from mmbasis.planning import (
    BudgetPlanner,
    EnergyPlanner,
    FixedPlanner,
    RatioPlanner,
)
from tests.analyses import analysis_of, chain, costs_of, make_plan, ranks


@pytest.fixture
def model():
    return chain()


# ------------------------------------------------------------------ energy
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.63, 0.8])
def test_energy_is_the_papers_rule(model, threshold):
    plan = make_plan(EnergyPlanner(threshold), model)
    analysis = analysis_of(model)
    costs = costs_of(analysis)
    for layer in analysis.selection.chosen:
        matrix = kind_of(layer.module).to_matrix(layer.module)
        energy = torch.linalg.svdvals(matrix.double()).square().sum(0)
        share = energy.cumsum(0) / energy.sum()
        needed = int((share < threshold).sum()) + 1
        if needed <= costs[layer.name].break_even:
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


def test_rounding_goes_up_to_keep_the_energy(model):
    exact = make_plan(EnergyPlanner(0.3), model)
    rounded = make_plan(EnergyPlanner(0.3, round_to=4), model)
    for name, entry in rounded.layers.items():
        assert entry.rank == -(-exact.layers[name].rank // 4) * 4


# ------------------------------------------------------------------- ratio
@pytest.mark.parametrize('ratio', [0.2, 0.5, 0.9])
def test_ratio_holds_in_every_layer(model, ratio):
    costs = costs_of(analysis_of(model))
    plan = make_plan(RatioPlanner(ratio), model)
    assert len(plan.layers) == 5
    for name, entry in plan.layers.items():
        before, after = entry.macs
        assert after <= ratio * before or entry.rank == 1
        if entry.rank < costs[name].break_even:
            assert costs[name].macs(entry.rank + 1) > ratio * before


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


def test_fixed_pattern_without_match(model):
    with pytest.raises(ValueError, match="ranks: the pattern 'nothing'"):
        make_plan(FixedPlanner({'.*': 1, 'nothing': 3}), model)


# --------------------------------------------------------------- fractions
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
