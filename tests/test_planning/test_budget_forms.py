# Copyright (c) mmbasis authors. All rights reserved.
"""Forms of a basis compete in one budget, of MACs or of a device's time."""
import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from mmbasis import compress
from mmbasis.compression import basis_layers
from mmbasis.planning import BasePlanner, BudgetPlanner, Ranks
from mmbasis.planning.budget import Options, _fastest, _spend
from mmbasis.planning.costs import Costs, DeviceCost
from mmbasis.registry import PLANNERS
from mmbasis.running import model_complexity
from tests.analyses import measured

ALL = ['output', 'input', 'both', 'spatial']


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).eval()


def images(count=32):
    """Of few colours and directions: something can be saved at the inputs."""
    mixing = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    x = torch.randn(count, 3, 12, 12,
                    generator=torch.Generator().manual_seed(4))
    return torch.einsum('nchw,cd->ndhw', x, mixing)


def error(model, reference):
    with torch.no_grad():
        x = images()
        return float((model(x) - reference(x)).square().sum())


@pytest.mark.parametrize('kwargs', [
    dict(), dict(loss_aware=False), dict(data_aware=False)])
@pytest.mark.parametrize('forms', [*([x] for x in ALL), ALL])
@pytest.mark.parametrize('macs', [.3, .6])
def test_budget_is_kept_in_all_forms(macs, forms, kwargs):
    model, reference = network(), network()
    if forms == ['spatial']:  # it knows no transposed ones
        kwargs = dict(kwargs, exclude=['6'])
    plan = compress(model, BudgetPlanner(macs=macs, forms=forms, **kwargs),
                    [images()])
    totals = plan.totals()['macs']
    assert .8 * macs <= totals['after'] / totals['before'] <= macs
    assert {x.form for x in plan.layers.values()} <= set(forms)
    counted, dense = (model_complexity(x, images(1))['macs']
                      for x in (model, reference))
    saved = totals['before'] - totals['after']
    assert dense - counted == pytest.approx(saved)


def test_all_forms_lose_less_than_one():
    reference, errors = network(), {}
    for forms in (['output'], ALL):
        model = copy.deepcopy(reference)
        compress(model, BudgetPlanner(macs=.35, forms=forms), [images(64)])
        errors[len(forms)] = error(model, reference)
    assert errors[4] < .9 * errors[1]


def test_full_ranks_of_all_forms_are_the_same_function():
    """By a planner of a user's own, who names both sides."""

    @PLANNERS.register_module(force=True)
    class Full(BasePlanner):
        forms = tuple(ALL)

        def choose(self, free, decided):
            forms = [Ranks(None, 3), Ranks(24, 24), Ranks(12, 12),
                     Ranks(16, 24), Ranks(5)]
            return forms[:len(free)]

    model, reference = network().double(), network().double()
    plan = compress(model, dict(type='Full', prediction_layers=True),
                    [images().double()])
    assert len(dict(basis_layers(model))) == len(plan.layers) == 5
    x = images().double()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('choice, words', [
    (Ranks(3, 25), r'rank 25 given for 2: it must be in \[1, 24\]'),
    (Ranks(0, 3), 'rank 0 given for 2'),
    (Ranks(10, 1), r'rank 10 given for 2: it must be in \[1, 9\]'),
    (Ranks(None, None), 'rank None given for 2'),
])
def test_wrong_choices_are_named(choice, words):

    class Wrong(BasePlanner):

        def choose(self, free, decided):
            return [choice if x.layer.name == '2' else None for x in free]

    with pytest.raises(ValueError, match=words):
        Wrong().plan(measured(network(), [images()]))


def test_pointwise_layers_have_one_side():
    class Wrong(BasePlanner):

        def choose(self, free, decided):
            return [Ranks(None, 3) for x in free]

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match='a Linear, can have no input basis'):
        Wrong(prediction_layers=True).plan(
            measured(model, [torch.randn(9, 8)]))


@pytest.mark.parametrize('forms', ['both', [], ['sideways']])
def test_wrong_forms_are_named(forms):
    with pytest.raises(ValueError, match='forms must be a list of output'):
        BudgetPlanner(macs=.5, forms=forms)


