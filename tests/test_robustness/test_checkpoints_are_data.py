# Copyright (c) mmbasis authors. All rights reserved.
"""No checkpoint runs code, has anything fetched, or removes a file."""
import builtins
import functools
import os
import pickle
import subprocess
import sys
import tarfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader

import mmbasis
from mmbasis.compression import TeacherFile, read_checkpoint
from mmbasis.utils import NotDataError
from tests.toy import ToyNet, dense_checkpoint, run, toy_cfg

ROOT = Path(__file__).resolve().parents[2]
HOOK = dict(
    planner=dict(type='BudgetPlanner', macs=.5),
    distillation=dict(terms=[dict(module='fc', type='kl')]))


class Bomb:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def bombs(folder):
    """Objects that create ``folder/boom`` when they are unpickled."""
    path = str(folder / 'boom')
    yield 'system', Bomb(os.system, f'touch {path}')
    yield 'open', Bomb(builtins.open, path, 'w')
    yield 'eval', Bomb(eval, f'open({path!r}, "w")')
    yield 'exec', Bomb(exec, f'open({path!r}, "w")')
    yield 'getattr', Bomb(getattr, Bomb(__import__, 'os'), 'system')
    yield 'partial', Bomb(functools.partial, os.system, f'touch {path}')
    yield 'pickle', Bomb(pickle.loads, pickle.dumps(Bomb(os.mkdir, path)))
    yield 'torch', Bomb(torch.save, 1, path)
    yield 'popen', Bomb(subprocess.Popen, ['touch', path])
    # what MMEngine's log histories name, of another class
    yield 'history', Bomb(getattr, Path, 'touch')


FORMS = {
    'zip': {},
    'legacy': dict(_use_new_zipfile_serialization=False),
    'protocol 4': dict(pickle_protocol=4),
}
PLACES = {
    'meta': lambda bomb: dict(state_dict={}, meta=dict(bomb=bomb)),
    'weights': lambda bomb: dict(state_dict=dict(weight=bomb)),
    'hub': lambda bomb: dict(
        state_dict={}, message_hub=dict(log_scalars=dict(a=bomb))),
}
READERS = {
    'mmbasis': read_checkpoint,
    'mmengine': CheckpointLoader.load_checkpoint,
    'model': lambda path: load_checkpoint(nn.Linear(2, 2), path),
}


@pytest.mark.parametrize('form', FORMS)
def test_bombs_do_not_go_off(tmp_path, form):
    count = 0
    for name, bomb in bombs(tmp_path):
        for place, wrap in PLACES.items():
            path = str(tmp_path / f'{name}_{place}.pth')
            torch.save(wrap(bomb), path, **FORMS[form])
            for reader, read in READERS.items():
                with pytest.raises(NotDataError) as caught:
                    read(path)
                text = str(caught.value)
                assert path in text, (name, place, reader)
                assert 'tools/convert_checkpoint.py' in text
                assert not (tmp_path / 'boom').exists(), (name, place, reader)
                count += 1
    assert count == 90


def test_programs_are_refused(tmp_path):
    """Which torch runs, whatever it is told, or did before 2.6."""
    script, tar = str(tmp_path / 'script.pth'), str(tmp_path / 'tar.pth')
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    with tarfile.open(tar, 'w') as archive:
        archive.add(__file__, 'storages')
    for path in (script, tar):
        for read in READERS.values():
            with pytest.raises(NotDataError, match=f'{path} is a TorchScript'):
                read(path)


def test_runs_do_not_set_them_off(tmp_path):
    """Neither load_from, nor resuming, nor init_cfg."""
    dense = dense_checkpoint(tmp_path / 'dense.pth')
    run(toy_cfg(tmp_path / 'run', dense, epochs=1))
    content = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=True)
    content['meta']['hook_msgs'] = Bomb(os.mkdir, str(tmp_path / 'boom'))
    bomb = str(tmp_path / 'bomb.pth')
    torch.save(content, bomb)
    for resume in (False, True):
        with pytest.raises(NotDataError, match=bomb):
            run(toy_cfg(tmp_path / 'again', bomb, resume=resume))
    cfg = toy_cfg(tmp_path / 'again', None)
    cfg.model = dict(type='BombedNet', path=bomb)
    with pytest.raises(NotDataError, match=bomb):
        run(cfg)
    assert not (tmp_path / 'boom').exists()


