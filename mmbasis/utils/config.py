# Copyright (c) mmbasis authors. All rights reserved.
"""What all tools do before they build a runner from a config."""
import atexit
import gc
import importlib
import math
import os
import os.path as osp
from typing import Any, Optional

import numpy as np
import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.hub import get_config
from mmengine.registry import MODELS
from mmengine.utils import get_object_from_string

from .libraries import check_library, import_models, libraries_of
from .strategy import check_config


def load_config(path: str, cfg_options: Optional[dict] = None,
                work_dir: Optional[str] = None) -> Config:
    """Read a config of any OpenMMLab library and fill in what tools expect.

    Args:
        path (str): File, or ``library::config`` of an installed library, such
            as ``mmpretrain::resnet/resnet18_8xb32_in1k.py``.
        cfg_options (dict, optional): Overrides, keys with dots.
        work_dir (str, optional): Where the run writes. Defaults to the
            config's own, else ``work_dirs/<name of the config>``.

    Raises a :class:`FileNotFoundError`; a :class:`ModuleNotFoundError` for a
    library that is not installed; a :class:`KeyError` without a model; a
    :class:`RuntimeError` of a ``strategy`` that cannot compress.
    """
    if '::' not in path and not osp.isfile(path):
        raise FileNotFoundError(
            f'config {path} does not exist (looked from {os.getcwd()}); give '
            "a file, or the name of an installed config as "
            "'library::folder/name.py'")
    if '::' in path:  # MMEngine would have pip install it
        check_library(path.partition('::')[0])
    cfg = get_config(path) if '::' in path else Config.fromfile(path)
    cfg.merge_from_dict(cfg_options or {})
    if cfg.get('model') is None:
        raise KeyError(f"config {path} has no 'model': found "
                       f'{sorted(cfg.keys())}')
    name = osp.splitext(osp.basename(path))[0]
    cfg.work_dir = work_dir or cfg.get('work_dir') or f'work_dirs/{name}'
    if cfg.get('data_preprocessor') is not None:  # as the runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    _fill_in_by_library(cfg)
    for library in libraries_of(cfg):
        import_models(library)
    check_config(cfg)
    return cfg


def _fill_in_by_library(cfg: Config) -> None:
    # pure-Python configs have None, but may name some parts
    if 'default_scope' in cfg and cfg.default_scope is None:
        type_ = cfg.model.get('architecture', cfg.model).get('type')
        library = getattr(type_, '__module__', '').partition('.')[0]
        cfg.default_scope = (
            library if library in MODELS.children else 'mmengine')
    if cfg.get('default_scope') == 'mmpretrain':  # as its own tools do
        for split in ('train', 'val', 'test'):
            loader = cfg.get(f'{split}_dataloader')
            if loader is not None:
                loader.setdefault('collate_fn', dict(type='default_collate'))
                loader.setdefault('pin_memory', torch.cuda.is_available())


def as_text_config(cfg: Config) -> Config:
    """A config that can be written to a file and read again: the classes and
    functions after ``type`` become strings to import. Raises a
    :class:`TypeError` if it holds an object that no text can name."""
    text = _as_text(cfg._to_lazy_dict(), 'cfg')
    return Config(text, cfg_text=cfg.text, filename=cfg.filename)


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
    if isinstance(value, (type(None), int, float, complex, str, bytes, set,
                          range, slice)):
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


def _leave_dist() -> None:
    """Join the threads of gloo, which end with the last reference to the
    process group. One that still works when the interpreter ends aborts it.
    """
    gc.collect()  # a runner and its wrapped model refer to each other
    if dist.is_initialized():
        dist.destroy_process_group()


def init_cpu_dist(launcher: str, cfg: Optional[Config] = None) -> None:
    """Join the processes over gloo where there is no GPU: MMEngine fails
    without a CUDA device unless a process group is already there. Of the
    tools' launchers only ``'pytorch'`` counts, and raises a
    :class:`RuntimeError` unless ``torchrun`` started the process. A config
    gets a model wrapper that names no CUDA device unless it has one."""
    if launcher != 'pytorch' or torch.cuda.is_available():
        return
    if 'RANK' not in os.environ:
        raise RuntimeError(
            'launcher is pytorch, but RANK is not set: start the tool with '
            'torchrun --nproc_per_node=N TOOL ... --launcher pytorch')
    # loaded later, the defaults of its functions would hold the process group
    importlib.import_module('torch.distributed.nn.functional')
    dist.init_process_group('gloo')
    atexit.register(_leave_dist)
    if cfg is not None and cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False))
