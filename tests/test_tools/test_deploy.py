# Copyright (c) mmbasis authors. All rights reserved.
"""The command lines: latency table, compression by it, deployment."""
import json
import os
import subprocess
import sys
from collections import Counter

import cv2
import numpy as np
import pytest

pytest.importorskip('onnxruntime')
pytest.importorskip('mmdeploy')
builder_at_hand = pytest.importorskip('mmbasis.deploy').builder_at_hand

CONFIG = """
_base_ = ['{root}/configs/mmpretrain/resnet56_cifar10.py']
model = dict(backbone=dict(depth=8), head=dict(num_classes=2))
train_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(data_root='{data}'))
val_dataloader = dict(
    batch_size=4, num_workers=0, dataset=dict(data_root='{data}'))
test_dataloader = val_dataloader
"""


def tool(root, name, *args, status=0):
    """Run a tool; what it printed."""
    result = subprocess.run(
        [sys.executable,
         str(root / 'tools' / name), *map(str, args)],
        env=dict(os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS='1'),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True)
    assert result.returncode == status, result.stdout
    return result.stdout


@pytest.fixture(scope='module')
def workspace(repo_root, tmp_path_factory):
    """Folder with images, a config and dense weights."""
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    import mmbasis  # noqa: F401
    folder = tmp_path_factory.mktemp('deploy')
    random = np.random.RandomState(0)
    for index in range(8):
        target = folder / 'images' / 'ab'[index % 2]
        target.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(
            str(target / f'{index}.png'),
            random.randint(0, 256, (32, 32, 3), dtype=np.uint8))
    text = CONFIG.format(root=repo_root, data=folder / 'images')
    (folder / 'dense.py').write_text(text)
    cfg = Config.fromfile(str(folder / 'dense.py'))
    init_default_scope(cfg.default_scope)
    model = MODELS.build(dict(cfg.model))
    torch.save(dict(state_dict=model.state_dict()), folder / 'dense.pth')
    return folder


@pytest.fixture(scope='module')
def table(repo_root, workspace):
    tool(repo_root, 'latency_table.py', 'export', workspace / 'dense.py',
         workspace / 'dense.pth', '--input-shape', '1x3x32x32', '--out',
         workspace / 'layers', '--ranks', 2, '--round-to', 4)
    args = ('latency_table.py', 'measure', workspace / 'layers', '--out',
            workspace / 'table.json', '--backend', 'onnxruntime', '--threads',
            1, '--seconds', .02, '--rounds', 2, '--max-wait', 0)
    tool(repo_root, *args)
    before = (workspace / 'table.json').read_text()
    # a second time there is nothing left to do
    tool(repo_root, *args)
    after = json.loads((workspace / 'table.json').read_text())
    assert after['entries'] == json.loads(before)['entries']
    return workspace / 'table.json'


def test_table_and_budget(repo_root, workspace, table):
    data = json.loads(table.read_text())
    groups = {x['group'] for x in data['entries'] if x.get('role') == 'layer'}
    # layers that differ in nothing share their models
    uses = [
        x['uses'] for x in data['entries']
        if x.get('role') == 'layer' and x['form'] == 'dense'
    ]
    assert len(groups) == len(uses) < sum(len(x) for x in uses)
    # two ranks of each form at most, and the dense layer
    models = Counter(
        (x['group'], x['form']) for x in data['entries']
        if x.get('role') == 'layer')
    assert data['version'] == 2 and max(models.values()) <= 2
    assert {form for _, form in models} == {
        'dense', 'output', 'input', 'both', 'spatial'}
    for entry in data['entries']:
        if entry.get('form') == 'both':
            shares = np.divide([entry['rank'], entry['input_rank']],
                               entry['weight_shape'][:2])
            assert np.ptp(shares) <= 4 / 16  # a step
    assert data['device'] and data['backend'] == 'onnxruntime'
    assert 'whole model' in tool(repo_root, 'latency_table.py', 'show', table)
    tool(repo_root, 'compress.py', workspace / 'dense.py',
         workspace / 'dense.pth', '--latency', 1., '--table', table,
         '--work-dir', workspace / 'fast', '--calib-batches', 1)
    plan = json.loads((workspace / 'fast' / 'plan.json').read_text())
    assert plan['planner']['table']['precision'] == 'fp32'
    refined = workspace / 'refined.json'
    args = ('latency_table.py', 'refine', table)
    options = ('--measured', .5, '--out', refined)
    tool(repo_root, *args, workspace / 'fast' / 'compressed.pth', *options)
    rows = {x['id']: x for x in json.loads(refined.read_text())['entries']}
    assert rows['model/compressed']['median_ms'] == pytest.approx(
        .5 * rows['model']['median_ms'])
    assert set(rows['model/compressed']['ranks']) == set(plan['layers'])
    refined.unlink()
    out = tool(repo_root, *args, workspace / 'dense.pth', *options, status=1)
    assert 'is of a dense model' in out and not refined.exists()
    # measured elsewhere, refused
    out = tool(
        repo_root,
        'latency_table.py',
        'measure',
        workspace / 'layers',
        '--out',
        table,
        '--backend',
        'onnxruntime',
        '--rounds',
        3,
        '--seconds',
        .02,
        status=1)
    assert 'measured differently' in out


@pytest.fixture(scope='module')
def compressed(repo_root, workspace):
    tool(repo_root, 'compress.py', workspace / 'dense.py',
         workspace / 'dense.pth', '--macs', .5, '--work-dir',
         workspace / 'half', '--calib-batches', 1)
    return workspace / 'half'


