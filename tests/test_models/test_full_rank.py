# Copyright (c) mmbasis authors. All rights reserved.
"""Classifiers of mmpretrain, through all that a plan does to them."""
import copy

import pytest
import torch
import torch.nn as nn
from mmengine.analysis import FlopAnalyzer
from mmengine.registry import MODELS, init_default_scope

import mmbasis
from mmbasis.compression import basis_layers
from mmbasis.planning import BudgetPlanner, FixedPlanner

# backbone, channels of its output, whether its output is a map
NETWORKS = {
    'resnet18': (dict(type='ResNet', depth=18), 512, True),
    'resnext50': (dict(type='ResNeXt', depth=50, groups=32,
                       width_per_group=4), 2048, True),
    'densenet121': (dict(type='DenseNet', arch='121'), 1024, True),
    'vgg16_bn': (dict(type='VGG', depth=16,
                      norm_cfg=dict(type='BN')), 512, True),
    'convnext_tiny': (dict(type='ConvNeXt', arch='tiny'), 768, False),
    'swin_tiny': (dict(
        type='SwinTransformer',
        arch='tiny',
        img_size=64,
        stage_cfgs=dict(block_cfgs=dict(window_size=2))), 768, True),
}

every_network = pytest.mark.parametrize('name', NETWORKS)


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmpretrain')
    yield
    init_default_scope('mmengine')


def build(name):
    backbone, channels, is_map = NETWORKS[name]
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling') if is_map else None,
            head=dict(
                type='LinearClsHead', num_classes=10, in_channels=channels),
            data_preprocessor=dict(type='ClsDataPreprocessor')))
    randomise(model)
    return model.eval()


def randomise(model):
    """Weights whose outputs depend on the image, norms that do something."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)


def images(seed, count=2, side=64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side, side, generator=generator)


@torch.no_grad()
def outputs(model, x):
    return model(x, mode='tensor')


def difference(actual, expected):
    # of what depends on the image, so that biases do not hide an error
    spread = (expected - expected.mean(0)).norm()
    assert spread > 1e-3 * expected.norm() > 0
    return ((actual - expected).norm() / spread).item()


def macs_by_module(model):
    counter = FlopAnalyzer(model, images(0, 1))
    counter.unsupported_ops_warnings(False)
    counter.uncalled_modules_warnings(False)
    return counter.by_module()


def check_full_rank(model, planner, x, **kwargs):
    expected = outputs(model, x)
    # calibrated on other images than it is compared on
    plan = mmbasis.compress(model, planner, [dict(inputs=images(1))], **kwargs)
    layers = dict(basis_layers(model))
    assert layers.keys() == plan.layers.keys()
    for name, entry in plan.dense.items():
        assert not entry.compressible, (name, entry.reason)
    assert all(p.rank == p.full_rank for p in plan.layers.values())
    assert difference(outputs(model, x), expected) < 1e-4
    return plan


@pytest.mark.parametrize('name, data_aware, reconstruction', [
    *((name, True, 'local') for name in NETWORKS),
    ('resnet18', False, 'local'),
    ('resnet18', True, 'sequential'),
    ('densenet121', True, 'sequential'),
    ('vgg16_bn', True, 'sequential'),
])
def test_full_rank_is_the_same_function(name, data_aware, reconstruction):
    planner = FixedPlanner({'.*': 'full'},
                           allow_costlier=True,
                           prediction_layers=True,
                           data_aware=data_aware)
    plan = check_full_rank(
        build(name), planner, images(2), reconstruction=reconstruction)
    assert 'head.fc' in plan.layers
    # only what has nothing to gain is left out
    assert all('depthwise' in p.reason for p in plan.dense.values())
    assert len(plan.layers) > 12


@pytest.mark.slow
def test_full_rank_of_the_whole_vgg16():
    """With its classifier of 4096 channels, at 224x224."""
    backbone = dict(NETWORKS['vgg16_bn'][0], num_classes=10)
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=backbone,
            head=dict(type='ClsHead'),
            data_preprocessor=dict(type='ClsDataPreprocessor')))
    randomise(model)
    model.eval()
    x = images(2, 2, 224)
    expected = outputs(model, x)
    planner = FixedPlanner({'.*': 'full'},
                           allow_costlier=True,
                           prediction_layers=True)
    plan = mmbasis.compress(
        model, planner, [dict(inputs=x)], reconstruction='local')
    assert 'backbone.classifier.0' in plan.layers and not plan.dense
    # the images are hardly told apart by random weights of this depth
    error = (outputs(model, x) - expected).norm()
    assert error < 1e-4 * expected.norm()


@every_network
def test_half_the_macs(name):
    model = build(name)
    dense = copy.deepcopy(model)
    plan = mmbasis.compress(
        model,
        BudgetPlanner(macs=0.5), [dict(inputs=images(1))],
        reconstruction='sequential' if name == 'resnet18' else 'local')
    totals = plan.totals()['macs']
    assert 0.45 < totals['after'] / totals['before'] <= 0.5
    before, after = macs_by_module(dense), macs_by_module(model)
    for layer, entry in plan.layers.items():
        assert entry.macs == [before[layer], after[layer]], layer
        assert after[layer] < before[layer]
    for layer, entry in plan.dense.items():
        assert entry.macs == before[layer] == after[layer], layer
    saved = totals['before'] - totals['after']
    assert before[''] - after[''] == pytest.approx(saved)
    x = images(2)
    result = outputs(model, x)
    assert result.shape == (2, 10) and torch.isfinite(result).all()
    assert difference(result, outputs(dense, x)) > 1e-3