# ------------------------------------------------------------------ devices
def costs_of(model):
    analysis = measured(model, [images()])
    return [Costs(x, analysis.statistics[x.name])
            for x in analysis.selection.chosen]


@pytest.mark.parametrize('name', ['cpu', 'xavier-fp16', 'h100-fp16'])
def test_time_of_a_device(name):
    """Positive, rises with the ranks, and a grid is what single calls are."""
    cost = DeviceCost(name)
    for x in costs_of(network()):
        assert cost.of(x, None) > 0
        full = x.layer.full_rank
        times = [cost.of(x, rank) for rank in range(1, full + 1)]
        assert cost.of(x, Ranks(np.arange(1, full + 1))).tolist() == times
        smooth = np.maximum.accumulate(times)
        assert np.allclose(smooth, times, rtol=.5)
        if x.layer.narrowable:
            both = Ranks(np.array([2, full]), np.array([1, 3]))
            assert cost.of(x, both).tolist() == [
                cost.of(x, Ranks(2, 1)), cost.of(x, Ranks(full, 3))]


def wide():
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        layers += [nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(128, 5))


@pytest.mark.parametrize('forms', [['output'], ALL])
def test_latency_without_a_table(forms):
    """The plan meets the budget by the device's model, and no layer is slower
    than dense."""
    planner = BudgetPlanner(latency=.6, device='xavier-fp32', forms=forms)
    analysis = measured(wide(), [torch.randn(1, 128, 28, 28)])
    plan = planner.plan(analysis)
    dense = after = 0.
    for x in (Costs(x, analysis.statistics[x.name])
              for x in analysis.selection.chosen):
        entry = plan.layers.get(x.layer.name)
        before = planner.cost.of(x, None)
        now = planner.cost.of(x, entry and entry.ranks)
        assert now <= before
        dense, after = dense + before, after + now
    assert .45 * dense < after <= .6 * dense * (1 + 1e-6)
    assert plan.planner['device'] == 'xavier-fp32'


def test_no_layer_pays_on_a_fast_device():
    """On an H100 launches are all that small layers take."""
    analysis = measured(network(), [images(2)])
    with pytest.raises(ValueError, match='latency=0.5 cannot be met'):
        BudgetPlanner(latency=.5, device='h100-fp16').plan(analysis)
    plan = BudgetPlanner(latency=1., device='h100-fp16').plan(analysis)
    assert not plan.layers
    assert any('h100-fp16' in x.reason for x in plan.dense.values())


@pytest.mark.parametrize('kwargs, words', [
    (dict(latency=.5), 'latency with its table or device'),
    (dict(params=.5, device='cpu'), 'latency with its table or device'),
    (dict(macs=.5, table='t.json'), 'latency with its table or device'),
    (dict(macs=.5, device='toaster'), "'toaster'.*xavier-fp16"),
    (dict(latency=.5, device='cpu', table='t.json'), 'table or device'),
    (dict(latency=.5, device='toaster'), "'toaster'.*xavier-fp16"),
])
def test_wrong_devices_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        BudgetPlanner(**kwargs)


@pytest.mark.parametrize('inputs, outputs', [(4, 24), (24, 4), (12, 12)])
@pytest.mark.parametrize('loss_aware', [False, None])
@pytest.mark.parametrize('reconstruction', ['local', 'sequential'])
def test_full_spatial_rank_is_the_same_function(inputs, outputs, loss_aware,
                                                reconstruction):
    """With statistics of images of few directions, and in the metric of the
    loss."""

    class Split(BasePlanner):
        forms = ('spatial', )

        def choose(self, free, decided):
            return [Ranks(x.layer.full_spatial_rank, None, True)
                    for x in free]

        def _can_pay(self, costs):
            return True

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, inputs, 1), nn.ReLU(),
        nn.Conv2d(inputs, outputs, 3, padding=1, stride=2), nn.ReLU(),
        nn.Conv2d(outputs, 5, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten()).double()
    reference = copy.deepcopy(model)
    planner = Split()
    planner.loss_aware = loss_aware
    plan = compress(model, planner, [images().double()],
                    reconstruction=reconstruction)
    assert {k: x.form for k, x in plan.layers.items()} == {'2': 'spatial'}
    x = torch.randn(4, 3, 12, 12).double()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-4, atol=1e-5)


