# Copyright (c) mmbasis authors. All rights reserved.
import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from mmbasis.compression import apply_plan, compress
from mmbasis.layers import BasisLayer
from mmbasis.planning import BudgetPlanner, CompressionPlan, FixedPlanner


def network(width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=width),
        nn.Conv2d(width, 12, 3, padding=1), nn.Conv2d(12, 12, 3)).eval()


@pytest.fixture
def plan():
    planner = BudgetPlanner(
        macs=0.5, exclude=['4'], overrides={'0': 2}, round_to=2)
    return compress(network(), planner, [torch.rand(2, 3, 9, 9)])


def test_json_round_trip(plan, tmp_path):
    path = tmp_path / 'plan.json'
    plan.save(str(path))
    again = CompressionPlan.load(str(path))
    assert again.layers == plan.layers and again.dense == plan.dense
    assert again.norm == plan.norm
    assert again.totals() == plan.totals()
    assert again.predicted_ms == plan.predicted_ms != {}
    assert again.dumps() == plan.dumps()
    assert [x.name for x in tmp_path.iterdir()] == ['plan.json']


def test_plain_types(plan):
    data = plan.to_dict()
    assert json.loads(json.dumps(data))['layers'] == data['layers']
    assert CompressionPlan.from_dict(data) == plan


def test_one_line_for_each_layer(plan):
    lines = plan.dumps().splitlines()
    for name, entry in plan.layers.items():
        line, = (x for x in lines if x.startswith(f'    "{name}": '))
        assert f'"rank": {json.dumps(entry.rank)}, ' in line
        assert f'"input_rank": {json.dumps(entry.input_rank)}' in line
    for name in plan.dense:
        line, = (x for x in lines if x.startswith(f'    "{name}": '))
        assert '"reason": ' in line
    for name, time in plan.predicted_ms.items():
        assert f'    "{name}": {json.dumps(time)}' in [
            x.rstrip(',') for x in lines]
    other = copy.deepcopy(plan)
    other.layers['0'] = replace(other.layers['0'], rank=1)
    changed = [a for a, b in zip(lines, other.dumps().splitlines()) if a != b]
    assert len(changed) == 1


def test_totals_are_those_of_the_layers_that_count(plan):
    weights = {'0': 8 * 27 + 8, '3': 12 * 72 + 12}
    assert set(plan.layers) == {'0', '3'}
    assert plan.totals()['params']['before'] == sum(weights.values())
    macs = 8 * 27 * 49 + 12 * 72 * 25
    assert plan.totals()['macs']['before'] == macs
    # all convolutions: the depthwise and the excluded one, too
    convs = plan.totals(convs_only=True)['macs']
    rest = 8 * 9 * 25 + 12 * 108 * 9
    assert convs['before'] == macs + rest
    assert convs['after'] == plan.totals()['macs']['after'] + rest


def test_totals_without_linear_layers():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 30))
    planner = BudgetPlanner(macs=0.6, prediction_layers=True)
    plan = compress(model, planner, [torch.rand(2, 3, 9, 9)])
    assert plan.totals(convs_only=True)['macs']['before'] == 8 * 27 * 49
    assert plan.totals()['macs']['before'] == 8 * 27 * 49 + 240


