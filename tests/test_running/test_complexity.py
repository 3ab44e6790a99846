# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
import torch.nn as nn
from mmcv.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from mmengine.hub import get_config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope

import mmbasis
from mmbasis.planning import BudgetPlanner, FixedPlanner
from mmbasis.running import model_complexity


class Deformable(BaseModel):
    """Nothing but convolutions, one of each deformable kind."""

    def __init__(self):
        super().__init__()
        self.v2 = ModulatedDeformConv2dPack(3, 8, 3, padding=1, bias=True)
        self.v2_plain = ModulatedDeformConv2dPack(8, 8, 3, 2, 1, bias=False)
        self.pack = DeformConv2dPack(8, 12, 3, padding=1, groups=2)
        self.offset = nn.Conv2d(12, 18, 1)
        self.v1 = DeformConv2d(12, 6, 3, padding=1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.pack(self.v2_plain(self.v2(inputs)))
        return self.v1(x, self.offset(x))


def test_deformable_convolutions_are_counted():
    model, data = Deformable(), dict(inputs=torch.rand(1, 3, 12, 10))
    found = model_complexity(model, data)
    assert set(found['uncounted']) == {'aten::sigmoid'}
    large, small = 12 * 10, 6 * 5
    assert found['macs'] == (
        large * (8 + 27) * 3 * 9  # v2 and its offset branch
        + small * (8 + 27) * 8 * 9  # v2_plain
        + small * (12 * 4 + 18 * 8) * 9  # pack
        + small * (18 * 12 + 6 * 12 * 9))  # offset, v1

    plan = mmbasis.compress(
        model,
        FixedPlanner({
            'v.*': 2,
            'pack': 1
        },
                     prediction_layers=True), [data],
        reconstruction='local')
    assert {x.kind for x in plan.layers.values()} == {'BasisDeformConv'}
    assert len(plan.layers) == 4
    totals = plan.totals()['macs']
    after = model_complexity(model, data)
    assert found['macs'] - after['macs'] == (totals['before'] -
                                             totals['after']) > 0


@pytest.fixture
def detection():
    init_default_scope('mmdet')
    yield
    init_default_scope('mmengine')


@pytest.mark.parametrize(
    'forms', [['output'], ['output', 'input', 'both', 'spatial']])
def test_detector_with_deformable_convolutions(detection, forms):
    """The counter, the plan and what the plan saves agree."""
    from mmdet.testing import demo_mm_inputs
    # at others no deformable layer is compressed
    macs = .5 if forms == ['output'] else .3
    cfg = get_config('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py').model
    cfg.backbone = dict(
        type='ResNet',
        depth=50,
        base_channels=8,
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True))
    cfg.neck.in_channels = [32, 64, 128, 256]
    model, data = MODELS.build(cfg), demo_mm_inputs(1, [[3, 128, 128]])
    before = model_complexity(model, data)
    assert not [x for x in before['uncounted'] if 'Deform' in x]
    plan = mmbasis.compress(
        model,
        BudgetPlanner(macs=macs, loss_aware=False, forms=forms), [data],
        reconstruction='local')
    kinds = {x.kind for x in plan.layers.values()}
    assert kinds == {'BasisConv', 'BasisDeformConv'}
    assert {x.form for x in plan.layers.values()
            if x.kind == 'BasisDeformConv'} <= set(forms)
    totals = plan.totals()['macs']
    saved = before['macs'] - model_complexity(model, data)['macs']
    assert saved == pytest.approx(totals['before'] - totals['after'])
    assert totals['after'] <= macs * totals['before']
