# Copyright (c) mmbasis authors. All rights reserved.
"""Self-supervised models: no mode predict, several views, state that each
pass changes."""
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

from mmbasis.running import (
    Pass,
    adapter_of,
    current_pass,
    evaluation,
    fisher_loss,
    model_complexity,
    train_deterministically,
    undisturbed,
)

RESNET = dict(
    type='ResNet', depth=18, stem_channels=8, base_channels=8)
PROJECTION = dict(
    type='NonLinearNeck',
    in_channels=64,
    hid_channels=16,
    out_channels=8,
    with_avg_pool=True)
SIMCLR = dict(
    type='SimCLR',
    backbone=RESNET,
    neck=PROJECTION,
    head=dict(
        type='ContrastiveHead', loss=dict(type='CrossEntropyLoss')))
MOCO = dict(
    type='MoCo',
    queue_len=16,
    feat_dim=8,
    backbone=RESNET,
    neck=PROJECTION,
    head=SIMCLR['head'])
MOCO_V3 = dict(
    type='MoCoV3',
    backbone=RESNET,
    neck=PROJECTION,
    head=dict(
        type='MoCoV3Head',
        predictor=dict(
            type='NonLinearNeck',
            in_channels=8,
            hid_channels=16,
            out_channels=8,
            with_avg_pool=False),
        loss=dict(type='CrossEntropyLoss'),
        temperature=1.))
SWAV = dict(
    type='SwAV',
    backbone=RESNET,
    neck=dict(
        type='SwAVNeck',
        in_channels=64,
        hid_channels=16,
        out_channels=8,
        with_avg_pool=True),
    head=dict(
        type='SwAVHead',
        loss=dict(
            type='SwAVLoss',
            feat_dim=8,
            num_prototypes=12,
            num_crops=[2])))
MAE = dict(
    type='MAE',
    backbone=dict(
        type='MAEViT',
        arch=dict(
            embed_dims=24,
            num_layers=2,
            num_heads=2,
            feedforward_channels=48),
        img_size=32,
        patch_size=8),
    neck=dict(
        type='MAEPretrainDecoder',
        num_patches=16,
        patch_size=8,
        embed_dim=24,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2),
    head=dict(
        type='MAEPretrainHead',
        patch_size=8,
        loss=dict(type='PixelReconstructionLoss', criterion='L2')))
MODELS_BY_NAME = dict(
    simclr=SIMCLR, moco=MOCO, moco_v3=MOCO_V3, swav=SWAV, mae=MAE)


def batch(name):
    generator = torch.Generator().manual_seed(0)
    views = [
        255 * torch.rand(4, 3, 32, 32, generator=generator) for _ in range(2)
    ]
    return dict(
        inputs=views[0] if name == 'mae' else views,
        data_samples=[DataSample() for _ in range(4)])


@pytest.fixture(params=MODELS_BY_NAME)
def model_and_data(request):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    config = dict(
        MODELS_BY_NAME[request.param],
        data_preprocessor=dict(
            type='SelfSupDataPreprocessor',
            mean=[128.] * 3,
            std=[64.] * 3))
    model = MODELS.build(config)
    # averaged copies differ from what they follow, as in training
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(.1 * torch.randn_like(parameter))
        if request.param == 'swav':  # each pass normalises its prototypes
            weight = model.head.loss_module.prototypes.weight
            weight.copy_(torch.nn.functional.normalize(weight))
    yield model, batch(request.param)
    init_default_scope('mmengine')


def state(model):
    return {k: x.clone() for k, x in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert [k for k, x in before.items() if not torch.equal(after[k], x)] == []
    assert after.keys() == before.keys()


def test_runs_whole_and_leaves_no_trace(model_and_data):
    model, data = model_and_data
    model.train()
    before, pointer = state(model), dict(model.named_buffers())
    adapter, ran = adapter_of(model), set()
    for name in ('backbone', 'neck'):
        getattr(model, name).register_forward_hook(
            lambda *_, name=name: ran.add(name))
    with evaluation(model):
        first = adapter.predict(data)['loss']
        torch.rand(3)
        assert torch.equal(adapter.predict(data)['loss'], first)
    assert ran == {'backbone', 'neck'} and torch.isfinite(first)
    assert_same(model, before)
    assert all(x is pointer[k] for k, x in model.named_buffers())
    assert not [x for x in model.modules() if 'update_parameters' in vars(x)]
    assert adapter.count_images(data) == 4


def test_outputs_and_complexity(model_and_data):
    model, data = model_and_data
    before, adapter = state(model), adapter_of(model)
    with evaluation(model):
        outputs = adapter.outputs(data)
        again = adapter.outputs(data)
        assert adapter.logits(data) is None
        assert len(outputs) == len(again) > 0
        assert all(torch.equal(a, b) for a, b in zip(outputs, again))
        with torch.no_grad():
            next(model.backbone.parameters()).mul_(2)
        assert not torch.equal(adapter.outputs(data)[0], outputs[0])
        with torch.no_grad():
            next(model.backbone.parameters()).div_(2)
    assert_same(model, before)
    assert model_complexity(model, data)['macs'] > 0


def test_loss_has_gradients(model_and_data):
    model, data = model_and_data
    before, adapter = state(model), adapter_of(model)
    outputs = []
    with undisturbed(model), evaluation(model):
        adapter.predict(data)
        train_deterministically(model)
        handle = model.backbone.register_forward_hook(
            lambda _, args, y: outputs.extend(
                x for x in (y if isinstance(y, tuple) else [y])
                if x.requires_grad))
        with torch.enable_grad():
            inputs = adapter.prepare(data, gradients=True)
            loss = fisher_loss(adapter, inputs, 0, False)
            gradient, = torch.autograd.grad(loss, outputs[:1])
        handle.remove()
    assert gradient.abs().sum() > 0
    assert_same(model, before)


def test_passes_that_overlap(model_and_data):
    """They see and leave the same state; weights that are written while they
    stand stay written."""
    model, data = model_and_data
    before, adapter = state(model), adapter_of(model)
    last = list(model.neck.parameters())[-1]

    def stop(*_):
        if current_pass() is not None:
            current_pass().stop('neck', None)

    with evaluation(model), Pass(adapter, data) as a, Pass(adapter,
                                                           data) as b:
        adapter.predict(data)
        handle = model.neck.register_forward_pre_hook(stop)
        for one in (a, b):
            one.advance()
        assert a.name == b.name == 'neck'
        last.add_(1)
        while a.name or b.name:
            for one in (a, b):
                if one.name:
                    one.advance()
        handle.remove()
    assert not [x for x in model.modules() if 'update_parameters' in vars(x)]
    written = next(k for k, x in model.named_parameters() if x is last)
    before[written] += 1
    for key, value in state(model).items():
        torch.testing.assert_close(value, before[key], msg=key)
