# Copyright (c) mmbasis authors. All rights reserved.
"""The tools as a user runs them: processes on real images."""
import json
import subprocess
import sys

import pytest
import torch

from mmbasis.compression import read_checkpoint

# the digits on a network that trains in a second
FAST = ('model.backbone.stem_channels=4', 'model.backbone.base_channels=4',
        'model.head.in_channels=32', 'param_scheduler.T_max=2')


@pytest.fixture(scope='module')
def data(tmp_path_factory, repo_root):
    """Folder for MMBASIS_DATA, with the digits of the demo in it."""
    pytest.importorskip('sklearn')
    folder = tmp_path_factory.mktemp('data')
    tool = repo_root / 'tools' / 'demo' / 'make_digits.py'
    subprocess.check_call([sys.executable, str(tool), str(folder / 'digits')])
    return folder


@pytest.fixture
def tool(repo_root, data, monkeypatch):
    """Function that runs a tool in its own process."""
    monkeypatch.setenv('MMBASIS_DATA', str(data))
    monkeypatch.setenv('OMP_NUM_THREADS', '1')

    def run(name, *args, prefix=(sys.executable, )):
        return subprocess.run([
            *prefix,
            str(repo_root / 'tools' / name),
            str(repo_root / 'configs' / 'demo' / 'digits.py'), *map(str, args)
        ],
                              capture_output=True,
                              text=True,
                              cwd=repo_root)

    return run


def weights(path):
    return read_checkpoint(str(path))['state_dict']


def test_digits_are_split_evenly(data):
    counts = {
        split.name: [len(list(d.iterdir())) for d in sorted(split.iterdir())]
        for split in (data / 'digits').iterdir()
    }
    assert {
        k: sum(v)
        for k, v in counts.items()
    } == dict(
        train=1253, holdout=180, test=364)
    assert all(len(v) == 10 and max(v) - min(v) <= 7 for v in counts.values())


def test_train_resume_and_test(tool, tmp_path):
    whole, resumed = tmp_path / 'whole', tmp_path / 'resumed'
    options = ('--cfg-options', *FAST, 'train_cfg.max_epochs=2',
               'default_hooks.checkpoint.max_keep_ckpts=2')
    result = tool('train.py', '--work-dir', whole, *options)
    assert result.returncode == 0, result.stderr
    # as if the first run had ended after its first checkpoint
    result = tool('train.py', '--work-dir', resumed, '--resume',
                  whole / 'epoch_1.pth', '--no-validate', *options)
    assert result.returncode == 0, result.stderr
    expected = weights(whole / 'epoch_2.pth')
    actual = weights(resumed / 'epoch_2.pth')
    assert all(torch.equal(expected[key], actual[key]) for key in expected)

    metrics = tmp_path / 'metrics.json'
    result = tool('test.py', whole / 'epoch_2.pth', '--work-dir', whole,
                  '--out', metrics, *options)
    assert result.returncode == 0, result.stderr
    assert json.loads(metrics.read_text())['accuracy/top1'] > 10


def test_two_processes_on_cpus(tool, tmp_path):
    if torch.cuda.is_available():
        pytest.skip('gloo is for machines without a GPU')
    launch = (sys.executable, '-m', 'torch.distributed.run', '--standalone',
              '--nproc_per_node=2')
    result = tool(
        'train.py',
        '--work-dir',
        tmp_path,
        '--launcher',
        'pytorch',
        '--auto-scale-lr',
        '--cfg-options',
        *FAST,
        'train_cfg.max_epochs=1',
        prefix=launch)
    assert result.returncode == 0, result.stderr
    # 1253 images, two times 64 of them in an iteration
    assert '[1][10/10]' in result.stdout + result.stderr
    assert 'LR is set based on batch size of 64 and the current batch size ' \
        'is 128' in result.stdout + result.stderr
    assert (tmp_path / 'epoch_1.pth').exists()


def test_clear_errors(tool, tmp_path, monkeypatch):
    result = tool('test.py', tmp_path / 'absent.pth')
    assert result.returncode == 2 and 'absent.pth does not exist' in \
        result.stderr
    result = tool('test.py', __file__, '--out', 'metrics.txt')
    assert result.returncode == 2 and 'must end with .pkl or .json' in \
        result.stderr
    monkeypatch.setenv('MMBASIS_DATA', str(tmp_path))
    result = tool('train.py', '--work-dir', tmp_path / 'work')
    assert result.returncode == 1
    assert f'MMBASIS_DATA is {tmp_path}' in result.stderr
    assert 'python tools/demo/make_digits.py' in result.stderr
