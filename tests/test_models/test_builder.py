# Copyright (c) mmbasis authors. All rights reserved.
"""Configs of compressed models: written, read and built again."""
import pytest
import torch
import torch.nn as nn
from mmengine.config import Config
from mmengine.model.weight_init import KaimingInit, PretrainedInit
from mmengine.registry import HOOKS, MODELS, init_default_scope

from mmbasis import CompressionPlan, compress
from mmbasis.compression import basis_layers
from mmbasis.hooks import BasisCompressionHook
from mmbasis.models import (
    BasisModel,
    build_compressed,
    dense_architecture,
    standalone_config,
)
from mmbasis.utils import load_config
from tests.toy import ToyNet

LAZY = """
from mmengine.config import read_base
from mmengine.dataset import DefaultSampler, default_collate
from mmengine.hooks import EMAHook
from mmengine.optim import DefaultOptimWrapperConstructor
from torch.optim import SGD
from tests.toy import ToyImages, ToyNet
from mmbasis.hooks import BasisCompressionHook
default_scope = None
model = dict(type=ToyNet, width=8)
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(type=ToyImages),
    sampler=dict(type=DefaultSampler, shuffle=True),
    collate_fn=dict(type=default_collate))
optim_wrapper = dict(
    constructor=DefaultOptimWrapperConstructor,
    optimizer=dict(type=SGD, lr=float('inf')))
custom_hooks = [dict(type=EMAHook), dict(
    type=BasisCompressionHook, planner=dict(type='EnergyPlanner'))]
custom_imports = dict(imports='json', allow_failed_imports=True)
"""


def compressed(model, images, samples):
    """The plan of a model, which is compressed in place."""
    batches = [dict(inputs=images, data_samples=samples)]
    planner = dict(type='EnergyPlanner', threshold=.5)
    return compress(model.eval(), planner, batches)


@pytest.fixture(scope='module')
def plan():
    return compressed(ToyNet(width=8), torch.rand(2, 3, 8, 8), [0, 1])


@pytest.fixture
def write(tmp_path):

    def write(text, name='config.py'):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def reloaded(cfg, plan, write):
    text = standalone_config(cfg, plan, '/there/compressed.pth').pretty_text
    return load_config(write(text, 'compressed.py'))


def test_pure_python_config_is_read_again(write, plan):
    cfg = load_config(write(LAZY))
    again = reloaded(cfg, plan, write)
    model = MODELS.build(again.model)
    assert type(model) is ToyNet and model.conv1.in_channels == 3
    assert dict(basis_layers(model))
    assert type(MODELS.build(dense_architecture(again))) is ToyNet
    assert again.optim_wrapper.optimizer.type == 'torch.optim.sgd.SGD'
    assert again.optim_wrapper.optimizer.lr == float('inf')
    assert again.custom_imports == dict(
        imports=['json', 'mmbasis'], allow_failed_imports=True)
    kinds = [type_of(HOOKS, x) for x in again.custom_hooks]
    assert kinds == ['EMAHook', 'BasisCompressionHook']
    assert again.custom_hooks[-1] == dict(type='mmbasis.BasisCompressionHook')
    from mmbasis.datasets import calibration_dataloader
    assert len(next(iter(calibration_dataloader(again, 0)))['inputs']) == 4
    # the config itself is as it was
    assert cfg.model.type is ToyNet and 'plan' not in cfg.model


def type_of(registry, config):
    return registry.get(config['type']).__name__


def test_class_of_an_installed_library(write, plan):
    text = """
from mmpretrain.models import GlobalAveragePooling, ImageClassifier
from mmpretrain.models import LinearClsHead, ResNet_CIFAR
model = dict(
    type=ImageClassifier,
    backbone=dict(type=ResNet_CIFAR, depth=18, num_stages=4),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=10, in_channels=512))
default_scope = None
test_dataloader = dict(batch_size=2)
"""
    cfg = load_config(write(text))
    assert cfg.default_scope == 'mmpretrain'
    assert cfg.test_dataloader.collate_fn.type == 'default_collate'
    init_default_scope('mmpretrain')
    from mmpretrain.structures import DataSample
    try:
        dense = MODELS.build(dense_architecture(cfg))
        images = torch.zeros(2, 3, 32, 32)
        plan = compressed(dense, images, [DataSample().set_gt_label(0)] * 2)
        model = MODELS.build(reloaded(cfg, plan, write).model)
    finally:
        init_default_scope('mmengine')
    assert type(model) is type(dense)
    names = list(dict(basis_layers(model)))
    assert names and names == list(dict(basis_layers(dense)))