def test_plans_of_version_1_are_read(plan):
    """They know the output form only, and no input_rank."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    plan = compress(model, FixedPlanner({'1': 3}), [torch.rand(2, 4, 9, 9)])
    data = json.loads(plan.dumps())
    for entry in data['layers'].values():
        assert entry.pop('input_rank') is None
        assert entry.pop('spatial') is False
    assert data.pop('predicted_ms')
    assert CompressionPlan.from_dict(
        dict(data, version=1)) == replace(plan, predicted_ms={})


def test_spatial_forms_say_so():
    model = nn.Sequential(nn.Conv2d(4, 24, 3), nn.Conv2d(24, 24, 3))
    planner = BudgetPlanner(macs=.5, forms=['spatial'], prediction_layers=True)
    plan = compress(model, planner, [torch.rand(9, 4, 9, 9)])
    entry = plan.layers['1']
    assert entry.form == 'spatial' and entry.ranks.spatial
    assert 1 <= entry.rank < entry.full_rank == 72
    assert 0 < entry.energy <= 1
    again = CompressionPlan.from_dict(json.loads(plan.dumps()))
    assert again == plan and again.structure == plan.structure
    other = replace(entry, spatial=False)
    plan.layers['1'] = other
    assert again.structure != plan.structure


# ----------------------------------------------------------------- refusals
def test_newer_version_is_refused(plan, tmp_path):
    data = dict(plan.to_dict(), version=3)
    with pytest.raises(ValueError, match='version 3.*upgrade mmbasis'):
        CompressionPlan.from_dict(data)
    path = tmp_path / 'plan.json'
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match='plan.json.*version 3'):
        CompressionPlan.load(str(path))


def malformed(**changes):
    entry = dict(
        rank=2,
        full_rank=8,
        kind='BasisConv',
        shape=[8, 3, 3, 3],
        bias=True,
        energy=0.5,
        macs=[2, 1],
        params=[2, 1])
    return dict(version=1, layers={'0': {**entry, **changes}})


@pytest.mark.parametrize(
    'data', [
        None,
        [],
        {},
        'plan',
        dict(layers={}),
        dict(version='1', layers={}),
        dict(version=None, layers={}),
        dict(version=1),
        dict(version=1, layers=[]),
        dict(version=1, layers=None),
        dict(version=1, layers={'0': None}),
        dict(version=1, layers={'0': dict(rank=3)}),
        dict(version=1, layers={}, dense=[1]),
        dict(version=1, layers={}, dense={'0': dict(ransom=3)}),
        malformed(unknown=3),
        dict(version=2, layers={}, predicted_ms=3),
        dict(version=2, layers={}, predicted_ms=dict(cpu=3)),
        dict(version=2, layers={}, predicted_ms=dict(cpu=dict(before=1))),
        dict(version=2, layers={}, predicted_ms=dict(
            cpu=dict(before=0, after=1))),
        dict(version=2, layers={}, predicted_ms=dict(
            cpu=dict(before='x', after=1))),
        malformed(rank='2'),
        malformed(rank=2.5),
        malformed(rank=0),
        malformed(rank=None),
        malformed(shape=None),
        malformed(macs=7),
    ],
    ids=str)
def test_malformed_data(data):
    with pytest.raises(ValueError, match='plan'):
        CompressionPlan.from_dict(data)


def test_well_formed_counterpart():
    assert CompressionPlan.from_dict(malformed()).layers['0'].rank == 2


def test_files_that_are_no_plans(plan, tmp_path):
    path = tmp_path / 'plan.json'
    with pytest.raises(FileNotFoundError, match='plan.json'):
        CompressionPlan.load(str(path))
    path.write_text(plan.dumps()[:200])
    with pytest.raises(ValueError, match='plan.json is not JSON'):
        CompressionPlan.load(str(path))
    path.write_text('{"model": 3}')
    with pytest.raises(ValueError, match='plan.json: .* not a compression'):
        CompressionPlan.load(str(path))


class Deeper(nn.Sequential):

    def __init__(self):
        super().__init__(*network(), nn.Conv2d(12, 12, 3))


@pytest.mark.parametrize(
    'model, message', [
        (network(16), '0: weights of shape'),
        (nn.Sequential(*list(network())[:3]), '3: no such layer'),
        (nn.Sequential(nn.Linear(4, 4),
                       *list(network())[1:]), '0: a Linear is'),
        (nn.Sequential(*list(network())[:4]), '4: no such layer'),
        (Deeper(), '5: not in the plan'),
    ],
    ids=lambda x: x if isinstance(x, str) else '')
def test_plan_of_another_model(plan, model, message):
    model = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match='plan is of another model') as error:
        apply_plan(model, plan)
    assert message in str(error.value)
    assert not any(isinstance(m, BasisLayer) for m in model.modules())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    model.load_state_dict(before)  # and it still takes dense weights


def test_rank_past_full_leaves_the_model_alone(plan):
    plan.layers['3'] = replace(plan.layers['3'], rank=1000)
    model = network()
    with pytest.raises(ValueError, match=r'\[1, 12\], but got 1000'):
        apply_plan(model, plan)
    assert not any(isinstance(m, BasisLayer) for m in model.modules())


def test_plan_written_by_hand(plan):
    """Only the layers to be compressed."""
    model = network()
    plan.dense.clear()
    del plan.layers['0']
    apply_plan(model, plan)
    compressed = [
        name for name, m in model.named_modules() if isinstance(m, BasisLayer)
    ]
    assert compressed == ['3']


@pytest.mark.parametrize('data_aware', [False, True])
def test_following_a_plan_gives_the_same_model(tmp_path, data_aware):
    batches = [torch.rand(2, 3, 9, 9)]
    model, x = network(), torch.rand(2, 3, 9, 9)
    plan = compress(model, BudgetPlanner(macs=0.5, data_aware=data_aware),
                    batches)
    plan.save(str(tmp_path / 'plan.json'))
    again = network()
    followed = compress(again,
                        CompressionPlan.load(str(tmp_path / 'plan.json')),
                        batches)
    assert followed.layers == plan.layers
    assert torch.equal(again(x), model(x))


class Classifier(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.ModuleDict(dict(fc=nn.Linear(8, 30)))

    def forward(self, x):
        return self.head.fc(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize('data_aware', [False, True])
def test_following_a_plan_for_prediction_layers(data_aware):
    batches = [torch.rand(2, 3, 9, 9)]
    torch.manual_seed(0)
    model = Classifier()
    again = copy.deepcopy(model)
    planner = BudgetPlanner(
        macs=0.6,
        prediction_layers=True,
        data_aware=data_aware,
        overrides={'head.fc': 3})
    plan = compress(model, planner, batches)
    assert 'head.fc' in plan.layers
    compress(again, plan, batches)
    assert torch.equal(again(batches[0]), model(batches[0]))
