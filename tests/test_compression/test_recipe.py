# Copyright (c) mmbasis authors. All rights reserved.
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch

import mmbasis
from mmbasis.compression import Recipe, Teaching, Term
from mmbasis.compression.recipe import Calibration
from mmbasis.planning import BasePlanner
from mmbasis.registry import PLANNERS

PLANNER = dict(type='BudgetPlanner', macs=.5)


def test_defaults():
    recipe = Recipe.of(planner=PLANNER)
    assert recipe.calibration == Calibration(8, None)
    assert recipe.distillation == Teaching()
    assert not recipe.asks_for_teacher
    assert recipe.is_sequential and recipe.data_aware
    assert recipe.loss_aware is None
    weights = Recipe.of(planner=dict(type='EnergyPlanner', threshold=.5))
    assert not weights.is_sequential and not weights.data_aware


def test_recipes_cannot_be_changed():
    recipe = Recipe.of(planner=PLANNER)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.norm = True
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.calibration.num_batches = 3


def test_teachers():
    assert Recipe.of(distillation=False).distillation is None
    assert Recipe.of(distillation=True).distillation == Teaching()
    asked = Recipe.of(
        distillation=dict(
            checkpoint='a.pth',
            terms=[dict(module='head', type='kl', weight=.5)]))
    assert asked.asks_for_teacher
    assert asked.distillation.terms == (Term('head', 'kl', .5), )


nan = float('nan')


@pytest.mark.parametrize('config, message', [
    (dict(planer=PLANNER), 'planer'),
    (dict(planner=PLANNER, plan='plan.json'), 'not both'),
    (dict(plan='plan.json'), 'No such file'),
    (dict(planner='BudgetPlanner'), 'planner must be a config'),
    (dict(planner=dict(type='BudgetPlanner', mac=.5)), 'unexpected keyword'),
    (dict(plan=3), 'plan must be'),
    (dict(plan={}), 'not a compression plan'),
    (dict(calibration=5), 'calibration must be dict'),
    (dict(calibration=dict(batches=1)), "got {'batches': 1}"),
    (dict(calibration=dict(num_batches='4')), 'calibration.num_batches'),
    (dict(calibration=dict(num_batches=0)), 'calibration.num_batches'),
    (dict(calibration=dict(num_batches=True)), 'calibration.num_batches'),
    (dict(calibration=dict(dataloader='x')), 'calibration.dataloader'),
    (dict(reconstruction='global'), 'reconstruction must be'),
    (dict(recalibration=1), 'recalibration must be'),
    (dict(recalibration='always'), 'recalibration must be'),
    (dict(norm='False'), 'norm must be True or False'),
    (dict(orthogonality=.1), 'orthogonality must be'),
    (dict(orthogonality={}), 'orthogonality is not complete'),
    (dict(orthogonality=dict(weight=-1)), 'orthogonality.weight'),
    (dict(orthogonality=dict(weight=nan)), 'orthogonality.weight'),
    (dict(orthogonality=dict(weight=float('inf'))), 'orthogonality.weight'),
    (dict(distillation=dict(chekpoint='a')), 'distillation must be'),
    (dict(distillation=dict(task_weight=-1.)), 'distillation.task_weight'),
    (dict(distillation=dict(terms='head')), 'distillation.terms'),
    (dict(distillation=dict(terms=[])), 'at least one term'),
    (dict(config=dict(norm=True)), 'config is no field'),
    (dict(norm=0), 'norm must be True or False, but got 0'),
    (dict(distillation=dict(terms=[dict(module='x')])), 'not complete'),
    (dict(distillation=dict(terms=[dict(module='x', type='l1')])), "'kl' or"),
    (dict(distillation=dict(
        terms=[dict(module='x', type='mse', weight=nan)])), 'weight must be'),
    (dict(distillation=dict(
        terms=[dict(module='x', type='kl', temperature=0)])), 'temperature'),
    (dict(distillation=dict(
        terms=[dict(module='x', type='mse', temperature=2)])), 'temperature'),
], ids=str)
def test_wrong_fields_are_named(config, message):
    with pytest.raises((TypeError, ValueError, FileNotFoundError),
                       match=message):
        Recipe.of(**config)


def test_planners_of_a_user():
    """What is recorded of a planner is what it was constructed with; whatever
    it keeps besides does not hinder the plan from being saved."""

    @PLANNERS.register_module(name='Halving', force=True)
    class Halving(BasePlanner):

        def __init__(self, weights, scale=2., **kwargs):
            super().__init__(**kwargs)
            self.table = np.cumsum(weights)
            self.device = torch.device('cpu')

        def choose(self, free, decided):
            return [x.ranks[len(x.ranks) // 2] for x in free]

    recipe = Recipe.of(
        planner=dict(
            type='Halving', weights=np.arange(3), exclude=['stem.*']))
    expected = dict(type='Halving', weights=[0, 1, 2], exclude=['stem.*'])
    assert recipe.planner.config == expected
    assert json.loads(json.dumps(recipe.planner.describe())) == dict(
        expected, data_aware=True, loss_aware=False)
    assert copy.deepcopy(recipe.planner).config == expected


@pytest.mark.parametrize('planner', [None, 'BudgetPlanner', 3])
def test_compress_takes_a_planner_or_a_plan(planner):
    with pytest.raises(TypeError, match='planner must be a config'):
        mmbasis.compress(torch.nn.Linear(3, 3), planner, [torch.rand(1, 3)])
