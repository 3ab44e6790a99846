# Copyright (c) mmbasis authors. All rights reserved.
"""A disk that is full, or a process that dies, leaves no half results."""
import errno
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from mmengine.fileio import get_file_backend

from mmbasis.planning import CompressionPlan
from mmbasis.utils.io import whole_file, whole_set, write_atomically
from tests.toy import dense_checkpoint, toy_cfg

ROOT = Path(__file__).resolve().parents[2]
SET = ('plan.json', 'report.json', 'compressed.py', 'compressed.pth')


@contextmanager
def files_of_at_most(size):
    """Have writes past a size fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content_of(folder):
    return {x.name: x.read_bytes() for x in Path(folder).iterdir()}


@pytest.mark.parametrize('write', [
    lambda path: write_atomically(path, 'x' * 9000),
    lambda path: get_file_backend(path).put(b'x' * 9000, path),
    lambda path: get_file_backend(path).put_text('x' * 9000, path),
])
@pytest.mark.parametrize('old', [True, False])
def test_one_file(tmp_path, write, old):
    path = str(tmp_path / 'file.json')
    if old:
        write_atomically(path, 'old')
    before = content_of(tmp_path)
    with files_of_at_most(4096), pytest.raises(OSError) as caught:
        write(path)
    assert str(caught.value) == f"[Errno 27] File too large: '{path}'"
    assert content_of(tmp_path) == before
    write(path)
    assert content_of(tmp_path) == {'file.json': b'x' * 9000}


def test_other_errors_stay_as_they_are(tmp_path):
    with pytest.raises(OSError, match='^timed out$'), whole_file(
            str(tmp_path / 'file')):
        raise OSError('timed out')
    assert content_of(tmp_path) == {}


# ---------------------------------------------------------------- a set
def write_set(folder, content):
    with whole_set(str(folder)) as new:
        for name in 'abc':
            write_atomically(os.path.join(new, name), content)


def test_a_set_is_there_together_or_not_at_all(tmp_path, monkeypatch):
    """Whatever of the renames fails."""
    replace, left = os.replace, [0]

    def failing(*args):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, 'No space left on device', args[0])
        replace(*args)

    monkeypatch.setattr(os, 'replace', failing)
    write_set(tmp_path, 'old')
    old = content_of(tmp_path)
    assert old == dict.fromkeys('abc', b'old')
    failed = 0
    while True:
        left[0] = failed + 1
        try:
            write_set(tmp_path, 'new')
        except OSError as error:
            assert error.errno == errno.ENOSPC
            assert content_of(tmp_path) == old
            failed += 1
        else:
            break
    assert failed == 9  # three files: written, old ones away, new ones there
    assert content_of(tmp_path) == dict.fromkeys('abc', b'new')


def test_a_first_set_of_which_one_fails(tmp_path):
    with pytest.raises(OSError) as caught, whole_set(str(tmp_path)) as new:
        write_atomically(os.path.join(new, 'a'), 'a')
        with files_of_at_most(100):
            write_atomically(os.path.join(new, 'b'), 'b' * 1000)
    # not the place where it stands meanwhile
    assert caught.value.filename == str(tmp_path / 'b')
    assert content_of(tmp_path) == {}


def die_at(step, folder):
    """End this process before one of its renames."""
    replace, left = os.replace, [step]

    def last(*args):
        left[0] -= 1
        if left[0] == 0:
            os._exit(3)
        replace(*args)

    os.replace = last
    try:
        write_set(folder, 'new')
    finally:
        os._exit(4)


def test_a_killed_process_does_not_mix_sets(tmp_path):
    for step in range(1, 10):
        folder = tmp_path / str(step)
        folder.mkdir()
        write_set(folder, 'old')
        pid = os.fork()
        if pid == 0:
            die_at(step, folder)
        assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 3
        found = {x.read_text() for x in folder.iterdir() if x.is_file()}
        assert len(found) <= 1, step
        write_set(folder, 'newest')
        assert {x.read_text() for x in folder.iterdir() if x.is_file()} == {
            'newest'}


# ------------------------------------------------------------ the tools
@pytest.fixture(scope='module')
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp('full')
    dense = dense_checkpoint(folder / 'dense.pth')
    cfg = toy_cfg(folder / 'train', dense, epochs=2)
    cfg.custom_imports = dict(imports=['tests.toy', 'mmbasis'])
    cfg.custom_hooks = []
    cfg.dump(folder / 'config.py')
    return folder


def tool(name, *args, size=None):
    """Run a tool on a disk that takes files of at most a size."""
    limit = None if size is None else (
        lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
    return subprocess.run(
        [sys.executable, '-W', 'ignore', f'tools/{name}.py', *map(str, args)],
        cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
        preexec_fn=limit)


def test_a_compression_is_written_together(workplace):
    args = (workplace / 'config.py', workplace / 'dense.pth', '--work-dir',
            workplace / 'compressed', '--calib-batches', 2)
    done = tool('compress', *args, '--macs', .6)
    assert done.returncode == 0, done.stderr
    before = {x: (workplace / 'compressed' / x).read_bytes() for x in SET}
    size = len(before['compressed.pth'])
    assert size > max(len(before[x]) for x in SET[:3]), 'the limit is for it'
    full = tool('compress', *args, '--macs', .4, size=size // 2)
    assert full.returncode != 0
    path = workplace / 'compressed' / 'compressed.pth'
    assert f"File too large: '{path}'" in full.stderr
    assert before == {x: (workplace / 'compressed' / x).read_bytes()
                      for x in SET}
    assert not list((workplace / 'compressed').glob('.*'))
    again = tool('compress', *args, '--macs', .4)
    assert again.returncode == 0, again.stderr
    plan = CompressionPlan.load(str(workplace / 'compressed' / 'plan.json'))
    content = torch.load(path, weights_only=True)
    assert content['meta']['mmbasis'] == plan.to_dict()
    assert str(before['plan.json']) != str(plan.to_dict())


def test_training_keeps_the_last_checkpoint(workplace):
    args = (workplace / 'config.py', '--work-dir', workplace / 'train')
    done = tool('train', *args, '--cfg-options', 'train_cfg.max_epochs=1')
    assert done.returncode == 0, done.stderr
    first = workplace / 'train' / 'epoch_1.pth'
    size = first.stat().st_size
    full = tool('train', *args, '--resume', size=size // 2)
    assert full.returncode != 0
    path = workplace / 'train' / 'epoch_2.pth'
    assert f"File too large: '{path}'" in full.stderr
    assert first.stat().st_size == size
    assert not path.exists()
    assert not list((workplace / 'train').glob('*.tmp*'))
    again = tool('train', *args, '--resume')
    assert again.returncode == 0, again.stderr
    assert path.is_file()
