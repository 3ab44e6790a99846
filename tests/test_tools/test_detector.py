# Copyright (c) mmbasis authors. All rights reserved.
"""A detector through the tools, as a user runs them: processes on images."""
import json
import os.path as osp
import pickle
import signal
import subprocess
import sys
import time

import cv2
import mmdet
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmbasis.utils import load_config

CLASSES = ('RBC', 'WBC', 'Platelets')
BOX = """<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin>
<ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"""
XML = """<annotation><size><width>96</width><height>96</height></size>{}
</annotation>"""

# The config for BCCD, narrow and on small images. Its normalisation does not
# look at the other images of a batch, and nothing is drawn at random, so that
# two processes can be compared with one.
CONFIG = """
_base_ = {base!r}
norm_cfg = dict(_delete_=True, type='GN', num_groups=4)
model = dict(
    backbone=dict(base_channels=8, stem_channels=8, norm_cfg=norm_cfg),
    neck=dict(in_channels=[16, 32, 64], out_channels=16, norm_cfg=norm_cfg),
    bbox_head=dict(in_channels=16, feat_channels=16, norm_cfg=norm_cfg))
load = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=(96, 96), keep_ratio=True)
]
train_dataloader = dict(
    batch_size=4, dataset=dict(pipeline=load + [dict(type='PackDetInputs')]))
val_dataloader = dict(dataset=dict(
    ann_file='ImageSets/Main/train.txt',
    pipeline=load[:1] + load[2:] + load[1:2] + [dict(
        type='PackDetInputs', meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
test_dataloader = val_dataloader
custom_hooks = [
    dict(
        type='mmbasis.BasisCompressionHook',
        planner=dict(type='BudgetPlanner', macs=0.5),
        calibration=dict(num_batches=2))
]
optim_wrapper = dict(
    _delete_=True, type='OptimWrapper',
    # random weights and their distillation diverge at more
    optimizer=dict(type='SGD', lr=0.001, momentum=0.9))
param_scheduler = dict(_delete_=True, type='ConstantLR', factor=1.)
default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=5),
                     logger=dict(interval=1))
train_cfg = dict(max_epochs=3, val_interval=3)
"""

# RetinaNet divides its loss by the positive anchors of each process; FCOS by
# those of all processes, so that two can do what one does.
FCOS = """
_base_ = 'basis.py'
model = dict(
    type='FCOS',
    bbox_head=dict(
        _delete_=True, type='FCOSHead', num_classes=3, in_channels=16,
        feat_channels=16, stacked_convs=2, strides=[8, 16, 32],
        regress_ranges=((-1, 64), (64, 128), (128, 1e8)),
        norm_cfg={{_base_.norm_cfg}}))
optim_wrapper = dict(optimizer=dict(lr=0.01))
load_from = '{{$MMBASIS_DATA:data}}/fcos.pth'
"""


def draw_images(folder, rng):
    """Twelve images with a few coloured rectangles, in VOC's layout."""
    for part in ('Annotations', 'ImageSets/Main', 'JPEGImages'):
        (folder / part).mkdir(parents=True)
    for index in range(12):
        image = rng.integers(0, 60, (96, 96, 3), np.uint8)
        boxes = ''
        for label, name in enumerate(CLASSES):
            x, y = rng.integers(0, 60, 2)
            image[y:y + 30, x:x + 30, label] += 150
            boxes += BOX.format(name, x + 1, y + 1, x + 30, y + 30)
        cv2.imwrite(str(folder / f'JPEGImages/{index}.jpg'), image)
        (folder / f'Annotations/{index}.xml').write_text(XML.format(boxes))
    names = '\n'.join(map(str, range(12)))
    (folder / 'ImageSets/Main/train.txt').write_text(names)


