# Copyright (c) mmbasis authors. All rights reserved.
"""Weights by more than one road, from servers on this machine."""
import functools
import hashlib
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader

from mmbasis.compression import read_checkpoint
from mmbasis.utils import check_load_from, find_weights, weights

FOLDER = 'zoo/v2.0'


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and notes what was asked for."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.server.short:
            self.send_response(200)
            self.send_header('Content-Length', '1000')
            self.end_headers()
            self.wfile.write(b'short')
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    """Two hosts with folders of their own, an empty cache, no user's files."""
    servers = []
    for name in ('first', 'second'):
        folder = tmp_path / name
        (folder / FOLDER).mkdir(parents=True)
        server = ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Handler, directory=folder))
        server.folder, server.asked, server.short = folder, [], False
        server.url = f'http://127.0.0.1:{server.server_address[1]}/'
        threading.Thread(
            target=server.serve_forever, args=(.02, ), daemon=True).start()
        servers.append(server)
    monkeypatch.setattr(weights, 'HOSTS', [x.url for x in servers])
    monkeypatch.setattr(CheckpointLoader, '_schemes',
                        dict(CheckpointLoader._schemes))
    weights.register_loader()
    (tmp_path / 'work').mkdir()
    monkeypatch.chdir(tmp_path / 'work')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    monkeypatch.setenv('MMBASIS_DATA', str(tmp_path / 'data'))
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def file(tmp_path):
    """A checkpoint under the name that a zoo gives it."""
    path = tmp_path / 'new.pth'
    torch.save(dict(state_dict=dict(weight=torch.arange(3.))), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(tmp_path / f'net_20200130-{digest[:8]}.pth')


def put(file, folder, content=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file.name).write_bytes(content or file.read_bytes())
    return folder / file.name


def url(host, file):
    return f'{host.url}{FOLDER}/{file.name}'


def cached(tmp_path, file):
    return tmp_path / 'torch' / 'hub' / 'checkpoints' / file.name


def test_downloads_once(hosts, file, tmp_path):
    put(file, hosts[0].folder / FOLDER)
    for _ in range(2):
        found = find_weights(url(hosts[0], file))
        assert found == str(cached(tmp_path, file))
        assert cached(tmp_path, file).read_bytes() == file.read_bytes()
    assert len(hosts[0].asked) == 1 and not hosts[1].asked


@pytest.mark.parametrize('named', [0, 1])
def test_the_other_host_has_the_same_paths(hosts, file, tmp_path, named):
    put(file, hosts[1 - named].folder / FOLDER)
    assert find_weights(url(hosts[named], file)) == str(
        cached(tmp_path, file))


@pytest.mark.parametrize('place', [
    'data', 'data/checkpoints', 'work/checkpoints', 'torch/hub/checkpoints',
    'mmengine'
])
def test_local_files_need_no_host(hosts, file, tmp_path, place):
    path = put(file, tmp_path / place)
    for name in (url(hosts[0], file), file.name):
        assert os.path.samefile(find_weights(name), path)
    assert not hosts[0].asked + hosts[1].asked


def test_damaged_files_are_passed_over(hosts, file, tmp_path):
    put(file, tmp_path / 'data', b'half a download')
    put(file, cached(tmp_path, file).parent, b'another half')
    put(file, hosts[0].folder / FOLDER, b'a page that says sorry')
    put(file, hosts[1].folder / FOLDER)
    found = find_weights(url(hosts[0], file))
    assert found == str(cached(tmp_path, file))
    assert cached(tmp_path, file).read_bytes() == file.read_bytes()
    assert len(hosts[0].asked) == len(hosts[1].asked) == 1


def test_a_name_without_hash_must_come_whole(hosts, file, tmp_path):
    plain = file.rename(tmp_path / 'net.pth')
    hosts[0].short = True
    put(plain, hosts[1].folder / FOLDER)
    assert find_weights(url(hosts[0], plain)) == str(cached(tmp_path, plain))
    hosts[1].short = True
    cached(tmp_path, plain).unlink()
    with pytest.raises(FileNotFoundError, match='ended after 5 of 1000'):
        find_weights(url(hosts[0], plain))
    assert not list(cached(tmp_path, plain).parent.iterdir())


def test_offline_says_what_to_do(hosts, file, tmp_path):
    put(file, tmp_path / 'data', b'half a download')
    gone = url(hosts[0], file)
    for host in hosts:
        host.shutdown()
        host.server_close()
    with pytest.raises(FileNotFoundError) as error:
        find_weights(gone)
    text = str(error.value)
    for part in (gone, url(hosts[1], file), f'{tmp_path}/data/{file.name}: '
                 'its SHA-256 begins with', 'checkpoints', 'refused',
                 'Without a network: fetch it elsewhere'):
        assert part in text
    assert not list((tmp_path / 'torch').rglob('*.pth'))


def test_other_names(hosts, tmp_path):
    for name in ('torchvision://resnet18', 'https://elsewhere.org/a.pth'):
        assert find_weights(name) == name
    with pytest.raises(FileNotFoundError, match='a/b.pth does not exist$'):
        find_weights('a/b.pth')
    with pytest.raises(FileNotFoundError, match='nor in .*data, '):
        find_weights('b.pth')


def test_a_file_that_is_named_is_taken(hosts, file):
    file.write_bytes(b'the user knows')
    assert find_weights(str(file)) == str(file)


def test_mmengine_takes_the_same_roads(hosts, file):
    put(file, hosts[1].folder / FOLDER)
    for read in (CheckpointLoader.load_checkpoint, read_checkpoint):
        found = read(url(hosts[0], file))['state_dict']
        assert found['weight'].tolist() == [0, 1, 2]


def test_a_run_looks_before_it_begins(hosts, file, tmp_path):
    cfg = Config(dict(load_from=url(hosts[0], file), resume=False))
    with pytest.raises(FileNotFoundError, match='cannot be had'):
        check_load_from(cfg)
    path = put(file, tmp_path / 'data')
    check_load_from(cfg)
    assert cfg.load_from == str(path)
    # what is resumed is a file of the run, and the runner finds it
    cfg = Config(dict(load_from='absent.pth', resume=True))
    check_load_from(cfg)
    assert cfg.load_from == 'absent.pth'


def test_the_forks_host_is_known():
    assert CheckpointLoader._get_checkpoint_loader(
        'https://mmassets.onedl.ai/mmdetection/v2.0/a.pth') is weights._load
    assert CheckpointLoader._get_checkpoint_loader(
        'https://download.openmmlab.com/a.pth') is weights._load
    assert CheckpointLoader._get_checkpoint_loader(
        'https://elsewhere.org/a.pth') is not weights._load
