# Copyright (c) mmbasis authors. All rights reserved.
"""A model is changed whole or not at all, wherever it fails."""
import copy
from unittest import mock

import pytest
import torch
import torch.nn as nn
from mmengine.model import ExponentialMovingAverage

import mmbasis
from mmbasis import planning
from mmbasis.compression import (
    apply_plan,
    basis_layers,
    get_plan,
    pipeline,
    surgery,
)
from mmbasis.compression.layer_regression import LayerRegression
from mmbasis.compression.reconstruction import Reconstruction
from mmbasis.layers import BasisLayer
from mmbasis.planning import BasePlanner


class Net(nn.Module):
    """With all that is attached to layers: hooks, sharing, an average."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.alias = self.conv2
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)
        self.average = ExponentialMovingAverage(self.conv2, momentum=.5)
        self.conv2.weight.data += .1
        self.seen = []
        self.conv1.register_forward_hook(
            lambda module, *_: self.seen.append(module))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x) + self.average(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 9, 9) for _ in range(3)]


def compress(model, batches, rank=3, **recipe):
    planner = dict(type='FixedPlanner', ranks={'conv.': rank})
    return mmbasis.compress(model, planner, batches, 2, **recipe)


class Snapshot:
    """All that a model is made of."""

    def __init__(self, model, x):
        self.model, self.x = model, x
        self.before, self.values = self._take(), self._values()

    def _take(self):
        return {
            name: {
                key: dict(value) if isinstance(value, dict) else value
                for key, value in vars(module).items() if key != '_mmbasis'
            }
            for name, module in self.model.named_modules(
                remove_duplicate=False)
        }

    def _values(self):
        plan = get_plan(self.model)
        state = {k: v.clone() for k, v in self.model.state_dict().items()}
        average = {
            k: v.clone()
            for k, v in self.model.average.avg_parameters.items()
        }
        with torch.no_grad():
            return plan and plan.to_dict(), state, average, self.model(self.x)

    def check(self):
        after = self._take()
        assert after.keys() == self.before.keys()
        for name, attributes in self.before.items():
            assert attributes.keys() == after[name].keys()
            for key, value in attributes.items():
                found = after[name][key]
                if isinstance(value, dict):
                    assert found.keys() == value.keys(), (name, key)
                    assert all(found[k] is v for k, v in value.items())
                else:
                    assert found is value or found == value, (name, key)
        plan, *tensors, outputs = self.values
        found_plan, *found_tensors, found_outputs = self._values()
        assert found_plan == plan and torch.equal(found_outputs, outputs)
        for wanted, found in zip(tensors, found_tensors):
            assert wanted.keys() == found.keys()
            assert all(torch.equal(found[k], v) for k, v in wanted.items())


class Interrupted(BaseException):
    """As KeyboardInterrupt, which is no Exception."""


def failing(owner, name, at):
    """A patch that has a function fail when it is called for the ``at``-th
    time, after it did its work."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        result = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == at:
            raise Interrupted
        return result

    return mock.patch.object(owner, name, function)


STEPS = [(BasisLayer, '__init__', 1), (BasisLayer, '__init__', 3),
         (BasisLayer, '__init__', 2), (BasisLayer, 'take_over', 1),
         (BasisLayer, 'take_over', 3), (surgery, '_averages', 2),
         (surgery, 'replace_modules', 1), (surgery, '_add_biases', 1),
         (surgery, 'attach_plan', 1), (surgery, 'guard', 1),
         (surgery, 'keep_structure', 1)]


@pytest.mark.parametrize('step', [*STEPS, (BasisLayer, 'project', 2)], ids=str)
def test_apply_plan(model, batches, step):
    plan = compress(copy.deepcopy(model), batches)
    before = Snapshot(model, batches[0])
    with failing(*step), pytest.raises(Interrupted):
        apply_plan(model, plan)
    before.check()
    assert get_plan(model) is None
    apply_plan(model, plan)
    assert len(dict(basis_layers(model))) == 3
    seen = len(model.seen)
    model(batches[0])
    assert model.seen[seen:] == [model.conv1]


@pytest.mark.parametrize('step', [
    *STEPS, (BasisLayer, 'to_dense', 2), (BasisLayer, 'hand_back', 2),
    (surgery, 'replace_modules', 2), (surgery, 'apply_plan', 1)
], ids=str)
def test_restructure(model, batches, step):
    plan = compress(copy.deepcopy(model), batches, rank=2)
    compress(model, batches)
    before = Snapshot(model, batches[0])
    with failing(*step), pytest.raises(Interrupted):
        surgery.restructure(model, plan)
    before.check()
    surgery.restructure(model, plan)
    assert {x.rank for _, x in basis_layers(model)} == {2}
    assert get_plan(model) == plan


def test_plan_of_another_model(model, batches):
    other = Net()
    other.conv2 = other.alias = nn.Conv2d(12, 8, 3, padding=1, bias=False)
    plan = compress(copy.deepcopy(model), batches)
    for change in (apply_plan, surgery.restructure):
        state = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match='conv2: weights of shape'):
            change(other, plan)
        assert not dict(basis_layers(other)) and get_plan(other) is None
        assert all(
            torch.equal(other.state_dict()[k], v) for k, v in state.items())


@pytest.mark.parametrize('step', [
    (planning, 'find_layers', 1),
    (pipeline, 'find_targets', 1),
    (planning, 'measure', 1),
    (planning, 'measure_sensitivity', 1),
    (BasePlanner, 'plan', 1),
    (pipeline, 'apply_plan', 1),
    (LayerRegression, 'add', 3),
    (LayerRegression, 'solve', 1),
    (LayerRegression, 'solve', 3),
    (Reconstruction, '_set', 1),
    (Reconstruction, '_set', 3),
    (Reconstruction, 'run', 1),
    (pipeline, 'output_errors', 1),
    (pipeline, 'output_errors', 2),
    (pipeline, 'recalibrate_if_better', 1),
    (pipeline, 'recalibrate', 1),
], ids=str)
@pytest.mark.parametrize('form', ['output', 'both'])
def test_compress(model, batches, step, form):
    before = Snapshot(model, batches[0])
    options = dict(recalibration=True) if step[1] == 'recalibrate' else {}
    if step[1] == 'measure_sensitivity' or form == 'both':
        planner = dict(type='BudgetPlanner', macs=.5, forms=[form])
    else:
        planner = dict(type='FixedPlanner', ranks={'conv.': 3})
    with failing(*step), pytest.raises(Interrupted):
        mmbasis.compress(model, planner, batches, 2, **options)
    before.check()
    assert compress(model, batches).layers