def deploy(repo_root, compressed, images, out, *more, **kwargs):
    name = 'classification_onnxruntime.py'
    return tool(repo_root, 'deploy.py', repo_root / 'configs/deploy' / name,
                compressed / 'compressed.py', compressed / 'compressed.pth',
                *images, '--work-dir', out, *more, **kwargs)


def test_deploy(repo_root, workspace, table, compressed, tmp_path):
    images = sorted((workspace / 'images' / 'a').iterdir())[:2]
    out = deploy(repo_root, compressed, images, tmp_path, '--evaluate',
                 '--precision', 'fp16', 'int8', '--calib-images', 8,
                 '--merge', 'auto', '--table', table)
    assert 'TensorRT 8.5, end2end.onnx: all operators supported' in out
    assert 'trtexec --onnx=end2end.onnx' in out
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['comparison']['agrees']
    assert len(report['comparison']['images']) == 2
    assert 'accuracy/top1' in report['metrics']
    for precision, entry in report['precisions'].items():
        assert (tmp_path / f'end2end-{precision}.onnx').is_file()
        assert 'accuracy/top1' in entry['metrics']
        assert entry['agrees']
    assert [*report['precisions']] == ['fp16', 'int8']
    # sixteen channels never gain on a CPU
    assert isinstance(report['merged'], dict)
    assert report['files'][str(tmp_path /
                               'end2end.onnx')] > 4 * .8 * report['params']


@pytest.mark.skipif(
    not builder_at_hand(), reason='needs the extra trt-check')
def test_build(repo_root, workspace, compressed, tmp_path):
    """The engine, beside that of the dense model."""
    image = next((workspace / 'images' / 'a').iterdir())
    out = deploy(repo_root, compressed, [image], tmp_path, '--build', 'rtx',
                 '--compute-capability', '8.9')
    engines = json.loads((tmp_path / 'report.json').read_text())['engine']
    ours = engines['files'][str(tmp_path / 'end2end.onnx')]
    dense = engines['dense'][str(tmp_path / 'dense' / 'end2end.onnx')]
    assert ours['built'] and ours['compute_capability'] == '8.9'
    # a layer is two kernels
    plan = json.loads((compressed / 'plan.json').read_text())
    assert ours['kernels'] == dense['kernels'] + len(plan['layers'])
    assert ours['copies'] == dense['copies']
    assert 'dense/end2end.onnx' in out
    # said before anything is exported
    out = deploy(repo_root, compressed, [image], tmp_path / 'new', '--build',
                 'rtx', '--compute-capability', '8.7', status=1)
    assert "'8.7'" in out and not (tmp_path / 'new' / 'end2end.onnx').exists()


def test_calibration_for_tensorrt(repo_root, workspace, compressed, tmp_path):
    pytest.importorskip('h5py')
    image = next((workspace / 'images' / 'a').iterdir())
    name = 'classification_tensorrt.py'
    out = tool(repo_root, 'deploy.py', repo_root / 'configs/deploy' / name,
               compressed / 'compressed.py', compressed / 'compressed.pth',
               image, '--work-dir', tmp_path, '--calib-images', 4,
               '--precision', 'int8')
    assert '--int8' in out and (tmp_path / 'calib_data.h5').is_file()


def test_difference_is_a_failure(repo_root, workspace, compressed, tmp_path):
    """Other weights in the file than in the model."""
    sys.path.insert(0, str(repo_root / 'tools'))
    try:
        import deploy as module
    finally:
        sys.path.pop(0)
    from mmbasis.deploy import Deployment
    config = repo_root / 'configs/deploy/classification_onnxruntime.py'
    image = str(next((workspace / 'images' / 'a').iterdir()))
    deployment = Deployment(
        str(config), str(compressed / 'compressed.py'),
        str(compressed / 'compressed.pth'))
    files = deployment.export(image, str(tmp_path))
    assert module.compare_all(deployment, files, [image])['agrees']
    deployment.model.head.fc.weight.data.mul_(3)
    assert not module.compare_all(deployment, files, [image])['agrees']


def test_a_broken_precision_is_a_failure(repo_root, workspace, compressed,
                                         tmp_path, monkeypatch, capsys):
    """The fp16 graph lost a layer on the way."""
    import onnx

    from mmbasis.deploy import precision

    def write(path, output, images):
        model = onnx.load(path)
        node = [x for x in model.graph.node if x.op_type == 'Conv'][3]
        for x in model.graph.initializer:
            if x.name == node.input[1]:
                x.CopyFrom(onnx.numpy_helper.from_array(
                    0 * onnx.numpy_helper.to_array(x), x.name))
        onnx.save(model, output)

    monkeypatch.setattr(precision, 'write_half', write)
    monkeypatch.syspath_prepend(str(repo_root / 'tools'))
    import deploy as module
    config = repo_root / 'configs/deploy/classification_onnxruntime.py'
    image = next((workspace / 'images' / 'a').iterdir())
    monkeypatch.setattr(sys, 'argv', [
        'deploy.py', str(config), str(compressed / 'compressed.py'),
        str(compressed / 'compressed.pth'), str(image), '--work-dir',
        str(tmp_path), '--precision', 'fp16'])
    assert module.main() == 1
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['comparison']['agrees']
    assert report['precisions']['fp16']['agrees'] is False
    assert 'NO' in capsys.readouterr().out
