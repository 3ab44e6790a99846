# Copyright (c) mmbasis authors. All rights reserved.
import copy
import importlib
import json
import pickle
from collections import OrderedDict
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
import torch.nn as nn

import mmbasis
from mmbasis.compression import plan_of, save_checkpoint
from mmbasis.layers import BasisLayer
from mmbasis.planning import (
    Analysis,
    BasePlanner,
    BudgetPlanner,
    CompressionPlan,
    Costs,
    EnergyPlanner,
    Exclusion,
    FixedPlanner,
    Form,
    RatioPlanner,
    Reason,
    Rules,
    Selection,
    find_layers,
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
    (dict(include='conv1'), 'include must be a list of patterns'),
    (dict(exclude='conv1'), 'exclude must be a list of patterns'),
    (dict(include=5), 'include must be a list of patterns, but got 5'),
    (dict(overrides=['a']), 'overrides must be a dict of ranks by pattern'),
    (dict(prediction_layers='no'), 'prediction_layers must be True or False'),
    (dict(data_aware=1), 'data_aware must be True or False'),
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


# ---------------------------------------- facts that stay, and pure planning
def facts(model):
    analysis = analysis_of(model)
    plan = BudgetPlanner(macs=.3, overrides={'0': 'dense'}).plan(analysis)
    layer = analysis.layers[0]
    return [
        layer, analysis.selection, analysis.statistics['0'], analysis,
        plan.layers['1'], plan.dense['0'],
        Exclusion(Reason.UNUSED, 'unused'),
        Form(),
        Costs(layer, analysis.statistics['0']),
        Rules()
    ]


@pytest.mark.parametrize('index', range(10))
def test_facts_cannot_be_changed(model, index):
    fact = facts(model)[index]
    for key in vars(fact):
        with pytest.raises(FrozenInstanceError):
            setattr(fact, key, None)


def test_tables_of_facts_cannot_be_changed(model):
    layers, excluded = tuple(find_layers(model)), {}
    selection = Selection(layers, excluded)
    analysis = Analysis(selection, analysis_of(model).statistics)
    for table in (selection.excluded, analysis.statistics):
        with pytest.raises(TypeError, match='not support item assignment'):
            table['0'] = None
    excluded['0'] = Exclusion(Reason.UNUSED, 'unused')
    assert len(selection.chosen) == len(layers)
    assert selection == Selection(layers)
    assert selection != selection.without(excluded)


@planners
def test_planning_changes_nothing(model, planner):
    """Neither the analysis nor the planner."""
    planner = PLANNERS.build(planner)
    analysis = analysis_of(model, planner)
    statistics = dict(analysis.statistics)
    excluded = dict(analysis.selection.excluded)
    vectors = {
        k: x.spectrum.vectors.clone()
        for k, x in statistics.items() if x.spectrum is not None
    }
    state = copy.deepcopy({k: v for k, v in vars(planner).items()
                           if k not in ('cost', 'time')})
    first, second = planner.plan(analysis), planner.plan(analysis)
    assert first.layers and first == second
    assert analysis.statistics == statistics  # the same objects
    assert analysis.selection.excluded == excluded
    for name, value in vectors.items():
        assert torch.equal(statistics[name].spectrum.vectors, value)
    assert state == {k: v for k, v in vars(planner).items()
                     if k not in ('cost', 'time')}


@planners
def test_a_planner_remembers_no_model(model, planner):
    """Neither its layers nor how basis layers were built there."""
    planner = dict(planner, overrides={'1|conv': 5})
    torch.manual_seed(1)
    other = nn.Sequential(
        OrderedDict(conv=nn.Conv2d(12, 24, 3), wide=nn.Conv2d(24, 30, 3)))
    used = PLANNERS.build(planner)
    runs = [(model, dict(bias=True, norm=True)), (other, {}), (model, {})]
    for net, form in runs:
        fresh = PLANNERS.build(planner)
        assert make_plan(used, net, **form) == make_plan(fresh, net, **form)


def test_selecting_and_planning_may_be_interleaved(model):
    planner = FixedPlanner({'1|conv': 5})
    other = nn.Sequential(OrderedDict(conv=nn.Conv2d(12, 24, 3)))
    first, second = (analysis_of(net, planner) for net in (model, other))
    assert ranks(planner.plan(first)) == {'1': 5}
    assert ranks(planner.plan(second)) == {'conv': 5}


@planners
def test_planners_can_be_copied(model, planner):
    planner = PLANNERS.build(planner)
    for again in (copy.deepcopy(planner),
                  pickle.loads(pickle.dumps(planner))):
        assert again.config == planner.config
        assert make_plan(again, model) == make_plan(planner, model)


# ---------------------------------------------------- a planner of a user's
@pytest.fixture
def registered():
    """A planner as a package of a user's own has it."""

    @PLANNERS.register_module(name='Profile')
    class Profile(BasePlanner):

        def __init__(self, shares, scale=1., **kwargs):
            super().__init__(**kwargs)
            self.shares = np.asarray(shares) * scale
            self.table = torch.rand(3)
            shares[0] = 0  # whatever happens to an argument later

        def choose(self, free, decided):
            return [
                x.ranks[int(share * (len(x.ranks) - 1))]
                for x, share in zip(free, self.shares)
            ]

    yield Profile
    PLANNERS.module_dict.pop('Profile')


@pytest.mark.parametrize('make', [
    lambda: np.array([.25, .5, .75]),
    lambda: torch.tensor([.25, .5, .75]),
    lambda: [np.float64(.25), .5, np.float32(.75)],
], ids=['array', 'tensor', 'list'])
def test_arrays_are_recorded_as_they_were_given(registered, tmp_path, make):
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3), nn.Conv2d(16, 12, 3),
        nn.Conv2d(12, 4, 3))
    planner = dict(
        type='Profile', shares=make(), scale=np.float32(.5), round_to=2,
        overrides={'3': 'dense'})
    plan = mmbasis.compress(model, planner, [torch.rand(2, 3, 12, 12)])
    assert set(plan.layers) == {'0', '1', '2'}
    assert plan.planner == dict(
        type='Profile', shares=[.25, .5, .75], scale=.5, round_to=2,
        overrides={'3': 'dense'}, data_aware=True, loss_aware=False)
    path = str(tmp_path / 'plan.json')
    plan.save(path)
    assert CompressionPlan.load(path) == plan
    path = str(tmp_path / 'model.pth')
    save_checkpoint(model, plan, path, {})
    checkpoint = torch.load(path, weights_only=True)
    assert plan_of(checkpoint) == plan


