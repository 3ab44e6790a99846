# Copyright (c) mmbasis authors. All rights reserved.
"""A segmentor and a rotated detector through the tools, on generated images,
by the example configs made small."""
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

import mmbasis
from mmbasis.utils import load_config
from tests.test_tools.workplace import Forks

RUN = """
_base_ = {base!r}
default_hooks = dict(checkpoint=dict(interval=2))
custom_hooks = []
load_from = None
"""

SEGMENTOR = RUN + """
norm_cfg = dict(type='BN')
crop_size = (96, 96)
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(base_channels=16, stem_channels=16, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=128, channels=32, num_classes=3, norm_cfg=norm_cfg),
    auxiliary_head=dict(
        in_channels=64, channels=16, num_classes=3, norm_cfg=norm_cfg))
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
        dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(
        _delete_=True, type='BaseSegDataset', data_root={data!r},
        metainfo=dict(classes=('ground', 'disc', 'square')),
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        img_suffix='.png', pipeline=load))
val_dataloader = train_dataloader
test_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(
        _delete_=True, type='BaseSegDataset', data_root={data!r},
        metainfo=dict(classes=('ground', 'disc', 'square')),
        data_prefix=dict(img_path='images', seg_map_path='masks'),
        img_suffix='.png', pipeline=load, test_mode=True))
train_cfg = dict(max_iters=4, val_interval=100)
val_dataloader = val_evaluator = val_cfg = None
"""

ROTATED = RUN + """
model = dict(
    backbone=dict(depth=18, base_channels=16, stem_channels=16,
                  frozen_stages=-1),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    bbox_head=dict(in_channels=32, feat_channels=32, stacked_convs=2))
resize = dict(type='mmdet.Resize', scale=(96, 96), keep_ratio=True)
load = [
    dict(type='mmdet.LoadImageFromFile'),
    dict(type='mmdet.LoadAnnotations', with_bbox=True, box_type='qbox'),
    dict(type='ConvertBoxType', box_type_mapping=dict(gt_bboxes='rbox')),
    resize]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(
        data_root={data!r}, ann_file='boxes/',
        data_prefix=dict(img_path='images/'),
        pipeline=load + [dict(type='mmdet.PackDetInputs')]))
test_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, dataset=dict(
        data_root={data!r}, ann_file='boxes/',
        data_prefix=dict(img_path='images/'),
        pipeline=[load[0], resize, load[1], load[2], dict(
            type='mmdet.PackDetInputs', meta_keys=(
                'img_id', 'img_path', 'ori_shape', 'img_shape',
                'scale_factor'))]))
train_cfg = dict(max_epochs=2, val_interval=100)
# so that a few steps move weights
optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = []
val_dataloader = val_evaluator = val_cfg = None
"""

#: config, its small version, size of images, and the last checkpoint
CASES = dict(
    mmseg=('mmseg/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024_basis-macs50',
           SEGMENTOR, 96, 'iter_4.pth'),
    mmrotate=('mmrotate/rotated-retinanet-rbox-le90_r50_fpn_1x_dota_'
              'basis-macs50', ROTATED, 96, 'epoch_2.pth'))


def draw(folder, size):
    """Eight images, each with a disc and a turned square, with their masks
    and boxes in DOTA's format."""
    for part in ('images', 'masks', 'boxes'):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(8):
        image = rng.integers(0, 80, (size, size, 3), np.uint8)
        mask = np.zeros((size, size), np.uint8)
        centre = tuple(map(int, rng.integers(15, size - 15, 2)))
        middle = rng.integers(20, size - 20, 2)
        corners = cv2.boxPoints((tuple(map(float, middle)), (24., 12.),
                                 float(rng.uniform(-80, 80))))
        for canvas, disc, square in ((image, (250, 90, 30), (30, 90, 250)),
                                     (mask, 1, 2)):
            cv2.circle(canvas, centre, 9, disc, -1)
            cv2.fillPoly(canvas, [corners.astype(np.int32)], square)
        cv2.imwrite(str(folder / f'images/{index}.png'), image)
        cv2.imwrite(str(folder / f'masks/{index}.png'), mask)
        numbers = ' '.join(f'{x:.1f}' for x in corners.flatten())
        (folder / f'boxes/{index}.txt').write_text(f'{numbers} ship 0\n')


@pytest.fixture(scope='module')
def forks():
    forks = Forks()
    yield forks
    forks.close()


def run(forks, *command):
    result = forks.run(list(map(str, command)))
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


class Raw(torch.nn.Module):
    """What a model computes before it decodes anything."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs):
        return self.model(inputs, mode='tensor')


@pytest.mark.parametrize('library', CASES)
def test_tools_on_sister_library(library, repo_root, forks, demo, tmp_path):
    pytest.importorskip(library)
    pytest.importorskip('onnxruntime')
    base, text, size, last = CASES[library]
    draw(tmp_path / 'data', size)
    config = tmp_path / 'small.py'
    config.write_text(text.format(
        base=str(repo_root / 'configs' / f'{base}.py'),
        data=str(tmp_path / 'data')))
    cfg = load_config(str(config))
    init_default_scope(library)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    init_default_scope('mmengine')
    torch.save(dict(state_dict=model.state_dict(), meta={}),
               tmp_path / 'dense.pth')

    small, tuned = tmp_path / 'small', tmp_path / 'tuned'
    tools = repo_root / 'tools'
    run(forks, tools / 'compress.py', config, tmp_path / 'dense.pth',
        '--macs', '.5', '--calib-batches', '1', '--work-dir', small)
    report = json.loads((small / 'report.json').read_text())
    assert .3 < report['compressible']['macs']['after'] / report[
        'compressible']['macs']['before'] <= .5
    assert report['macs']['after'] < .75 * report['macs']['before']
    plan = json.loads((small / 'plan.json').read_text())
    assert len(plan['layers']) > 5
    predictions = {k for k, v in plan['dense'].items()
                   if v['reason'] == 'prediction layer'}
    assert predictions and all('head' in x for x in predictions)

    printed = run(forks, tools / 'train.py', small / 'compressed.py',
                  '--work-dir', tuned)
    assert 'loss_distill' in printed
    before = torch.load(small / 'compressed.pth', weights_only=True)
    after = torch.load(tuned / last, weights_only=True)
    moved = [k for k, x in before['state_dict'].items()
             if not torch.equal(x, after['state_dict'][k])]
    assert any('basis' in x for x in moved), moved
    assert all(x.isfinite().all() for x in after['state_dict'].values())

    model = mmbasis.load_compressed(
        str(small / 'compressed.py'), str(tuned / last))
    images = torch.rand(1, 3, size, size)
    assert demo.export(
        Raw(model), images, str(tmp_path / 'x.onnx')) < demo.TOLERANCE


@pytest.mark.parametrize('library', CASES)
def test_example_compresses_what_it_names(library, repo_root):
    pytest.importorskip(library)
    cfg = load_config(str(repo_root / 'configs' / f'{CASES[library][0]}.py'))
    hook, = (x for x in cfg.custom_hooks if 'mmbasis' in x.type)
    assert hook.planner.macs == .5
    # weights of the whole model, and nothing else is downloaded
    assert cfg.load_from.startswith('https://')
    assert 'Pretrained' not in str(cfg.model)
    assert cfg.model.get('pretrained') is None