@MODELS.register_module(force=True)
class BombedNet(ToyNet):

    def __init__(self, path, **kwargs):
        super().__init__(**kwargs)
        self.init_cfg = dict(type='Pretrained', checkpoint=path)


def test_config_of_a_checkpoint_is_not_run(tmp_path):
    """MMEngine runs ``meta.config`` as Python when it resumes."""
    dense = dense_checkpoint(tmp_path / 'dense.pth')
    run(toy_cfg(tmp_path / 'run', dense, epochs=1))
    path = tmp_path / 'run' / 'epoch_1.pth'
    content = torch.load(path, weights_only=True)
    content['meta']['config'] = f'open({str(tmp_path / "boom")!r}, "w")'
    torch.save(content, path)
    run(toy_cfg(tmp_path / 'again', str(path), resume=True))
    assert not (tmp_path / 'boom').exists()


def test_histories_of_mmengine(tmp_path):
    """As its own runs save them: read by a torch that can be told of
    harmless classes, else converted by who trusts the file."""
    history = HistoryBuffer([1., 2.], [1, 1])
    content = dict(
        state_dict=dict(weight=torch.ones(2)),
        message_hub=dict(log_scalars=dict(loss=history)),
        meta=dict(epoch=1, score=np.float64(.5)))
    old, new = tmp_path / 'old.pth', tmp_path / 'new.pth'
    torch.save(content, old)
    if not hasattr(torch.serialization, 'add_safe_globals'):
        with pytest.raises(NotDataError, match='HistoryBuffer.*convert it'):
            read_checkpoint(str(old))
    else:
        check_history(old)
    command = [sys.executable, '-W', 'ignore', 'tools/convert_checkpoint.py']
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    subprocess.run([*command, old, new], cwd=ROOT, env=env, check=True)
    torch.load(new, weights_only=True)
    check_history(new)
    again = subprocess.run(
        [*command, old, new], cwd=ROOT, env=env, capture_output=True,
        text=True)
    assert again.returncode == 2 and 'exists already' in again.stderr


def check_history(path):
    found = read_checkpoint(str(path))
    assert found['message_hub']['log_scalars']['loss'].mean() == 1.5
    assert found['meta']['score'] == .5
    assert found['state_dict']['weight'].tolist() == [1, 1]


