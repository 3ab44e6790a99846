# Copyright (c) mmbasis authors. All rights reserved.
"""The configs for detectors: they load, build, and say what they mean."""
from pathlib import Path

import pytest
import torch.nn as nn
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.registry import HOOKS, MODELS, init_default_scope

from mmbasis.planning import find_layers

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'mmdet'
BUDGETS = {'macs50': 0.5, 'macs25': 0.25}
COMPRESSING = sorted(path.stem for path in FOLDER.glob('*_coco_basis-*.py'))
DENSE = sorted({name.split('_basis-')[0] for name in COMPRESSING})
SMALL = ('rtmdet_tiny_bccd', 'retinanet_r18_bccd')


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
    yield
    init_default_scope('mmengine')


def load(name):
    return Config.fromfile(FOLDER / f'{name}.py')


def without_scopes(value):
    """The scope that inheriting from an installed config writes into it."""
    if isinstance(value, dict):
        return {
            k: without_scopes(v)
            for k, v in value.items() if k != '_scope_'
        }
    if isinstance(value, (list, tuple)):
        return [without_scopes(v) for v in value]
    return value


def types(hooks):
    return [hook['type'] for hook in hooks or []]


def test_two_budgets_of_each_detector():
    assert len(DENSE) == 11
    assert set(COMPRESSING) == {
        f'{name}_basis-{budget}'
        for name in DENSE
        for budget in BUDGETS
    }


@pytest.mark.parametrize('name', COMPRESSING)
def test_compressing_config(name):
    cfg = load(name)
    base = get_config(f'mmdet::{installed(name)}')
    assert without_scopes(cfg.model) == without_scopes(base.model)
    assert without_scopes(cfg.train_dataloader) == without_scopes(
        base.train_dataloader)
    assert cfg.custom_imports.imports == ['mmbasis']
    assert cfg.load_from.startswith('https://download.openmmlab.com/')

    # the base's hooks stay, ours comes last
    *kept, hook = cfg.custom_hooks
    assert types(kept) == types(base.get('custom_hooks'))
    assert hook.type == 'mmbasis.BasisCompressionHook'
    planner = HOOKS.build(dict(hook)).recipe.planner
    assert planner.budget == BUDGETS[name.split('_basis-')[1]]
    assert hook.calibration.num_batches * cfg.train_dataloader.batch_size >= 32

    ours, theirs = (x.optim_wrapper.optimizer for x in (cfg, base))
    assert ours.lr == pytest.approx(theirs.lr / 10)
    assert ours.type == theirs.type
    epochs = cfg.train_cfg.max_epochs
    assert epochs == 12
    for schedule in cfg.param_scheduler:
        assert not schedule.by_epoch or schedule.end <= epochs
    for hook in kept:
        assert hook.get('switch_epoch', 0) < epochs
        assert hook.get('num_last_epochs', 0) < epochs


def installed(name):
    """The config of MMDetection that one of ours builds on."""
    text = (FOLDER.parent / '_base_' / 'detectors' /
            f'{name.split("_basis-")[0]}.py').read_text()
    return text.split("'mmdet::")[1].split("'")[0]


@pytest.mark.parametrize('name', DENSE)
def test_dense_model_is_built(name):
    cfg = load(f'{name}_basis-macs50')
    cfg.model.backbone.init_cfg = None
    model = MODELS.build(cfg.model)
    layers = find_layers(model)
    total, free = (
        sum(x.module.weight.numel() for x in some)
        for some in (layers, [x for x in layers if x.obstacle is None]))
    assert free > .5 * total
    has_deformable = 'BasisDeformConv' in {
        x.kind.name
        for x in layers if x.kind
    }
    assert has_deformable == ('dconv' in name)


@pytest.mark.parametrize('name', SMALL)
def test_small_detector(name, monkeypatch):
    monkeypatch.setenv('MMBASIS_DATA', '/somewhere')
    cfg = load(name)
    model = MODELS.build(cfg.model)
    assert sum(p.numel() for p in model.parameters()) < 6e6
    assert model.bbox_head.num_classes == len(
        cfg.train_dataloader.dataset.metainfo.classes)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        assert loader.dataset.data_root == '/somewhere/bccd/BCCD/'
    # from scratch: nothing is frozen, nothing is downloaded
    assert all(p.requires_grad for p in model.parameters())
    assert 'http' not in str(cfg.model)
    model.train()
    assert all(x.training for x in model.modules()
               if isinstance(x, nn.BatchNorm2d))


@pytest.mark.parametrize('name', SMALL)
def test_small_detector_is_compressed(name):
    cfg = load(f'{name}_basis-macs50')
    assert cfg.model == load(name).model
    assert cfg.load_from.endswith(f'{name}.pth')
    hook, = (x for x in cfg.custom_hooks if 'mmbasis' in x.type)
    assert HOOKS.build(dict(hook)).recipe.planner.budget == 0.5
    assert cfg.param_scheduler.end == 26 * cfg.train_cfg.max_epochs


def test_small_rtmdet_takes_the_trained_weights(shared_data):
    from mmbasis.compression import load_weights, read_checkpoint
    path = str(shared_data / 'rtmdet_tiny_bccd.pth')
    model = MODELS.build(load('rtmdet_tiny_bccd').model)
    load_weights(model, read_checkpoint(path), path)
