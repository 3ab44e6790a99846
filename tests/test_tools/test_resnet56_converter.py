# Copyright (c) mmbasis authors. All rights reserved.
import json
import subprocess
import sys

import pytest
import torch

from mmbasis.models.backbones import CifarResNet


@pytest.fixture
def convert(repo_root):

    def run(*args):
        tool = repo_root / 'tools' / 'model_converters' / 'resnet56_cifar.py'
        return subprocess.run(
            [sys.executable, str(tool), *map(str, args)],
            capture_output=True,
            text=True)

    return run


@pytest.fixture
def weights():
    """Weights as the authors' file names them."""
    weights = CifarResNet(56).state_dict()
    weights['linear.weight'] = torch.zeros(10, 64)
    weights['linear.bias'] = torch.zeros(10)
    return weights


def test_writes_a_checkpoint_of_mmpretrain(convert, weights, tmp_path):
    source, target = tmp_path / 'source.pth', tmp_path / 'new' / 'target.pth'
    torch.save(
        dict(state_dict={
            f'module.{k}': v
            for k, v in weights.items()
        }), source)
    result = convert(source, target)
    assert result.returncode == 0, result.stderr
    checkpoint = torch.load(target, weights_only=True)
    assert checkpoint['meta']['dataset_meta']['classes'][:2] == ('airplane',
                                                                 'automobile')
    assert len(checkpoint['state_dict']) == len(weights)
    assert torch.equal(checkpoint['state_dict']['backbone.conv1.weight'],
                       weights['conv1.weight'])
    assert 'head.fc.bias' in checkpoint['state_dict']
    assert [path.name for path in target.parent.iterdir()] == ['target.pth']


def missing_key(weights):
    del weights['layer3.8.bn2.bias']
    return weights


def wrong_shape(weights):
    weights['linear.weight'] = torch.zeros(100, 64)
    return weights


@pytest.mark.parametrize('change, message', [
    (missing_key, "1 keys missing ['backbone.layer3.8.bn2.bias']"),
    (wrong_shape, 'head.fc.weight has shape (100, 64), expected (10, 64)'),
    (lambda weights: [1, 2], "must hold a state dict, but holds <class 'list"),
])
def test_refuses_other_weights(convert, weights, tmp_path, change, message):
    source, target = tmp_path / 'source.pth', tmp_path / 'target.pth'
    torch.save(change(weights), source)
    result = convert(source, target)
    assert result.returncode == 2
    assert message in ' '.join(result.stderr.split())
    assert not target.exists()


def test_refuses_broken_files(convert, weights, tmp_path):
    whole, half = tmp_path / 'whole.pth', tmp_path / 'half.pth'
    torch.save(weights, whole)
    half.write_bytes(whole.read_bytes()[:100_000])
    result = convert(half, tmp_path / 'target.pth')
    assert result.returncode == 2 and 'truncated' in result.stderr
    result = convert(tmp_path / 'absent.pth', tmp_path / 'target.pth')
    assert result.returncode == 2 and 'does not exist' in result.stderr
    assert not (tmp_path / 'target.pth').exists()


def test_real_weights_classify(convert, shared_data, cifar10_subset, tmp_path,
                               repo_root, monkeypatch):
    """The order of classes, the colours and the normalisation are right."""
    target = tmp_path / 'resnet56.pth'
    result = convert(shared_data / 'resnet56_cifar10_jpeg.pth', target)
    assert result.returncode == 0, result.stderr
    monkeypatch.setenv('MMBASIS_DATA', str(cifar10_subset(test=100)))
    config = repo_root / 'configs' / 'mmpretrain' / 'resnet56_cifar10.py'
    result = subprocess.run([
        sys.executable,
        str(repo_root / 'tools' / 'test.py'),
        str(config),
        str(target), '--work-dir',
        str(tmp_path), '--out',
        str(tmp_path / 'metrics.json')
    ],
                            capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / 'metrics.json').read_text())
    # 89.68 on all 10 000 images; two standard errors of 1000 are 1.9
    assert abs(metrics['accuracy/top1'] - 89.68) < 1.9
