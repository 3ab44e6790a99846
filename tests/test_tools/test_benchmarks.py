# Copyright (c) mmbasis authors. All rights reserved.
"""What benchmarks build on top of mmbasis still fits it."""
import importlib.util

import pytest
import torch
import torch.nn as nn

import mmbasis

BUDGET = .4


@pytest.fixture(scope='module')
def methods(repo_root):
    path = f'{repo_root}/tools/benchmarks/cifar_methods.py'
    spec = importlib.util.spec_from_file_location('cifar_methods', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_method_meets_its_budget(methods):
    """Every row of the table compresses to the MACs that it is said to."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 72, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(72, 4)).eval()
    state = dense.state_dict()
    forms = {}
    for name, (settings, ways, off) in methods.METHODS.items():
        model = nn.Sequential(*map(mmbasis.layers.copy_module, dense)).eval()
        planner = methods.make_planner(settings, BUDGET)
        with methods.without(off):
            plan = mmbasis.compress(
                model, planner, [torch.randn(8, 3, 12, 12)] * 2, **ways)
        macs = plan.totals()['macs']
        assert .2 * macs['before'] < macs['after'] <= BUDGET * macs['before']
        forms[name] = {x.form for x in plan.layers.values()}
        assert all(torch.equal(dense.state_dict()[k], state[k]) for k in state)
    assert forms['input form alone'] == {'input'}
    assert forms['both sides alone'] == {'both'}
    assert forms['+ automatic recalibration'] == {'output'}
