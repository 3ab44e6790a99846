# Copyright (c) mmbasis authors. All rights reserved.
"""Trained weights by more than one road: the user's folders, the caches, and
the hosts of the model zoos."""
import functools
import hashlib
import os
import os.path as osp
import pickle
import re
import tarfile
import urllib.request
from functools import partial
from http.client import HTTPException
from typing import Any, Callable, Iterator, List, Optional

import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import MMLogger
from mmengine.runner.checkpoint import CheckpointLoader

from ..compat import allow_mmengine_checkpoints
from .collectives import together
from .io import from_plain, sha256_of, whole_file

#: OpenMMLab's host and the forks', with the same files under the same paths
HOSTS = ['https://download.openmmlab.com/', 'https://mmassets.onedl.ai/']
#: seconds that a host may be silent
TIMEOUT = 20
_BLOCK = 1 << 20
# makes torch.load read weights only
_FORCE = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
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
    try:
        digest = sha256_of(file)
    except OSError as error:
        return str(error)
    return _mismatch(file, digest)


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


class NotDataError(ValueError):
    """A checkpoint holds more than data."""


def load_from_file(filename: str, map_location: Any = None) -> Any:
    """Read a local checkpoint as data: nothing that it names is imported or
    called. MMEngine reads local files by this.

    Args:
        filename (str): The file.
        map_location (Any): See :func:`torch.load`. Defaults to None.

    Returns:
        Any: What it holds, usually a dict.

    Raises:
        FileNotFoundError: If there is no such file.
        NotDataError: If it is a program, damaged, or holds objects that this
            torch does not know to be harmless.
    """
    filename = osp.expanduser(filename)
    if not osp.isfile(filename):
        raise FileNotFoundError(f'{filename} can not be found.')
    if _is_program(filename):
        raise NotDataError(
            f'{filename} is a TorchScript program or an archive of a very old '
            'PyTorch, which is not read: give a checkpoint, which is data')
    allow_mmengine_checkpoints()
    try:
        found = torch.load(
            filename, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _not_data(filename, error) from None
    return _disarm(found)


def _is_program(filename: str) -> bool:
    """Whether torch would run a file instead of reading it, whatever it is
    told: a TorchScript archive, or one of the time before PyTorch 0.1.10."""
    with open(filename, 'rb') as file:
        start = file.read(4)
    if start != b'PK\x03\x04':
        return bool(start) and tarfile.is_tarfile(filename)
    try:  # with torch's eyes, as other readers of archives see others
        reader = torch._C.PyTorchFileReader(filename)
    except RuntimeError:  # it is truncated, which torch.load says
        return False
    records = reader.get_all_records()  # type: ignore[attr-defined]
    return 'constants.pkl' in records


def _not_data(file: str, error: Exception) -> NotDataError:
    """What an error of :func:`torch.load` found, without its advice, which is
    to run the file."""
    found = re.search(
        r'(Unsupported|Trying to|Can only)(.(?!\. ))*', str(error))
    reason = found[0] if found else str(error).partition('\n')[0]
    return NotDataError(
        f'{file} cannot be read as data: {reason.strip()}. Either it is '
        'damaged, or it holds objects, and reading these can run any code. If '
        'you trust who made it, convert it once: python '
        f'tools/convert_checkpoint.py {file} NEW_FILE (or: mmbasis '
        'convert-checkpoint)')


def _disarm(checkpoint: Any) -> Any:
    """Take out of a checkpoint what MMEngine would run; log histories as
    plain types become MMEngine's again."""
    if not isinstance(checkpoint, dict):
        return checkpoint
    meta = checkpoint.get('meta')
    if isinstance(meta, dict) and meta.pop('config', None) is not None:
        MMLogger.get_current_instance().warning(
            'meta.config of the checkpoint is ignored: MMEngine would run it '
            'as Python when it resumes')
    if 'message_hub' in checkpoint:
        checkpoint['message_hub'] = from_plain(checkpoint['message_hub'])
    return checkpoint


def _load(filename: str, map_location: Any = None) -> dict:
    """Reads what a URL of a model zoo names, whoever asks MMEngine for it:
    ``load_from``, or the ``init_cfg`` of a backbone."""
    return load_from_file(find_weights(filename), map_location)


def _as_data(load: Callable) -> Callable:
    """Have one of MMEngine's loaders read as data what it downloads."""

    @functools.wraps(load)
    def loader(filename: str, *args: Any, **kwargs: Any) -> Any:
        allow_mmengine_checkpoints()
        before = os.environ.get(_FORCE)
        os.environ[_FORCE] = '1'  # over whatever the loader asks for
        try:
            return _disarm(load(filename, *args, **kwargs))
        except pickle.UnpicklingError as error:
            raise _not_data(filename, error) from None
        finally:
            del os.environ[_FORCE]
            if before is not None:
                os.environ[_FORCE] = before

    loader.reads_data = True  # type: ignore[attr-defined]
    return loader


def register_loader() -> None:
    """Have MMEngine read checkpoints as data, from wherever; and URLs of
    :data:`HOSTS` by :func:`find_weights`."""
    for prefix, load in list(CheckpointLoader._schemes.items()):
        if load not in (load_from_file, _load) and not hasattr(
                load, 'reads_data'):
            CheckpointLoader.register_scheme(
                prefix, _as_data(load), force=True)
    CheckpointLoader.register_scheme('', load_from_file, force=True)
    CheckpointLoader.register_scheme(HOSTS, _load, force=True)


register_loader()
