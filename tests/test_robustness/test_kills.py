# Copyright (c) mmbasis authors. All rights reserved.
"""A run that is killed, at whatever moment, goes on as if it was not."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.fileio import get_file_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from mmbasis.utils import find_resumable
from tests.toy import dense_checkpoint, run, toy_cfg

ROOT = Path(__file__).resolve().parents[2]


def kill(folder, *args):
    """Kill runs and resume them; the counts and what went wrong."""
    done = subprocess.run(
        [sys.executable, '-W', 'ignore',
         str(Path(__file__).with_name('killing.py')), str(folder), *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_killed_runs_go_on(tmp_path):
    found = kill(tmp_path, '--steps', '3', '--random', '1')
    assert found['killed_at_steps'] == 3
    assert found['problems'] == {}


@pytest.mark.attack
def test_killed_at_every_step(tmp_path, capsys):
    found = kill(tmp_path, '--random', '45')
    with capsys.disabled():
        print(f'\n{found["killed_at_steps"]} kills at every step on the disk, '
              f'{found["killed_at_moments"]} at random moments: '
              f'{len(found["problems"])} did not go on as if nothing was')
    assert found['killed_at_steps'] == found['steps'] >= 60
    assert found['killed_at_steps'] + found['killed_at_moments'] >= 100
    assert found['problems'] == {}


# ------------------------------------------------------------- one by one
@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a run of three epochs."""
    folder = tmp_path_factory.mktemp('trained')
    cfg = toy_cfg(folder / 'run', dense_checkpoint(folder / 'dense.pth'),
                  epochs=3)
    run(cfg)
    return folder / 'run'


@pytest.fixture
def work_dir(trained, tmp_path):
    copy = tmp_path / 'run'
    shutil.copytree(trained, copy)
    for number in (1, 2, 3):
        os.utime(copy / f'epoch_{number}.pth', (number, number))
    (copy / 'last_checkpoint').write_text(str(copy / 'epoch_3.pth'))
    return copy


def newest(folder):
    found = find_resumable(str(folder))
    return found and Path(found).name


def cut(path):
    content = path.read_bytes()
    age = path.stat().st_mtime
    path.write_bytes(content[:len(content) // 2])
    os.utime(path, (age, age))


def test_last_checkpoint_decides(work_dir):
    assert newest(work_dir) == 'epoch_3.pth'
    # a new run, where another one had gone further
    for number, age in ((1, 4), (2, 5)):
        os.utime(work_dir / f'epoch_{number}.pth', (age, age))
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_2.pth'))
    assert newest(work_dir) == 'epoch_2.pth'


@pytest.mark.parametrize('content', ['', '/gone/epoch_2.pth'])
def test_a_checkpoint_that_was_not_named_yet(work_dir, content):
    (work_dir / 'last_checkpoint').write_text(content)
    assert newest(work_dir) == 'epoch_3.pth'
    (work_dir / 'last_checkpoint').unlink()
    assert newest(work_dir) == 'epoch_3.pth'


def test_damaged_checkpoints_are_passed_over(work_dir):
    cut(work_dir / 'epoch_3.pth')
    cut(work_dir / 'epoch_2.pth')
    (work_dir / 'epoch_4.pth.tmp12').write_bytes(b'half')
    assert newest(work_dir) == 'epoch_1.pth'
    assert not (work_dir / 'epoch_4.pth.tmp12').exists()
    cut(work_dir / 'epoch_1.pth')
    with pytest.raises(RuntimeError, match='holds no checkpoint that can be '
                       'resumed: .*epoch_3.pth: .*epoch_2.pth: '
                       '.*epoch_1.pth: .*remove these to start again'):
        find_resumable(str(work_dir))


def test_nothing_to_resume(tmp_path):
    assert find_resumable(str(tmp_path)) is None
    assert find_resumable(str(tmp_path / 'absent')) is None


def test_the_hook_passes_over_damaged_checkpoints(work_dir, trained):
    """Also a run that MMEngine's own tools resume."""
    cut(work_dir / 'epoch_3.pth')
    cfg = toy_cfg(work_dir, None, epochs=3, resume=True)
    log, = Path(run(cfg).log_dir).glob('*.log')
    assert re.search('resumed from .*epoch_2.pth. What was trained after it '
                     'is lost: .*epoch_3.pth: ', log.read_text())
    whole, again = (
        torch.load(folder / 'epoch_3.pth', weights_only=True)['state_dict']
        for folder in (trained, work_dir))
    assert all(torch.equal(whole[k], again[k]) for k in whole)


@HOOKS.register_module(force=True)
class OwnCheckpointHook(CheckpointHook):
    """As libraries derive theirs."""


@pytest.mark.parametrize('type_', ['CheckpointHook', 'OwnCheckpointHook'])
def test_old_checkpoints_go_last(tmp_path, monkeypatch, type_):
    """Of any run that imports mmbasis, compressed or dense."""
    cfg = toy_cfg(tmp_path / 'run', dense_checkpoint(tmp_path / 'dense.pth'),
                  epochs=3)
    cfg.custom_hooks = []
    cfg.default_hooks = dict(checkpoint=dict(
        type=type_, interval=1, max_keep_ckpts=1, save_best='accuracy',
        rule='less'))
    removed, remove = [], os.remove

    def noting(path, *args):
        remove(path, *args)
        if str(path).endswith('.pth'):
            removed.append(os.path.basename(path))
            named = (tmp_path / 'run' / 'last_checkpoint').read_text()
            torch.load(named, weights_only=True)  # is whole

    monkeypatch.setattr(os, 'remove', noting)
    run(cfg)
    assert removed[:1] == ['epoch_1.pth'] and 'epoch_2.pth' in removed
    left = {x.name for x in (tmp_path / 'run').glob('*.pth')}
    assert 'epoch_3.pth' in left
    assert len(left) == 2  # and the best


def test_best_checkpoints_stay_that_are_written_again(tmp_path):
    """As after a resume that repeats the epoch of the best."""
    cfg = toy_cfg(tmp_path / 'run', dense_checkpoint(tmp_path / 'dense.pth'),
                  epochs=2)
    cfg.default_hooks = dict(checkpoint=dict(
        type='CheckpointHook', interval=1, save_best='accuracy',
        rule='greater'))
    runner = run(cfg)
    hook, = (x for x in runner.hooks if isinstance(x, CheckpointHook))
    best = Path(hook.best_ckpt_path)
    runner.message_hub.update_info('best_score', -1.)
    epoch = best.stem.rpartition('_')[2]
    runner.train_loop._epoch = int(epoch)
    hook.after_val_epoch(runner, dict(accuracy=.5))
    assert Path(hook.best_ckpt_path) == best and best.is_file()


def test_files_are_whole_or_as_before(tmp_path):
    backend = get_file_backend(str(tmp_path))
    path, link = tmp_path / 'new' / 'file', tmp_path / 'link'
    backend.put(b'one', path)
    link.symlink_to(path)
    backend.put_text('two', str(link))
    assert link.is_symlink() and path.read_text() == 'two'
    backend.put(b'', '/dev/null')
    assert not Path('/dev/null').is_file()
    assert [x.name for x in path.parent.iterdir()] == ['file']
