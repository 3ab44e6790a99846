# Copyright (c) mmbasis authors. All rights reserved.
"""What all tools do with a config before they build a runner from it."""
import math
import os.path as osp
from typing import Any, Optional

import numpy as np
import torch
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.hub import get_config
from mmengine.registry import MODELS
from mmengine.utils import get_object_from_string


def load_config(path: str,
                cfg_options: Optional[dict] = None,
                work_dir: Optional[str] = None) -> Config:
    """Read a config of any OpenMMLab library and fill in what tools expect.

    Args:
        path (str): Config file, or ``library::config`` of an installed
            library such as ``mmpretrain::resnet/resnet18_8xb32_in1k.py``.
        cfg_options (dict, optional): Values that override the file's, keys
            with dots. Defaults to None.
        work_dir (str, optional): Where the run writes. None leaves the
            config's own, else ``work_dirs/<name of the config>``.

    Raises:
        FileNotFoundError: If there is no such file.
        KeyError: If the config describes no model.
    """
    cfg = _read(path)
    if cfg_options:
        cfg.merge_from_dict(cfg_options)
    if cfg.get('model') is None:
        raise KeyError(f"config {path} has no 'model': found "
                       f'{sorted(cfg.keys())}')
    name = osp.splitext(osp.basename(path))[0]
    cfg.work_dir = work_dir or cfg.get('work_dir') or f'work_dirs/{name}'
    if cfg.get('data_preprocessor') is not None:  # as the runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    # pure-Python configs have None, but may name some parts
    if 'default_scope' in cfg and cfg.default_scope is None:
        cfg.default_scope = _library(cfg.model)
    if cfg.get('default_scope') == 'mmpretrain':
        _stack_samples(cfg)
    return cfg


def _read(path: str) -> Config:
    """Read the file, or the config of an installed library."""
    if '::' in path:
        return get_config(path)
    if not osp.isfile(path):
        raise FileNotFoundError(
            f'config {path} does not exist (looked from '
            f'{osp.abspath(osp.curdir)}); give a file, or the name of an '
            f"installed config as 'library::folder/name.py'")
    return Config.fromfile(path)


def _library(model: dict) -> str:
    """The scope of the library that a model given as a class comes from."""
    model = model.get('architecture', model)
    library = getattr(model.get('type'), '__module__', '').partition('.')[0]
    return library if library in MODELS.children else 'mmengine'


def _stack_samples(cfg: Config) -> None:
    """Set up data loaders as mmpretrain's own tools do."""
    for name in ('train', 'val', 'test'):
        loader = cfg.get(f'{name}_dataloader')
        if loader is not None:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())


def as_text_config(cfg: Config) -> Config:
    """A config that can be written to a file and read again.

    The classes and functions after ``type`` become strings to import.

    Raises:
        TypeError: If it holds an object that no text can name.
    """
    return Config(
        _as_text(cfg._to_lazy_dict(), 'cfg'),
        cfg_text=cfg.text,
        filename=cfg.filename)


class _Special(float):
    """Infinity or no number, as Python reads them."""

    def __repr__(self) -> str:
        return f"float('{float(self)}')"


def _as_text(value: Any, key: str) -> Any:
    """A value of which Python reads the representation again."""
    if isinstance(value, dict):
        return {k: _as_text(v, f'{key}.{k}') for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(
            _as_text(v, f'{key}[{i}]') for i, v in enumerate(value))
    if isinstance(value, (LazyAttr, LazyObject)):
        value = value.build()
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return _Special(value)
    if value is None or isinstance(value, (bool, int, float, complex, str,
                                           bytes, set, range, slice)):
        return value
    if key.rpartition('.')[2] not in ('type', 'constructor'):
        raise TypeError(
            f'{key} of the config is {value!r}: the config of the compressed '
            'model is a text, which can name objects only as a type. Give '
            'numbers, strings, or a dict with a type')
    name = '.'.join(
        str(getattr(value, x, None)) for x in ('__module__', '__qualname__'))
    if get_object_from_string(name) is not value:
        raise TypeError(
            f'{key} of the config is {value!r}, which cannot be imported as '
            f'{name}: define it at the top of a module')
    return name