@pytest.mark.parametrize('value, message', [
    (lambda x: x, r'cfg\.model\.head\.type .*cannot be imported'),
    (object(), r'cfg\.model\.head\.type'),
])
def test_types_that_no_text_can_name(value, message, plan):
    cfg = Config(dict(model=dict(type='ToyNet', head=dict(type=value))))
    with pytest.raises(TypeError, match=message):
        standalone_config(cfg, plan, 'x.pth')


@pytest.mark.parametrize('value', [torch.float16, nn.ReLU, lambda x: x])
def test_objects_that_are_no_type(value, plan):
    cfg = Config(dict(model=dict(type='ToyNet', layers=[dict(act=value)])))
    with pytest.raises(TypeError, match=r'cfg\.model\.layers\[0\]\.act'):
        standalone_config(cfg, plan, 'x.pth')


@pytest.mark.parametrize('spelled', [
    'mmbasis.BasisCompressionHook', 'BasisCompressionHook',
    'mmbasis.hooks.BasisCompressionHook', BasisCompressionHook
])
def test_one_hook_is_written(spelled, plan):
    others = [dict(type='EMAHook'), dict(type='mmbasis.SpectrumHook')]
    cfg = Config(
        dict(
            model=dict(type='ToyNet'),
            custom_hooks=[others[0], dict(type=spelled, planner=1),
                          others[1]]))
    found = standalone_config(cfg, plan, 'x.pth')
    assert found.custom_hooks == [
        *others, dict(type='mmbasis.BasisCompressionHook')
    ]


@pytest.mark.parametrize('given, expected', [
    (None, dict(imports=['mmbasis'], allow_failed_imports=False)),
    (dict(imports='a'),
     dict(imports=['a', 'mmbasis'], allow_failed_imports=False)),
    (dict(imports=['mmbasis', 'b'], allow_failed_imports=True),
     dict(imports=['mmbasis', 'b'], allow_failed_imports=True)),
])
def test_imports(given, expected, plan):
    cfg = Config(dict(model=dict(type='ToyNet'), custom_imports=given))
    found = standalone_config(cfg, plan, 'x.pth').custom_imports
    assert found == expected


@pytest.mark.parametrize(
    'wrapper',
    ['mmbasis.BasisModel', 'mmbasis.models.BasisModel', BasisModel])
def test_wrapper_in_any_spelling(wrapper):
    cfg = Config(
        dict(
            model=dict(
                type=wrapper,
                architecture=dict(type='ToyNet'),
                data_preprocessor=dict(type='X'))))
    assert dense_architecture(cfg) == dict(
        type='ToyNet', data_preprocessor=dict(type='X'))


@pytest.mark.parametrize('pretrained', [
    dict(type='Pretrained', checkpoint='no/such.pth'),
    dict(type='mmengine.Pretrained', checkpoint='no/such.pth'),
    dict(type=PretrainedInit, checkpoint='no/such.pth'),
    [
        dict(type=KaimingInit, layer='Conv2d'),
        dict(type='Pretrained', checkpoint='no/such.pth')
    ],
])
def test_pretrained_weights_are_dropped(pretrained):

    @MODELS.register_module(name='WithInit', force=True)
    class WithInit(ToyNet):

        def __init__(self, init_cfg=None):
            super().__init__()
            self.init_cfg = init_cfg

    model = build_compressed(
        dict(type='WithInit', init_cfg=pretrained), CompressionPlan({}))
    model.init_weights()