def test_following_a_plan_needs_no_planner(registered, tmp_path):
    """Not even the type of the one that made it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 12, 3), nn.Conv2d(12, 16, 3))
    again = copy.deepcopy(model)
    batches = [torch.rand(4, 3, 12, 12)]
    planner = dict(type='Profile', shares=[.5, .5], prediction_layers=True)
    plan = mmbasis.compress(model, planner, batches)
    plan.save(str(tmp_path / 'plan.json'))
    PLANNERS.module_dict.pop('Profile')
    followed = mmbasis.compress(
        again, CompressionPlan.load(str(tmp_path / 'plan.json')), batches)
    assert followed == plan and ranks(plan).keys() == {'0', '1'}
    assert torch.equal(again(batches[0]), model(batches[0]))
    PLANNERS.register_module(name='Profile', module=registered)


class Given(BasePlanner):
    """Returns what it is told to, as careless planners do."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def choose(self, free, decided):
        return self.result


@pytest.mark.parametrize('result, text', [
    ([3, 3], r'Given.choose\(\) returned 2 ranks for 5 layers'),
    ([3] * 6, 'returned 6 ranks for 5 layers'),
    ([3, 40, 3, 3, 3], r'rank 40 given for 1: it must be in \[1, 16\]'),
    ([3, 2.5, 3, 3, 3], 'rank 2.5 given for 1'),
    ([3, 3, 0, 3, 3], 'rank 0 given for 2'),
])
def test_wrong_choices(model, result, text):
    with pytest.raises(ValueError, match=text):
        make_plan(Given(result), model)


@pytest.mark.parametrize('result', [
    np.array([3, 4, 5, 6, 7]),
    (x for x in [3, 4, 5, 6, 7]),
], ids=['array', 'generator'])
def test_choices_in_any_form(model, result):
    plan = make_plan(Given(result), model)
    assert ranks(plan) == {'0': 3, '1': 4, '2': 5, '4': 6, '5': 7}
    assert CompressionPlan.from_dict(json.loads(plan.dumps())) == plan


def test_a_planner_in_a_package_of_its_own(tmp_path, monkeypatch):
    """One class, one method, no change to mmbasis."""
    (tmp_path / 'my_planners.py').write_text("""
from mmbasis.planning import BasePlanner
from mmbasis.registry import PLANNERS


@PLANNERS.register_module()
class Halves(BasePlanner):

    def choose(self, free, decided):
        return [x.ranks[len(x.ranks) // 2] for x in free]
""")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module('my_planners')
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 4, 1))
    plan = mmbasis.compress(
        model, dict(type='Halves', overrides={'0': 5}),
        [torch.rand(2, 3, 12, 12)])
    PLANNERS.module_dict.pop('Halves')
    assert ranks(plan) == {'0': 5, '1': 8}
    assert plan.dense['2'].reason == 'prediction layer'
    assert isinstance(model[1], BasisLayer)
