# Copyright (c) mmbasis authors. All rights reserved.
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from mmbasis.utils import load_config

CONFIG = 'configs/mmpretrain/resnet56_cifar10_basis-macs36.py'


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An image folder of CIFAR's classes with noise in it, and dense weights
    of a shallow network."""
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for name in ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog',
                     'frog', 'horse', 'ship', 'truck'):
            folder = tmp_path / 'cifar10' / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                image = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                cv2.imwrite(str(folder / f'{index}.png'), image)
    monkeypatch.setenv('MMBASIS_DATA', str(tmp_path))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    init_default_scope('mmpretrain')
    cfg = load_config(CONFIG, {'model.backbone.depth': 8})
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(
        dict(state_dict=model.state_dict()), tmp_path / 'resnet56_cifar10.pth')
    return tmp_path


def train(root, work_dir, *args, **kwargs):
    """Start ``tools/train.py`` on the folder's images for three epochs."""
    command = [
        sys.executable, 'tools/train.py', CONFIG, '--work-dir',
        str(work_dir), *args, '--cfg-options', 'model.backbone.depth=8',
        'train_dataloader.batch_size=10', 'train_dataloader.num_workers=1',
        'val_dataloader.num_workers=0', 'train_cfg.max_epochs=3'
    ]
    return subprocess.Popen(
        command,
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
        **kwargs)


def finish(process):
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output[-3000:]
    return output


def weights(work_dir):
    return torch.load(
        work_dir / 'epoch_3.pth', weights_only=True)['state_dict']


def test_killed_and_resumed_is_uninterrupted(data, tmp_path, repo_root):
    whole = train(repo_root, tmp_path / 'whole')
    finish(whole)

    killed = train(repo_root, tmp_path / 'killed')
    mark, end = tmp_path / 'killed' / 'last_checkpoint', time.time() + 240
    # MMEngine creates the file, then writes it
    while not (mark.exists() and mark.read_text()) and time.time() < end:
        time.sleep(.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / 'killed' / 'epoch_3.pth').exists()

    output = finish(train(repo_root, tmp_path / 'killed', '--resume'))
    assert 'resumed epoch' in output
    a, b = weights(tmp_path / 'whole'), weights(tmp_path / 'killed')
    assert list(a) == list(b)
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize('present, said', [
    ('resnet56_cifar10.pth', 'cifar10/train'),
    ('cifar10', 'load_from of the config'),
])
def test_missing_data_is_explained(data, tmp_path, repo_root, monkeypatch,
                                   present, said):
    part = tmp_path / 'part'
    part.mkdir()
    (part / present).symlink_to(data / present)
    monkeypatch.setenv('MMBASIS_DATA', str(part))
    process = train(repo_root, tmp_path / 'run')
    output = process.communicate(timeout=200)[0]
    assert process.returncode != 0
    assert 'MMBASIS_DATA' in output and said in output
    assert 'random weights' not in output


def test_resume_without_a_checkpoint_starts_from_load_from(
        data, tmp_path, repo_root):
    """Not from random weights, as MMEngine's own rule would have it."""
    output = finish(train(repo_root, tmp_path / 'run', '--resume'))
    assert 'resnet56_cifar10.pth' in output
    assert 'random weights' not in output
