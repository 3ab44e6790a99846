# Copyright (c) mmbasis authors. All rights reserved.
"""Text files, and values as types that JSON and safe loading can read."""
import hashlib
import json
import os
import os.path as osp
from contextlib import contextmanager, suppress
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Iterable, Iterator, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Name a temporary file beside a path, which takes its place at the end:
    the file is there whole or as it was, also after a loss of power. An
    OSError, such as that of a full disk, names the file."""
    temporary = f'{path}.tmp{os.getpid()}'
    try:
        yield temporary
        _write_through(temporary)
        os.replace(temporary, path)
        _write_through(osp.dirname(path) or '.')
    except OSError as error:
        if error.errno is not None and error.filename in (None, temporary):
            error.filename = path
        raise
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


@contextmanager
def whole_set(folder: str) -> Iterator[str]:
    """Name a temporary folder inside of one, whose files take their places
    there at the end: all of them, or all stay as they were. No moment mixes
    files of two sets."""
    with TemporaryDirectory(
            prefix='.new', dir=folder) as new, TemporaryDirectory(
                prefix='.old', dir=folder) as old:
        try:
            yield new
        except OSError as error:  # it shall name where files go
            path = str(error.filename or '')
            if osp.dirname(path) == new:
                error.filename = osp.join(folder, osp.basename(path))
            raise
        names = os.listdir(new)
        for name in names:
            _write_through(osp.join(new, name))
        try:
            _move(names, folder, old)
            _move(names, new, folder)
        except BaseException:
            _move([x for x in names if not osp.exists(osp.join(new, x))],
                  folder, new)
            _move(names, old, folder)
            raise
        _write_through(folder)


def _move(names: Iterable[str], source: str, target: str) -> None:
    """Rename what is there of some files into another folder."""
    for name in names:
        with suppress(FileNotFoundError):
            os.replace(osp.join(source, name), osp.join(target, name))


def _write_through(path: str) -> None:
    """Have a file, or the names in a folder, on the disk."""
    flags = os.O_RDONLY | getattr(os, 'O_BINARY', 0)
    try:
        descriptor = os.open(path, flags)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: str) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(file, 'rb') as stream:
        for block in iter(partial(stream.read, 1 << 20), b''):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: str, content: Union[str, memoryview]) -> None:
    """Write a file, whole or not at all; text in UTF-8."""
    if isinstance(content, str):
        content = memoryview(content.encode())
    with whole_file(path) as temporary, open(temporary, 'wb') as file:
        file.write(content)


def to_plain(value: Any) -> Any:
    """Copy nested containers with plain types in place of NumPy's and of
    MMEngine's log histories, which :func:`from_plain` brings back. Tensors
    stay, whatever else is unknown as well."""
    if isinstance(value, HistoryBuffer):
        return dict(
            __history__=to_plain(list(value.data)),
            max_length=value.max_length)
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_plain(v) for v in value)
    return value


def from_plain(value: Any) -> Any:
    """Turn plain log histories back into MMEngine's."""
    if not isinstance(value, dict):
        return value
    if '__history__' in value:
        return HistoryBuffer(
            *value['__history__'], max_length=value['max_length'])
    return {k: from_plain(v) for k, v in value.items()}


def to_json(value: Any) -> Any:
    """Copy with the types of JSON: arrays and tensors become lists, and text
    what JSON has no type for."""
    arrays = (np.generic, np.ndarray, torch.Tensor)
    return json.loads(json.dumps(
        value, default=lambda x: (
            x.tolist() if isinstance(x, arrays) else repr(x))))
