# Copyright (c) mmbasis authors. All rights reserved.
"""Text files, and values as types that JSON and safe loading can read."""
import json
import os
from contextlib import contextmanager, suppress
from typing import Any, Iterator

import numpy as np
import torch
from mmengine.logging import HistoryBuffer


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Name a temporary file beside a path, which takes its place at the end:
    the file is there whole or as it was."""
    temporary = f'{path}.tmp{os.getpid()}'
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def write_atomically(path: str, text: str) -> None:
    """Write a text file, whole or not at all."""
    with whole_file(path) as temporary, open(
            temporary, 'w', encoding='utf-8') as file:
        file.write(text)


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
