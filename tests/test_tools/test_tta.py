# Copyright (c) mmbasis authors. All rights reserved.
"""Compressed checkpoints under test-time augmentation."""
import pickle

import cv2
import pytest
import torch
from mmengine.hooks.test_time_aug_hook import build_runner_with_tta
from mmengine.model import BaseTTAModel
from mmengine.registry import DefaultScope, init_default_scope

import mmbasis
from mmbasis.compression import basis_layers
from mmbasis.utils import load_config

HOOK = """
_base_ = {base!r}
custom_imports = dict(imports=['mmbasis'])
custom_hooks = [dict(type='mmbasis.BasisCompressionHook', {recipe})]
"""
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[[
            dict(type='RandomFlip', prob=1.),
            dict(type='RandomFlip', prob=0.)
        ], [dict(type='PackInputs')]])
]


@pytest.fixture(scope='module')
def compressed(workplace):
    """Folder of a compressed model."""
    folder = workplace.folder / 'tta'
    result = workplace.run('--macs', 0.5, '--calib-batches', 1, '--work-dir',
                           folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def scope():
    yield
    init_default_scope('mmengine')


@pytest.fixture(scope='module')
def scores(workplace, compressed):
    """Scores of each test image by its path: as it is, and with those of its
    mirror image averaged in."""
    before = DefaultScope.get_current_instance()
    model = mmbasis.load_compressed(
        str(compressed / 'compressed.py'), str(compressed / 'compressed.pth'))
    found = {}
    for path in (workplace.data / 'tiny' / 'test').glob('*/*.png'):
        image = torch.from_numpy(cv2.imread(str(path))).permute(2, 0, 1)
        data = model.data_preprocessor(dict(inputs=[image, image.flip(-1)]))
        with torch.no_grad():
            one, other = model(data['inputs']).softmax(1)
        found[str(path)] = (one, (one + other) / 2)
    init_default_scope(before.scope_name if before else 'mmengine')
    return found


def hook_config(workplace, name, recipe):
    path = workplace.folder / f'{name}.py'
    path.write_text(HOOK.format(base=str(workplace.config), recipe=recipe))
    return path


def predictions(workplace, config, checkpoint, out, *args):
    """What tools/test.py predicts, by path."""
    result = workplace.run(
        '--work-dir',
        out.parent,
        '--out',
        out,
        *args,
        tool='test',
        config=config,
        checkpoint=checkpoint)
    assert result.returncode == 0, result.stderr
    return pickle.loads(out.read_bytes())


@pytest.mark.parametrize('door', ['hook', 'compressed.py', 'tta_pipeline'])
def test_predictions_are_averaged(workplace, compressed, scores, tmp_path,
                                  door):
    if door == 'compressed.py':
        config = compressed / 'compressed.py'
    else:
        # another planner: the checkpoint's plan counts
        config = hook_config(workplace, door,
                             "planner=dict(type='BudgetPlanner', macs=.9)")
    if door == 'tta_pipeline':
        text = config.read_text() + (
            "tta_model = dict(type='mmpretrain.AverageClsScoreTTA')\n"
            f'tta_pipeline = {PIPELINE}\n')
        config.write_text(text)
    found = predictions(workplace, config, compressed / 'compressed.pth',
                        tmp_path / 'found.pkl', '--tta')
    assert len(found) == len(scores) == 18
    # in the order of the loader, which is that of the sorted paths
    moved = 0
    for sample, path in zip(found, sorted(scores)):
        one, mean = scores[path]
        torch.testing.assert_close(
            sample['pred_score'], mean, atol=1e-5, rtol=1e-4)
        moved = max(moved, float((one - mean).abs().max()))
    assert moved > 1e-3


def test_dense_weights_are_refused(workplace, tmp_path):
    config = hook_config(workplace, 'refused',
                         "planner=dict(type='BudgetPlanner', macs=.5)")
    result = workplace.run(
        '--tta', '--work-dir', tmp_path, tool='test', config=config)
    assert result.returncode != 0
    assert 'the checkpoint under test is dense' in result.stderr


def test_a_library_without_a_default_is_named(workplace, compressed,
                                              tmp_path):
    result = workplace.run(
        '--tta',
        '--work-dir',
        tmp_path,
        '--cfg-options',
        'default_scope=mmengine',
        tool='test',
        checkpoint=compressed / 'compressed.pth')
    assert result.returncode != 0
    assert '--tta needs tta_model in the config' in result.stderr
    assert "'mmengine' has no default" in result.stderr


def test_hook_of_mmengine(workplace, compressed, scores, tmp_path, monkeypatch,
                          scope):
    """PrepareTTAHook wraps the model when the checkpoint is loaded."""
    monkeypatch.setenv('MMBASIS_DATA', str(workplace.data))
    config = hook_config(workplace, 'prepared', '')
    cfg = load_config(str(config), work_dir=str(tmp_path))
    cfg.load_from = str(compressed / 'compressed.pth')
    cfg.tta_model = dict(type='mmpretrain.AverageClsScoreTTA')
    cfg.tta_pipeline = PIPELINE
    cfg.experiment_name = 'prepared'
    runner = build_runner_with_tta(cfg)
    seen = []
    monkeypatch.setattr(
        runner.test_evaluator, 'process',
        lambda data_samples, data_batch: seen.extend(data_samples))
    monkeypatch.setattr(runner.test_evaluator, 'evaluate', lambda _: {})
    runner.test()
    assert isinstance(runner.model, BaseTTAModel)
    assert dict(basis_layers(runner.model))
    for sample, path in zip(seen, sorted(scores)):
        torch.testing.assert_close(
            sample.pred_score, scores[path][1], atol=1e-5, rtol=1e-4)
    assert len(seen) == len(scores)
