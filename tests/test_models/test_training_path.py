# Copyright (c) mmbasis authors. All rights reserved.
"""Detectors that do other things in training than in evaluation mode."""
import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.hub import get_config
from mmengine.registry import init_default_scope

from mmbasis.compression import Recipe, analyze
from mmbasis.hooks.training_hooks import losses_of
from mmbasis.models.distillation import Distillation
from mmbasis.running import train_deterministically

#: what differs
CONFIGS = {
    'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou'
    '_1x_coco.py':
    'the unit of boxes',
    'vfnet/vfnet_r50_fpn_1x_coco.py':
    'the number of outputs',
    'reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py':
    'the outputs',
    'dino/dino-4scale_r50_8xb2-12e_coco.py':
    'queries to denoise'
}


@pytest.fixture(params=CONFIGS, ids=[x.split('/')[0] for x in CONFIGS])
def detector(request):
    cfg = get_config(f'mmdet::{request.param}').model
    init_default_scope('mmdet')
    cfg.backbone.update(depth=18, init_cfg=None)
    channels = [64, 128, 256, 512]
    cfg.neck.in_channels = channels[-len(cfg.neck.in_channels):]
    if 'decoder' in cfg:
        cfg.num_queries = 10
        cfg.encoder.num_layers = cfg.decoder.num_layers = 2
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    data = demo_mm_inputs(2, [(3, 64, 64)] * 2, num_items=[2, 1])
    return model.eval(), data


def test_loss_is_that_of_training(detector):
    model, data = detector
    modes = [x.training for x in model.modules()]
    recipe = Recipe.of(planner=dict(type='BudgetPlanner', macs=.5))
    analysis = analyze(model, recipe, [data])
    assert modes == [x.training for x in model.modules()]
    # unknown where random weights let no gradient through
    found = [
        analysis.statistics[x.name].sensitivity
        for x in analysis.selection.chosen
    ]
    known = [x for x in found if x is not None]
    assert known and all(x.isfinite().all() for x in known)
    assert sum(float(x.sum()) for x in known) > 0
    assert 0 < losses_of(model, [data]) < float('inf')


def test_dense_model_has_nothing_to_learn_from_itself(detector):
    model, data = detector
    distillation = Distillation(model)
    distillation.take(model, None)
    train_deterministically(model)
    data = model.data_preprocessor(data, True)
    kwargs = dict(data, mode='loss')
    losses = distillation.losses(model, (), kwargs)
    terms = {k: float(v) for k, v in losses.items() if 'distill' in k}
    assert 'loss_distill_bbox_head' in terms
    assert max(terms.values()) < 1e-9