# --------------------------------------------------------------- URLs
@pytest.fixture
def server(tmp_path):
    """A server of a folder; knows what was asked for."""

    class Handler(SimpleHTTPRequestHandler):

        def do_GET(self):
            self.server.asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    folder = tmp_path / 'served'
    folder.mkdir()
    server = ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=folder))
    server.folder, server.asked = folder, []
    server.url = f'http://127.0.0.1:{server.server_address[1]}'
    threading.Thread(
        target=server.serve_forever, args=(.02, ), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_urls_that_the_user_names_are_read_as_data(server, tmp_path,
                                                   monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    dense_checkpoint(server.folder / 'good.pth')
    found = read_checkpoint(f'{server.url}/good.pth')
    assert 'conv1.weight' in found['state_dict']
    bomb = Bomb(os.mkdir, str(tmp_path / 'boom'))
    torch.save(dict(state_dict={}, bomb=bomb), server.folder / 'bomb.pth')
    for read in (read_checkpoint, CheckpointLoader.load_checkpoint):
        with pytest.raises(NotDataError, match='cannot be read as data'):
            read(f'{server.url}/bomb.pth')
    assert not (tmp_path / 'boom').exists()
    assert len(server.asked) == 2
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ


@pytest.fixture(scope='module')
def taught(tmp_path_factory):
    """The folder of a run with a teacher."""
    folder = tmp_path_factory.mktemp('taught')
    run(toy_cfg(folder / 'run', dense_checkpoint(folder / 'dense.pth'), HOOK))
    return folder


def forged(taught, tmp_path, **meta):
    """A checkpoint of that run whose meta says something else; its config."""
    content = torch.load(taught / 'run' / 'epoch_1.pth', weights_only=True)
    content['meta'].update(meta)
    path = str(tmp_path / 'forged.pth')
    torch.save(content, path)
    return toy_cfg(tmp_path / 'forged', path, HOOK, resume=True)


def test_a_teacher_is_the_file_of_the_beginning(taught, tmp_path):
    runner = run(forged(taught, tmp_path))
    assert runner.model.distillation.teacher is not None
    dense = str(taught / 'dense.pth')
    assert runner.model.distillation.source == TeacherFile.of(dense)


@pytest.mark.parametrize('resume', [True, False])
def test_a_teacher_is_not_fetched(taught, tmp_path, server, resume):
    url = f'{server.url}/teacher.pth'
    dense_checkpoint(server.folder / 'teacher.pth')
    for hash_ in (None, TeacherFile.of(str(taught / 'dense.pth')).sha256):
        cfg = forged(taught, tmp_path, mmbasis_teacher=url,
                     mmbasis_teacher_sha256=hash_)
        cfg.resume = resume
        with pytest.raises(RuntimeError, match=f'names .{url}., which is not '
                           'fetched because a file says so: give them as '
                           'distillation='):
            run(cfg)
    assert server.asked == []


def test_a_teacher_is_not_another_file(taught, tmp_path):
    other = dense_checkpoint(tmp_path / 'other.pth', width=8)
    for meta, message in (
            (dict(mmbasis_teacher=other), r'other.pth is not the file'),
            (dict(mmbasis_teacher_sha256=None), 'without its SHA-256'),
            (dict(mmbasis_teacher=['a']), 'names .*which is not fetched'),
            (dict(mmbasis_teacher=str(tmp_path)), 'does not exist')):
        with pytest.raises(RuntimeError, match=message):
            run(forged(taught, tmp_path, **meta))


# ------------------------------------------------------- files of others
def test_a_checkpoint_removes_nothing_of_others(taught, tmp_path):
    """MMEngine removes the files, and folders, that ``best_ckpt`` and
    ``keep_ckpt_ids`` name."""
    folder = tmp_path / 'precious' / 'best_of_all'
    folder.mkdir(parents=True)
    file = tmp_path / 'forged' / 'notes.pth'
    file.parent.mkdir()
    file.write_text('mine')
    content = torch.load(taught / 'run' / 'epoch_1.pth', weights_only=True)
    path = str(tmp_path / 'forged.pth')
    for best in (str(folder), str(file), 7):
        content['message_hub']['runtime_info'].update(
            best_ckpt=best, best_score=-1.,
            keep_ckpt_ids=['../precious', str(folder), 1])
        content['message_hub']['resumed_keys'].update(
            best_ckpt=True, best_score=True, keep_ckpt_ids=True)
        torch.save(content, path)
        cfg = toy_cfg(tmp_path / 'forged', path, HOOK, resume=True)
        cfg.default_hooks = dict(checkpoint=dict(
            type='CheckpointHook', interval=1, max_keep_ckpts=1,
            save_best='accuracy', rule='greater', filename_tmpl='{}'))
        run(cfg)
        assert folder.is_dir() and file.read_text() == 'mine'


def test_all_loaders_are_covered():
    assert {'', 'http://', 'torchvision://', 'open-mmlab://'} <= set(
        CheckpointLoader._schemes)
    own = {'load_from_file', '_load'}
    for prefix, loader in CheckpointLoader._schemes.items():
        assert loader.__name__ in own or loader.reads_data, prefix
    assert hasattr(CheckpointHook, 'before_save_checkpoint')
    assert mmbasis.__version__
