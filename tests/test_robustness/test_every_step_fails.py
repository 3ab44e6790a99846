# Copyright (c) mmbasis authors. All rights reserved.
"""An error in any function of mmbasis, at any time of a compression: the model
is as it was."""
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

import mmbasis
from mmbasis.compression import basis_layers, recalibrate
from mmbasis.models import BasisModel
from tests.test_compression.test_all_or_nothing import (
    Interrupted,
    Net,
    Snapshot,
)
from tests.toy import ToyNet

PACKAGE = str(Path(mmbasis.__file__).parent)
#: every so many steps are tried in the short form
SHORT = 16
#: what runs a thread hands errors on from inside
THREADS = ('_run', )

RECIPES = {
    'all forms': dict(planner=dict(type='BudgetPlanner', macs=.5)),
    'recalibrated': dict(
        planner=dict(type='FixedPlanner', ranks={'conv.': 3}), norm=True,
        reconstruction='local', recalibration=True),
}


class Trace:
    """Notes the calls of functions of mmbasis, and lets one of them fail: the
    ``at[1]``-th of the function ``at[0]``."""

    def __init__(self, at=None):
        self.at, self.counts = at, Counter()

    def __call__(self, frame, event, arg):
        code = frame.f_code
        if event == 'call' and code.co_filename.startswith(PACKAGE):
            key = code.co_filename, code.co_firstlineno, code.co_name
            self.counts[key] += 1
            if self.at == (key, self.counts[key]):
                raise Interrupted(f'in {key}')

    def __enter__(self):
        self.before = sys.gettrace()
        threading.settrace(self)
        sys.settrace(self)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)
        threading.settrace(self.before)


def steps_of(function):
    """The first and the last call of each function that it calls."""
    with Trace() as trace:
        function()
    return [(key, n) for key, count in trace.counts.items()
            for n in sorted({1, count}) if key[2] not in THREADS]


def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 3, 9, 9) for _ in range(3)]


def network():
    torch.manual_seed(0)
    model = Net().eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.conv2.train()
    return model


def compress(model, recipe):
    recipe = dict(recipe)
    return mmbasis.compress(model, recipe.pop('planner'), batches(), 2,
                            **recipe)


def gradients(model):
    return [(id(x), x.requires_grad, id(x.grad)) for x in model.parameters()]


def check_steps(recipe, some=None):
    """Let compressions fail at steps, some of them or all; how many did."""
    steps = steps_of(lambda: compress(network(), recipe))
    assert len(steps) > 200
    model, failed = network(), 0
    for step in steps[::some]:
        before, trained = Snapshot(model, batches()[0]), gradients(model)
        try:
            with Trace(step):
                compress(model, recipe)
        except Interrupted:
            failed += 1
            before.check()
            assert gradients(model) == trained
        else:  # a function that is called once in a process
            model = network()
    return failed, len(steps[::some])


@pytest.mark.parametrize('name', RECIPES)
def test_some_steps(name):
    failed, tried = check_steps(RECIPES[name], SHORT)
    assert failed > .8 * tried


@pytest.mark.attack
@pytest.mark.parametrize('name', RECIPES)
def test_all_steps(name):
    failed, tried = check_steps(RECIPES[name])
    print(f'{name}: {failed} of {tried} steps failed, the model was the same')
    assert failed > .8 * tried


def test_recalibration_with_one_image():
    """Behind global pooling a batch of one has one value per channel, which
    normalisations refuse in the midst of it."""
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(8),
        torch.nn.Flatten(), torch.nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[1].running_mean += 1
    state = {k: x.clone() for k, x in model.state_dict().items()}
    images = [torch.rand(1, 3, 9, 9)]

    def check():
        assert not list(basis_layers(model))
        assert not any(x.training for x in model.modules())
        assert {x.momentum for x in model if hasattr(x, 'momentum')} == {.1}
        found = model.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[k], x) for k, x in state.items())

    with pytest.raises(ValueError, match='more than 1 value per channel'):
        recalibrate(model, images)
    check()
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        mmbasis.compress(
            model, dict(type='FixedPlanner', ranks={'0': 2}), images,
            recalibration=True)
    check()


def test_no_teacher_of_a_compression_that_failed():
    """Other weights may be compressed at the next try."""
    torch.manual_seed(0)
    model = BasisModel(
        ToyNet(), planner=dict(type='FixedPlanner', ranks={'nothing': 2}),
        distillation=dict(terms=[dict(module='fc', type='kl')]))
    model.has_weights = True
    data = [dict(inputs=torch.rand(2, 3, 8, 8),
                 data_samples=torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match="'nothing' matches none"):
        model.compress(data)
    assert model.distillation.teacher is None and model.plan is None


def test_a_wrapper_that_cannot_be_built_leaves_the_model():
    torch.manual_seed(0)
    net = ToyNet()
    before = {k: dict(vars(x)) for k, x in net.named_modules()}
    with pytest.raises(FileNotFoundError, match='absent.pth'):
        BasisModel(net, checkpoint='absent.pth')
    after = {k: dict(vars(x)) for k, x in net.named_modules()}
    assert before.keys() == after.keys()
    assert all(before[k].keys() == after[k].keys() for k in before)
    assert not net._load_state_dict_pre_hooks
