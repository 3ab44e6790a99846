# Copyright (c) mmbasis authors. All rights reserved.
"""What all tools do with a config before they build a runner from it."""
import os.path as osp
from typing import Optional

import torch
from mmengine.config import Config

from ..compat import repair_ssd_head


def load_config(path: str,
                cfg_options: Optional[dict] = None,
                work_dir: Optional[str] = None) -> Config:
    """Read a config of any OpenMMLab library and fill in what tools expect.

    - ``mmbasis`` is imported, so its modules are known to the registries
      even where the config has no ``custom_imports``.
    - A ``data_preprocessor`` at the top level (mmpretrain's habit) is copied
      into ``model`` unless the model has its own, as the runner does: who
      builds the model without a runner gets the same one.
    - mmpretrain's data loaders stack their samples, as its own tools set
      them to.

    Args:
        path (str): Config file, or ``library::config`` of an installed
            library such as ``mmpretrain::resnet/resnet18_8xb32_in1k.py``.
        cfg_options (dict, optional): Values that override the file's, keys
            with dots. Defaults to None.
        work_dir (str, optional): Where the run writes. None leaves the
            config's own, else ``work_dirs/<name of the config>``.

    Returns:
        Config: The config, with ``work_dir`` set.

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
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join('work_dirs',
                                osp.splitext(osp.basename(path))[0])
    if cfg.get('data_preprocessor') is not None:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    if cfg.get('default_scope') == 'mmdet':
        repair_ssd_head()
    if cfg.get('default_scope') == 'mmpretrain':
        for name in ('train', 'val', 'test'):
            loader = cfg.get(f'{name}_dataloader')
            if loader is not None:
                loader.setdefault('collate_fn', dict(type='default_collate'))
                loader.setdefault('pin_memory', torch.cuda.is_available())
    return cfg


def _read(path: str) -> Config:
    """Read the file, or the config of an installed library."""
    if '::' in path:
        from mmengine.hub import get_config
        return get_config(path)
    if not osp.isfile(path):
        raise FileNotFoundError(
            f'config {path} does not exist (looked from '
            f'{osp.abspath(osp.curdir)}); give a file, or the name of an '
            f"installed config as 'library::folder/name.py'")
    return Config.fromfile(path)
