# Copyright (c) mmbasis authors. All rights reserved.
"""Each cell of the table in the docstring of ``resolve``."""
import pytest

from mmbasis.compression import Action, Recipe, Run, Source, resolve
from mmbasis.planning import CompressionPlan, LayerPlan

PLANNER = dict(type='BudgetPlanner', macs=.5)


def plan(rank=4, macs=.5, norm=False):
    """A plan of one layer, as a planner records it."""
    layer = LayerPlan(rank, 8, 'BasisConv', [8, 3, 3, 3], False, .9,
                      [200., 100.], [216, 108])
    record = Recipe.of(planner=dict(PLANNER, macs=macs)).planner.describe()
    return CompressionPlan(dict(conv=layer), norm=norm, planner=record)


NOTHING = Recipe.of()
DENSE = Source()


@pytest.mark.parametrize('recipe', [
    Recipe.of(planner=PLANNER),
    Recipe.of(plan=plan()),
])
@pytest.mark.parametrize('checkpoint', [DENSE, None])
def test_dense_weights_are_compressed(recipe, checkpoint):
    start = resolve(recipe, checkpoint)
    assert start.action is Action.COMPRESS and start.plan is None


@pytest.mark.parametrize('checkpoint', [DENSE, None])
def test_nothing_to_do(checkpoint):
    with pytest.raises(RuntimeError, match='nothing to do'):
        resolve(NOTHING, checkpoint)


def test_a_compressed_model_is_kept():
    start = resolve(NOTHING, None, model=plan())
    assert start.action is Action.KEEP and start.plan == plan()


def test_a_compressed_model_takes_no_dense_weights():
    with pytest.raises(RuntimeError, match='dense, but the model is compre'):
        resolve(NOTHING, DENSE, model=plan())


def test_a_compressed_model_and_another_planner():
    agree = Recipe.of(planner=PLANNER)
    assert resolve(agree, None, model=plan()).action is Action.KEEP
    with pytest.raises(ValueError, match="'macs': 0.3.*the model of the conf"):
        resolve(
            Recipe.of(planner=dict(PLANNER, macs=.3)), None, model=plan())
    with pytest.raises(ValueError, match='drop the plan'):
        resolve(Recipe.of(plan=plan(rank=3)), None, model=plan())


def test_a_compressed_checkpoint_is_followed():
    start = resolve(NOTHING, Source(plan()))
    assert (start.action, start.plan) == (Action.FOLLOW, plan())
    assert not start.note


@pytest.mark.parametrize('recipe', [
    Recipe.of(planner=PLANNER),
    Recipe.of(plan=plan()),
])
def test_a_compressed_checkpoint_that_is_what_is_asked_for(recipe):
    start = resolve(recipe, Source(plan()))
    assert start.action is Action.FOLLOW
    assert 'not compressed again' in start.note


@pytest.mark.parametrize('recipe, message', [
    (Recipe.of(planner=dict(PLANNER, macs=.3)), "asks for .*'macs': 0.3"),
    (Recipe.of(planner=dict(type='BudgetPlanner', params=.5)), 'params'),
    (Recipe.of(planner=dict(type='EnergyPlanner', threshold=.5)), 'Energy'),
    (Recipe.of(plan=plan(rank=3)), 'compressed by another'),
    (Recipe.of(norm=True), 'no normalisation'),
])
def test_a_compressed_checkpoint_that_is_another_one(recipe, message):
    with pytest.raises(ValueError, match=message):
        resolve(recipe, Source(plan()))


def test_a_model_built_for_the_checkpoint():
    start = resolve(NOTHING, Source(plan()), model=plan())
    assert start.action is Action.KEEP
    with pytest.raises(ValueError, match='another plan than the model'):
        resolve(NOTHING, Source(plan()), model=plan(rank=3))


@pytest.mark.parametrize('run', [Run.RESUME, Run.TEST])
@pytest.mark.parametrize('recipe, noted', [
    (NOTHING, False),
    (Recipe.of(planner=PLANNER), False),
    (Recipe.of(planner=dict(PLANNER, macs=.3)), True),
    (Recipe.of(plan=plan()), False),
    (Recipe.of(plan=plan(rank=3)), True),
])
def test_resuming_and_testing_follow_the_checkpoint(run, recipe, noted):
    start = resolve(recipe, Source(plan()), run)
    assert (start.action, start.plan) == (Action.FOLLOW, plan())
    assert bool(start.note) == noted
    if noted:
        assert start.note.startswith(run.value.capitalize())


@pytest.mark.parametrize('run', [Run.RESUME, Run.TEST])
def test_stages_change_the_plan_of_a_model(run):
    """A model that was built for the first plan takes the latest."""
    start = resolve(NOTHING, Source(plan(rank=3)), run, plan())
    assert (start.action, start.plan.layers['conv'].rank) == (Action.FOLLOW,
                                                              3)
    assert start.note
    kept = resolve(NOTHING, Source(plan()), run, plan())
    assert kept.action is Action.KEEP and not kept.note


@pytest.mark.parametrize('model', [None, plan()])
@pytest.mark.parametrize('run, message', [
    (Run.RESUME, 'cannot be resumed from a dense'),
    (Run.TEST, 'under test is dense'),
])
def test_dense_checkpoints_are_refused(run, message, model):
    with pytest.raises(RuntimeError, match=message):
        resolve(Recipe.of(planner=PLANNER), DENSE, run, model)


def test_tests_without_a_checkpoint():
    assert resolve(NOTHING, None, Run.TEST, plan()).action is Action.KEEP
    with pytest.raises(RuntimeError, match='under test is dense'):
        resolve(NOTHING, None, Run.TEST)


def test_records_of_version_0_1():
    """mmbasis 0.1 recorded all attributes of a planner."""
    old = plan()
    record = dict(
        type='BudgetPlanner',
        include=[],
        exclude=[],
        overrides={},
        prediction_layers=False,
        round_to=1,
        data_aware=True,
        loss_aware=None,
        metric='macs',
        budget=.5,
        table=None)
    old = CompressionPlan(old.layers, planner=record)
    asked = Recipe.of(planner=PLANNER)
    assert resolve(asked, Source(old)).action is Action.FOLLOW
    for other in (dict(macs=.3), dict(params=.5), dict(macs=.5, round_to=8)):
        with pytest.raises(ValueError, match='compressed already'):
            resolve(
                Recipe.of(planner=dict(type='BudgetPlanner', **other)),
                Source(old))
