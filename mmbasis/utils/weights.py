# Copyright (c) mmbasis authors. All rights reserved.
"""Trained weights by more than one road: the user's folders, the caches, and
the hosts of the model zoos."""
import hashlib
import os
import os.path as osp
import re
import urllib.request
from functools import partial
from http.client import HTTPException
from typing import Any, Iterator, List, Optional

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import CheckpointLoader, load_from_local

from .collectives import together
from .io import whole_file

#: OpenMMLab's host and the forks', with the same files under the same paths
HOSTS = ['https://download.openmmlab.com/', 'https://mmassets.onedl.ai/']
#: seconds that a host may be silent
TIMEOUT = 20
_BLOCK = 1 << 20
_HASH = re.compile(r'-([0-9a-f]{8})\.pth(?:\.tar)?$')


def find_weights(name: str) -> str:
    """Find a checkpoint, or download it.

    Looked for are, in this order: the file itself; its base name in
    ``$MMBASIS_DATA`` (``data`` without it) and ``checkpoints`` below that, in
    ``checkpoints``, and in the caches of torch and MMEngine; then, of a URL of
    a model zoo, each of :data:`HOSTS`. A file that a zoo named after its hash
    must have that hash. In several processes, the first one downloads.

    Args:
        name (str): A file, or a URL of one of :data:`HOSTS`.

    Returns:
        str: A local file. Other URLs and schemes, such as
        ``'torchvision://resnet18'``, which MMEngine reads, as they are.

    Raises:
        FileNotFoundError: If no road leads to it; says what was tried.
    """
    path = _path_at_host(name)
    if path is None and ('://' in name or osp.isfile(name)):
        return name
    tried: List[str] = []
    found = None
    if path is None or get_rank() == 0:
        found = _find(name, path, tried)
    if path is not None and get_world_size() > 1:
        together(f'download of {name}')
        # where the disk is not shared, each process downloads its own
        found = found or _find(name, path, tried)
    if found is None:
        raise FileNotFoundError(_explain(name, path, tried))
    return found


def check_load_from(cfg: Any) -> None:
    """Find the weights that a config starts from, before any work begins; see
    :func:`find_weights` for errors."""
    if cfg.get('load_from') and not cfg.get('resume'):
        try:
            cfg.load_from = find_weights(cfg.load_from)
        except FileNotFoundError as error:
            data = os.environ.get('MMBASIS_DATA')
            raise FileNotFoundError(
                f'load_from of the config: {error} (MMBASIS_DATA is '
                f'{data or "not set: data"})') from None


def _path_at_host(name: str) -> Optional[str]:
    for host in HOSTS:
        if name.startswith(host):
            return name[len(host):]
    return None


def _folders() -> Iterator[str]:
    data = os.environ.get('MMBASIS_DATA', 'data')
    cache = os.environ.get('XDG_CACHE_HOME', osp.expanduser('~/.cache'))
    yield from (data, osp.join(data, 'checkpoints'), 'checkpoints', _cache(),
                os.environ.get('MMENGINE_HOME', osp.join(cache, 'mmengine')))


def _cache() -> str:
    """Where torch, and so MMEngine, puts what it downloads."""
    return osp.join(torch.hub.get_dir(), 'checkpoints')


def _find(name: str, path: Optional[str], tried: List[str]) -> Optional[str]:
    """A sound file, or None; what was tried goes into the list."""
    base = osp.basename(path or name)
    if path is not None or base == name:
        for folder in _folders():
            file = osp.join(folder, base)
            problem = _problem_of(file)
            if problem is None:
                return file
            tried.append(f'{file}: {problem}')
    for host in HOSTS if path is not None else []:
        try:
            return _download(f'{host}{path}', osp.join(_cache(), base))
        except (OSError, ValueError, HTTPException) as error:
            tried.append(f'{host}{path}: {error}')
    return None


def _problem_of(file: str) -> Optional[str]:
    """Why a local file cannot be taken."""
    if not osp.isfile(file):
        return 'no such file'
    digest = hashlib.sha256()
    try:
        with open(file, 'rb') as stream:
            for block in iter(partial(stream.read, _BLOCK), b''):
                digest.update(block)
    except OSError as error:
        return str(error)
    return _mismatch(file, digest.hexdigest())


def _mismatch(file: str, digest: str) -> Optional[str]:
    """Why a file is not what its name says, None if it is or says nothing."""
    wanted = _HASH.search(file)
    if wanted is None or digest.startswith(wanted[1]):
        return None
    return (f'its SHA-256 begins with {digest[:8]}, not with {wanted[1]}: '
            'damaged, incomplete or another file')


def _download(url: str, target: str) -> str:
    """Raises an :class:`OSError` if there is no connection, a
    :class:`ValueError` if it is another file."""
    os.makedirs(osp.dirname(target), exist_ok=True)
    MMLogger.get_current_instance().info('Downloading %s to %s', url, target)
    digest = hashlib.sha256()
    with whole_file(target) as temporary:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as source, open(
                temporary, 'wb') as file:
            for block in iter(partial(source.read, _BLOCK), b''):
                digest.update(block)
                file.write(block)
            size = int(source.headers.get('Content-Length', file.tell()))
            if file.tell() != size:
                raise ValueError(f'it ended after {file.tell()} of {size} '
                                 'bytes')
        problem = _mismatch(target, digest.hexdigest())
        if problem is not None:
            raise ValueError(problem)
    return target


def _explain(name: str, path: Optional[str], tried: List[str]) -> str:
    """What was tried, and what to do without a network."""
    if not tried:
        return f'checkpoint {name} does not exist'
    if path is None:
        folders = ', '.join(osp.dirname(x.partition(': ')[0]) for x in tried)
        return (f'checkpoint {name} does not exist, neither here nor in '
                f'{folders}')
    return '\n  '.join([
        f'checkpoint {name} cannot be had. Tried:', *tried,
        'Without a network: fetch it elsewhere and put it into one of these '
        'folders, under this name'
    ])


def _load(filename: str, map_location: Any = None) -> dict:
    """Reads what a URL of a model zoo names, whoever asks MMEngine for it:
    ``load_from``, or the ``init_cfg`` of a backbone."""
    return load_from_local(find_weights(filename), map_location)


def register_loader() -> None:
    """Have MMEngine read URLs of :data:`HOSTS` by :func:`find_weights`."""
    CheckpointLoader.register_scheme(HOSTS, _load, force=True)


register_loader()