@pytest.fixture(scope='module')
def place(tmp_path_factory, repo_root):
    """Folder with images, a config and dense weights."""
    folder = tmp_path_factory.mktemp('detector')
    draw_images(folder / 'bccd' / 'BCCD', np.random.default_rng(0))
    base = repo_root / 'configs/mmdet/retinanet_r18_bccd_basis-macs50.py'
    (folder / 'basis.py').write_text(CONFIG.format(base=str(base)))
    (folder / 'fcos.py').write_text(FCOS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMBASIS_DATA', str(folder))
        for config in ('basis.py', 'fcos.py'):
            write_weights(load_config(str(folder / config)))
    return folder


def write_weights(cfg):
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    init_default_scope('mmengine')
    torch.save(
        dict(
            meta=dict(dataset_meta=dict(classes=CLASSES)),
            state_dict=model.state_dict()), cfg.load_from)


@pytest.fixture
def start(place, repo_root, monkeypatch):
    """Function that starts a tool in a process of its own."""
    monkeypatch.setenv('MMBASIS_DATA', str(place))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')

    def start(tool, *args, prefix=(sys.executable, )):
        return subprocess.Popen([*prefix, tool, *map(str, args)],
                                cwd=repo_root,
                                stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT,
                                start_new_session=True,
                                text=True)

    return start


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def saved(work_dir, epoch=3):
    return torch.load(work_dir / f'epoch_{epoch}.pth', weights_only=True)


@pytest.fixture(scope='module')
def whole(place, repo_root):
    """Folder of an uninterrupted run, and what it printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMBASIS_DATA', str(place))
        patch.setenv('OMP_NUM_THREADS', '1')
        result = subprocess.run([
            sys.executable, 'tools/train.py', place / 'basis.py', '--work-dir',
            place / 'whole'
        ],
                                cwd=repo_root,
                                capture_output=True,
                                text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return place / 'whole', result.stdout


def test_trains_with_the_dense_detector_as_teacher(whole):
    folder, output = whole
    plan = saved(folder)['meta']['mmbasis']
    macs = plan['totals']['macs']
    assert macs['after'] <= .5 * macs['before']
    assert 'loss_distill_neck' in output and 'loss_distill_bbox_head' in output
    # shared over levels: once in the plan, with the MACs of all of them
    names = list(plan['layers']) + list(plan['dense'])
    assert sum('bbox_head.cls_convs.0' in name for name in names) == 1
    assert plan['dense']['bbox_head.retina_cls']['reason'] == \
        'prediction layer'
    assert not any('teacher' in key for key in saved(folder)['state_dict'])


def test_killed_and_resumed_is_uninterrupted(whole, start, place, tmp_path):
    killed = start('tools/train.py', place / 'basis.py', '--work-dir',
                   tmp_path)
    mark, end = tmp_path / 'last_checkpoint', time.time() + 240
    # MMEngine creates the file, then writes it
    while not (mark.exists() and mark.read_text()) and time.time() < end:
        time.sleep(.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert not (tmp_path / 'epoch_3.pth').exists()
    output = finish(
        start('tools/train.py', place / 'basis.py', '--work-dir', tmp_path,
              '--resume'))
    assert 'resumed epoch' in output
    a, b = saved(whole[0])['state_dict'], saved(tmp_path)['state_dict']
    assert list(a) == list(b)
    for key in a:
        assert a[key].isfinite().all() and torch.equal(a[key], b[key]), key


def test_two_processes_are_one(start, place, tmp_path):
    """With the same total batch they end with the same ranks and weights."""
    launch = (sys.executable, '-m', 'torch.distributed.run', '--standalone',
              '--nproc_per_node=2')
    for name, size, prefix, extra in (('one', 4, launch[:1], ()),
                                      ('two', 2, launch, ('--launcher',
                                                          'pytorch'))):
        finish(
            start(
                'tools/train.py',
                place / 'fcos.py',
                '--work-dir',
                tmp_path / name,
                *extra,
                '--cfg-options',
                f'train_dataloader.batch_size={size}',
                # its features are in units of their variance in the batch
                'custom_hooks.0.distillation=False',
                prefix=prefix))
    one, two = (saved(tmp_path / name) for name in ('one', 'two'))
    for name, entry in one['meta']['mmbasis']['layers'].items():
        assert two['meta']['mmbasis']['layers'][name]['rank'] == entry['rank']
    for key, value in one['state_dict'].items():
        difference = (two['state_dict'][key] - value).norm()
        assert difference <= 1e-2 * value.norm() + 2e-3, key


def test_mixed_precision(start, place, tmp_path):
    finish(
        start('tools/train.py', place / 'basis.py', '--work-dir', tmp_path,
              '--cfg-options', 'train_cfg.max_epochs=1',
              'optim_wrapper.type=mmbasis.CPUAmpOptimWrapper'))
    weights = saved(tmp_path, 1)['state_dict']
    assert all(x.isfinite().all() for x in weights.values())


def test_tool_of_mmdet_takes_the_config_as_it_is(whole, start, place,
                                                 tmp_path):
    tool = osp.join(osp.dirname(mmdet.__file__), '.mim', 'tools', 'train.py')
    finish(start(tool, place / 'basis.py', '--work-dir', tmp_path))
    a, b = saved(whole[0])['state_dict'], saved(tmp_path)['state_dict']
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.fixture(scope='module')
def compressed(place, repo_root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMBASIS_DATA', str(place))
        result = subprocess.run([
            sys.executable, 'tools/compress.py', place / 'basis.py',
            place / 'retinanet_r18_bccd.pth', '--macs', '0.5',
            '--calib-batches', '2', '--evaluate', '--work-dir', place / 'small'
        ],
                                cwd=repo_root,
                                capture_output=True,
                                text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return place / 'small'


def test_compress_tool_and_test_tool(compressed, start, place, tmp_path):
    report = json.loads((compressed / 'report.json').read_text())
    macs = report['compressible']['macs']
    assert macs['after'] <= .5 * macs['before']
    assert report['macs']['before'] - report['macs']['after'] == pytest.approx(
        macs['before'] - macs['after'], rel=.02)
    finish(
        start('tools/test.py', compressed / 'compressed.py',
              compressed / 'compressed.pth', '--work-dir', tmp_path, '--out',
              tmp_path / 'metrics.json'))
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    assert metrics == pytest.approx(report['metrics']['after'], abs=1e-4)


def test_augmentation_is_that_of_mmdet(compressed, start, place, tmp_path):
    """A compressed checkpoint under the hook, by our tool and by mmdet's."""
    ours, theirs, plain = (tmp_path / f'{x}.pkl' for x in 'abc')
    mmdet_tool = osp.join(
        osp.dirname(mmdet.__file__), '.mim', 'tools', 'test.py')
    for tool, out, args in (('tools/test.py', ours, ['--tta']),
                            (mmdet_tool, theirs, ['--tta']),
                            ('tools/test.py', plain, [])):
        finish(
            start(tool, place / 'basis.py', compressed / 'compressed.pth',
                  '--work-dir', tmp_path, '--out', out, *args))
    ours, theirs, plain = (
        [sample['pred_instances'] for sample in pickle.loads(x.read_bytes())]
        for x in (ours, theirs, plain))
    assert len(ours) == len(theirs) == 12
    for a, b in zip(ours, theirs):
        assert len(a['scores'])
        for key in ('scores', 'bboxes', 'labels'):
            assert torch.equal(a[key], b[key]), key
    assert any(
        a['scores'].tolist() != b['scores'].tolist()
        for a, b in zip(ours, plain))


def test_inferencers_load_the_standalone_config(compressed, place,
                                                monkeypatch):
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    monkeypatch.setenv('MMBASIS_DATA', str(place))
    config = str(compressed / 'compressed.py')
    weights = str(compressed / 'compressed.pth')
    image = str(place / 'bccd/BCCD/JPEGImages/0.jpg')
    model = init_detector(config, weights, device='cpu')
    assert type(model).__name__ == 'RetinaNet'
    result = inference_detector(model, image).pred_instances
    inferencer = DetInferencer(config, weights, device='cpu')
    again = inferencer(image, no_save_vis=True)['predictions'][0]
    assert model.dataset_meta['classes'] == CLASSES
    np.testing.assert_allclose(
        result.scores.numpy(), again['scores'], rtol=1e-4)
    init_default_scope('mmengine')


def test_dense_weights_in_its_place_are_refused(compressed, start, place,
                                                tmp_path):
    process = start('tools/test.py', compressed / 'compressed.py',
                    place / 'retinanet_r18_bccd.pth', '--work-dir', tmp_path)
    output = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert 'the checkpoint under test is dense' in output
