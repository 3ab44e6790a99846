# Copyright (c) mmbasis authors. All rights reserved.
"""Plans say how long devices are predicted to take, and devices' budgets never
make a layer slower."""
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn as nn

from mmbasis import compress
from mmbasis.compression.pipeline import log_plan
from mmbasis.planning import (
    Analysis,
    BudgetPlanner,
    Costs,
    EnergyPlanner,
    FixedPlanner,
    Ranks,
)
from mmbasis.planning.costs import DeviceCost
from mmbasis.planning.devices import DEVICES, device_at_hand
from mmbasis.planning.kernels import Convolution
from mmbasis.running import Targets
from tests.analyses import make_plan, measured

ALL = ['output', 'input', 'both', 'spatial']
H100 = SimpleNamespace(name='NVIDIA H100 80GB HBM3', multi_processor_count=132)


class Doubled(nn.Conv2d):
    """Of no known kind."""

    def forward(self, x):
        return 2 * super().forward(x)


class Network(nn.Module):
    """A layer that runs twice, one with a shortcut around it, one that never
    runs, one of unknown kind."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, stride=2, padding=1)
        self.twice = nn.Conv2d(64, 64, 3, padding=1)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.unknown = Doubled(64, 64, 1)
        self.never = nn.Conv2d(64, 64, 3)
        self.up = nn.ConvTranspose2d(64, 32, 4, 2, 1, groups=2)

    def forward(self, x):
        x = self.stem(x)
        x = self.twice(self.twice(x).relu())
        x = x + self.depthwise(x)
        return self.up(self.unknown(x)).mean((2, 3))


def by_hand(rank=None):
    """The layers of known kind that run, at 32x32; of ``twice`` a call."""
    return [(1, Convolution(3, 64, 9, 32**2, 16**2).kernels()),
            (2, Convolution(64, 64, 9, 16**2, 16**2).kernels(rank)),
            (1, Convolution(64, 64, 9, 16**2, 16**2, 64,
                            adds=True).kernels()),
            (1, Convolution(64, 32, 16, 16**2, 32**2, 2,
                            weight_positions=16**2).kernels())]


def test_time_of_all_layers_dense_and_as_planned():
    """Also of those that stay dense, whatever the reason; for one image, as
    often as they run."""
    plan = compress(Network().eval(), FixedPlanner({'twice': 20}),
                    [torch.randn(3, 3, 32, 32)])
    assert list(plan.layers) == ['twice']
    assert list(plan.predicted_ms) == list(DEVICES)
    for name, time in plan.predicted_ms.items():
        before, after = (
            1e3 * sum(n * DEVICES[name].time(x) for n, x in by_hand(rank))
            for rank in (None, 20))
        assert time == dict(before=pytest.approx(before, abs=1e-6),
                            after=pytest.approx(after, abs=1e-6))


def test_time_does_not_depend_on_the_batch():
    plans = [
        compress(Network().eval(), FixedPlanner({'twice': 20}),
                 [torch.randn(n, 3, 32, 32)]) for n in (1, 4)]
    assert plans[0].predicted_ms == plans[1].predicted_ms


def test_nothing_is_predicted_of_layers_that_were_not_measured():
    model = nn.Sequential(Doubled(3, 8, 3), nn.Flatten())
    planner = EnergyPlanner(.9)
    assert make_plan(planner, model).predicted_ms == {}


def test_terminal_shows_the_time():
    model = Network().eval()
    plan = compress(model, FixedPlanner({'twice': 20}),
                    [torch.randn(1, 3, 32, 32)])
    with patch('mmengine.logging.MMLogger.info') as info:
        log_plan(plan)
        log_plan(replace(plan, predicted_ms={}))
    lines = [x.args[0] % x.args[1:] for x in info.call_args_list]
    line, = (x for x in lines if 'Predicted time' in x)
    for name, time in plan.predicted_ms.items():
        assert f'{name} {time["after"] / time["before"]:.2f}x' in line


# ------------------------------------------------------------ never slower
def named(**layers):
    return nn.Sequential(OrderedDict(layers)).eval()


def every_kind():
    return named(
        stem=nn.Conv2d(3, 64, 3, padding=1),
        wide=nn.Conv2d(64, 192, 3, padding=1),
        grouped=nn.Conv2d(192, 192, 3, padding=1, groups=4),
        depthwise=nn.Conv2d(192, 192, 3, padding=1, groups=192),
        pointwise=nn.Conv2d(192, 128, 1),
        up=nn.ConvTranspose2d(128, 64, 4, 2, 1),
        pool=nn.AdaptiveAvgPool2d(4), flat=nn.Flatten(),
        hidden=nn.Linear(1024, 256), out=nn.Linear(256, 200))


def narrow():
    return named(
        stem=nn.Conv2d(3, 8, 3, padding=1),
        wide=nn.Conv2d(8, 24, 3, padding=1),
        grouped=nn.Conv2d(24, 24, 3, padding=1, groups=3),
        pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(),
        out=nn.Linear(24, 10))


def analysis_of(model, scale):
    """As if images had so many times more pixels."""
    torch.manual_seed(0)
    found = measured(model, [torch.randn(2, 3, 8, 8)], data_aware=False)
    return Analysis(found.selection, {
        name: replace(x, **{
            key: scale * getattr(x, key) for key in (
                'weight_positions', 'in_positions', 'out_positions')
        }) if 'out' not in name and 'hidden' not in name else x
        for name, x in found.statistics.items()})


@pytest.fixture(scope='module')
def analyses():
    return [analysis_of(every_kind(), 400), analysis_of(every_kind(), 9),
            analysis_of(narrow(), 400)]


def plans(planner_of, analyses, targets):
    """Plans at several budgets, where they can be met."""
    for analysis in analyses:
        for fraction in (.95, .8, .5, .3):
            planner = planner_of(fraction)
            selection = planner.select(analysis.layers, targets)
            found = Analysis(selection, analysis.statistics)
            try:
                yield planner, found, planner.plan(found)
            except ValueError as error:
                assert 'cannot be met' in str(error)


def check_never_slower(name, planner, analysis, plan):
    times = plan.predicted_ms[name]
    assert times['after'] <= times['before']
    of = DeviceCost(name).of
    for x in analysis.selection.chosen:
        costs = Costs(x, analysis.statistics[x.name])
        entry = plan.layers.get(x.name)
        if entry is not None:
            assert of(costs, entry.ranks) < of(costs, None)
        elif planner.forms == ('output', ):
            ranks = Ranks(np.arange(1, x.full_rank + 1))
            faster = of(costs, ranks) < of(costs, None)
            assert (faster & costs.is_smaller(ranks)).any() or (
                name in plan.dense[x.name].reason)


@pytest.mark.parametrize('forms', [*([x] for x in ALL), ALL],
                         ids='-'.join)
@pytest.mark.parametrize('name', DEVICES)
def test_no_layer_gets_slower_by_a_budget_of_time(name, forms, analyses):
    planned = 0
    for found in plans(
            lambda x: BudgetPlanner(latency=x, device=name, forms=forms),
            analyses, Targets({'out'}, set())):
        check_never_slower(name, *found)
        assert 'out' in found[2].dense
        planned += len(found[2].layers)
    assert planned  # or nothing was checked


@pytest.mark.parametrize('name', DEVICES)
def test_nor_by_ranks_that_are_given(name, analyses):
    """Full ranks, and some that save MACs but no time everywhere."""
    given = dict(wide=21, grouped=13, up=64, out=40)
    kept, reasons = set(), []
    for planner, analysis, plan in plans(
            lambda x: BudgetPlanner(
                latency=x, device=name, forms=ALL, overrides=given,
                prediction_layers=True),
            analyses[:2], Targets({'out'}, set())):
        check_never_slower(name, planner, analysis, plan)
        for key in given:
            if key in plan.layers:
                assert plan.layers[key].rank == given[key]
                kept.add(key)
            else:
                reasons.append(plan.dense[key].reason)
    assert kept
    assert all('past break-even' in x or (
        'it is not faster than the dense layer' in x and name in x)
        for x in reasons)
    assert any('past break-even' in x for x in reasons)


def test_a_rank_that_is_slower_says_so(analyses):
    planner = BudgetPlanner(
        latency=1., device='h100-fp16', overrides={'hidden': 100})
    plan = planner.plan(analyses[0])
    assert plan.dense['hidden'].reason == (
        'at rank 100 it is not faster than the dense layer on h100-fp16, by '
        'its model')


# ----------------------------------------------------------------- warnings
@pytest.fixture
def gpu(monkeypatch):
    """Function that pretends that this machine has a GPU."""

    def pretend(properties):
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
        monkeypatch.setattr(torch.cuda, 'get_device_properties',
                            lambda index: properties)

    return pretend


def warnings_of(planner, analysis):
    with patch('mmengine.logging.MMLogger.warning') as warning:
        planner.plan(analysis)
    return [x.args[0] % x.args[1:] for x in warning.call_args_list]


@pytest.mark.parametrize('metric', ['macs', 'params'])
def test_a_plan_that_is_slower_here_warns_once(metric, gpu, analyses):
    gpu(H100)
    planner = BudgetPlanner(**{metric: .5})
    text, = warnings_of(planner, analyses[1])
    assert f'With {metric}=0.5' in text
    assert "BudgetPlanner(latency=0.5, device='h100-fp16')" in text
    time = planner.plan(analyses[1]).predicted_ms['h100-fp16']
    assert f'{time["after"] / time["before"]:.2f} times' in text


def test_other_plans_do_not_warn(gpu, analyses, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    half = BudgetPlanner(macs=.5, round_to=8)
    assert not warnings_of(half, analyses[0])  # faster on a CPU
    gpu(H100)
    assert not warnings_of(BudgetPlanner(macs=1.), analyses[1])
    assert not warnings_of(
        BudgetPlanner(latency=.8, device='cpu'), analyses[1])
    gpu(SimpleNamespace(name='NVIDIA T400', multi_processor_count=6))
    assert not warnings_of(half, analyses[1])  # of this one nothing is known


@pytest.mark.parametrize('name, processors, preset', [
    ('NVIDIA H100 80GB HBM3', 132, 'h100-fp16'),
    ('NVIDIA H100 PCIe', 114, None),
    ('NVIDIA H200', 132, None),
    ('NVIDIA A100-SXM4-40GB', 108, 'a100-fp16'),
    ('NVIDIA GeForce RTX 3090', 82, 'rtx3090-fp16'),
    ('NVIDIA GeForce RTX 3090 Ti', 84, None),
    ('Tesla T4', 40, 't4-fp16'),
    ('NVIDIA T400', 6, None),
    ('Xavier', 8, 'xavier-fp16'),
    ('Orin', 8, 'orin-nx-fp16'),
    ('Orin', 16, 'orin-agx-fp16'),
])
def test_device_at_hand(gpu, name, processors, preset):
    gpu(SimpleNamespace(name=name, multi_processor_count=processors))
    assert device_at_hand() is (preset and DEVICES[preset])


def test_device_at_hand_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert device_at_hand() is DEVICES['cpu']