def test_no_spatial_form_before_a_normalization():
    plan = compress(network(), BudgetPlanner(macs=.6), [images()], norm=True)
    assert 'spatial' not in {x.form for x in plan.layers.values()}
    planner = BudgetPlanner(macs=1., forms=['spatial'])
    plan = compress(network(), planner, [images()], norm=True)
    assert not plan.layers
    assert 'behind a normalization' in plan.dense['2'].reason
    assert 'how a ConvTranspose2d splits' in plan.dense['6'].reason


def test_export_of_a_spatial_form(tmp_path):
    """Two convolutions, which ONNX Runtime computes as PyTorch does."""
    onnx = pytest.importorskip('onnx')
    onnxruntime = pytest.importorskip('onnxruntime')
    model = nn.Sequential(*network()[:6])
    planner = BudgetPlanner(macs=.5, forms=['spatial'], prediction_layers=True)
    plan = compress(model, planner, [images()])
    assert len(plan.layers) >= 2
    path, x = str(tmp_path / 'model.onnx'), images(2)
    torch.onnx.export(model, x, path, opset_version=13)
    kernels = [tuple(attribute.ints) for node in onnx.load(path).graph.node
               if node.op_type == 'Conv' for attribute in node.attribute
               if attribute.name == 'kernel_shape']
    assert kernels.count((3, 1)) == kernels.count((1, 3)) == len(plan.layers)
    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider'])
    found, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(found), model(x), rtol=1e-4, atol=1e-5)


def planned_time(plan, name):
    time = plan.predicted_ms[name]
    return time['after'] / time['before']


@pytest.mark.parametrize('lost, chosen', [(1.05, 10), (1.2, 20)])
def test_of_plans_about_as_good_the_fastest_is_taken(lost, chosen):
    """Rank 10 is as cheap as 20 and faster, and loses a little more."""
    table = Options(
        np.array([.1, .5, .5, 1.]), np.array([.4, .5, .9, 1.]),
        np.array([9., lost, 1., 0.]),
        [Ranks(1), Ranks(10), Ranks(20), None])
    plans = [_spend([table], .6, weight) for weight in (0., .5)]
    index, = _fastest([table], plans)
    assert table.ranks[index] == Ranks(chosen)


def test_plans_for_macs_are_fast_for_their_macs():
    """As few MACs in less time."""
    torch.manual_seed(0)
    sizes = [3, 96, 160, 160, 96, 80, 160]
    model = nn.Sequential(*(
        nn.Conv2d(*x, 3, padding=1) for x in zip(sizes, sizes[1:])))
    found = measured(model, [torch.randn(1, 3, 24, 24)])
    planner = BudgetPlanner(macs=.4)
    fast = planner.plan(found)
    planner.weights = (0., )
    best = planner.plan(found)
    assert planned_time(fast, 'cpu') < .98 * planned_time(best, 'cpu')
    for plan in (fast, best):
        macs = plan.totals()['macs']
        assert .39 < macs['after'] / macs['before'] <= .4


def test_a_fraction_of_time_is_one_of_the_network():
    """Layers make up for what stands between them."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1),
        nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1))
    modules = [y for x in plain for y in (x, nn.SiLU(), nn.MaxPool2d(1))]
    images, planner = [torch.randn(1, 3, 32, 32)], BudgetPlanner(
        latency=.6, device='cpu')
    alone, among = (planner.plan(measured(x, images))
                    for x in (plain, nn.Sequential(*modules)))
    assert planned_time(alone, 'cpu') <= .6 >= planned_time(among, 'cpu')
    assert among.predicted_ms['cpu']['before'] > (
        1.02 * alone.predicted_ms['cpu']['before'])
    assert among.totals()['macs']['after'] < alone.totals()['macs']['after']
