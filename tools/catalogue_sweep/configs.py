# Copyright (c) mmbasis authors. All rights reserved.
"""The configs of the installed libraries, each distinct model once."""
import hashlib
import importlib
import json
import os.path as osp
from dataclasses import dataclass
from glob import glob
from typing import Any, Dict, List

from mmengine.config import Config

LIBRARIES = ('mmdet', 'mmpretrain')


@dataclass
class Entry:
    """One model of the catalogue.

    Args:
        key (str): What the model is: library and hash of its config.
        library (str): ``'mmdet'`` or ``'mmpretrain'``.
        configs (list[str]): All configs that describe it, as paths below the
            library's configs; the first stands for all.
        error (str): Why the file cannot be read; empty where it can.
        closely (bool): Look at it closely, whatever the lot says.
    """
    key: str
    library: str
    configs: List[str]
    error: str = ''
    closely: bool = False

    @property
    def name(self) -> str:
        return f'{self.library}::{self.configs[0]}'

    @property
    def digest(self) -> str:
        """Decides over order and thoroughness: as good as drawn by lot, and
        the same wherever the catalogue is the same."""
        return self.key.rsplit('-', 1)[-1]

    @property
    def thorough(self) -> bool:
        """Whether it is looked at closely, as one in thirty is."""
        return self.closely or int(self.digest[-4:], 16) % 30 == 0


def config_root(library: str) -> str:
    """Folder of the configs that come with a library."""
    package = importlib.import_module(library)
    return osp.join(osp.dirname(package.__file__), '.mim', 'configs')


def read_config(library: str, path: str) -> Config:
    """Read a config by its path below the library's configs; its scope is the
    library, also where only the library's own functions know that."""
    cfg = Config.fromfile(osp.join(config_root(library), path))
    cfg.setdefault('default_scope', library)
    return cfg


def without_pretrained(config: Any) -> Any:
    """Copy a config without what loads weights from somewhere else."""
    if isinstance(config, dict):
        return type(config)((k, without_pretrained(v))
                            for k, v in config.items()
                            if not _loads_weights(k, v))
    if isinstance(config, (list, tuple)):
        return type(config)(
            without_pretrained(v) for v in config if not _loads_weights('', v))
    return config


def _loads_weights(key: str, value: Any) -> bool:
    if isinstance(value, dict):
        # PVT leaves out the type
        return (value.get('type') == 'Pretrained'
                or key == 'init_cfg' and value.keys() == {'checkpoint'})
    return key == 'pretrained' and isinstance(value, (str, bool))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (int, float, str, bool)) else repr(value)


def model_hash(cfg: Config) -> str:
    """What tells models apart: their config without pretrained weights."""
    parts = [cfg.model, cfg.get('data_preprocessor')]
    text = json.dumps(_plain(without_pretrained(parts)), sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()[:12]


def list_entries(libraries=LIBRARIES) -> List[Entry]:
    """All models of the catalogue, in the order of their configs.

    Files without a model (parts that others build on) are left out.
    """
    entries: Dict[str, Entry] = {}
    for library in libraries:
        root = config_root(library)
        for path in sorted(glob(osp.join(root, '**', '*.py'), recursive=True)):
            relative = osp.relpath(path, root)
            if '_base_' in relative.split(osp.sep):
                continue
            try:
                cfg = read_config(library, relative)
            except Exception as error:  # whatever a config file may raise
                key = hashlib.sha1(relative.encode()).hexdigest()[:12]
                entries[f'{library}-{key}'] = Entry(
                    f'{library}-{key}', library, [relative],
                    f'{type(error).__name__}: {error}')
                continue
            if cfg.get('model') is None:
                continue
            key = f'{library}-{model_hash(cfg)}'
            entry = entries.setdefault(key, Entry(key, library, []))
            entry.configs.append(relative)
    return list(entries.values())
