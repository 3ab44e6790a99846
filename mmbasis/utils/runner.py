# Copyright (c) mmbasis authors. All rights reserved.
"""Data loaders and evaluation from a config, outside a training run."""
import copy
import itertools
import os.path as osp
from typing import Any, Dict, Iterable, Optional

import torch.nn as nn
from mmengine.config import Config
from mmengine.runner import Runner

_RUNS = itertools.count()


def calibration_dataloader(cfg: Config, seed: Optional[int]) -> Iterable:
    """A data loader for calibration: training images in an order of its own,
    with the transforms of testing.

    What the network will see decides what it must keep: statistics of
    randomly cropped or mixed images cost accuracy.

    Args:
        cfg (Config): With ``train_dataloader``, and the transforms in
            ``test_dataloader`` or ``val_dataloader``; without those the
            transforms of training stay.
        seed (int, optional): Of the order.

    Returns:
        DataLoader: In a distributed run, of this process' share.

    Raises:
        KeyError: If the config has no ``train_dataloader``.
    """
    if cfg.get('train_dataloader') is None:
        raise KeyError('calibration needs the training images, but the config '
                       'has no train_dataloader')
    loader = copy.deepcopy(cfg.train_dataloader)
    for key in ('test_dataloader', 'val_dataloader'):
        pipeline = _pipeline(cfg.get(key))
        if pipeline is not None:
            loader.dataset = _with_pipeline(loader.dataset, pipeline)
            break
    loader.sampler = dict(type='DefaultSampler', shuffle=True)
    loader.persistent_workers = False
    return Runner.build_dataloader(loader, seed=seed)


def _pipeline(loader: Any) -> Optional[list]:
    """The transforms of a loader's (innermost) dataset."""
    config = loader.get('dataset') if isinstance(loader, dict) else None
    while isinstance(config, dict):
        if 'pipeline' in config and 'dataset' not in config:
            return copy.deepcopy(config['pipeline'])
        config = config.get('dataset')
    return None


def _with_pipeline(config: dict, pipeline: list) -> dict:
    """A dataset with other transforms.

    A dataset that mixes images has
    transforms over another dataset: it is left away.
    """
    if 'datasets' in config:
        config['datasets'] = [
            _with_pipeline(x, pipeline) for x in config['datasets']
        ]
    elif 'dataset' in config:
        inner = _with_pipeline(config['dataset'], pipeline)
        if 'pipeline' in config:
            return inner
        config['dataset'] = inner
    else:
        config['pipeline'] = _annotated(pipeline, config.get('pipeline', []))
    return config


def _annotated(pipeline: list, training: list) -> list:
    """Transforms of testing that keep the annotations of training.

    MMDetection's test pipelines load boxes last, in the coordinates of the
    file, where the evaluator wants them. A loss needs them in those of the
    transformed image: loaded before the image is resized.
    """
    loads = [
        step for step in (*training, *pipeline)
        if str(step['type']).endswith('LoadAnnotations')
    ]
    rest = [
        step for step in pipeline
        if not str(step['type']).endswith('LoadAnnotations')
    ]
    return copy.deepcopy(rest[:1] + loads[:1] + rest[1:])


def evaluate(cfg: Config,
             model: nn.Module,
             split: str = 'test') -> Dict[str, float]:
    """Run the test loop of a config on a model.

    Args:
        cfg (Config): With ``<split>_dataloader`` and ``<split>_evaluator``.
        model (nn.Module): The model, left in evaluation mode.
        split (str): ``'test'`` or ``'val'``. Defaults to ``'test'``.

    Returns:
        dict: The evaluator's metrics.
    """
    runner = Runner(
        model=model,
        work_dir=osp.join(cfg.work_dir, 'evaluate'),
        test_dataloader=copy.deepcopy(cfg[f'{split}_dataloader']),
        test_cfg=copy.deepcopy(cfg.get('test_cfg') or {}),
        test_evaluator=copy.deepcopy(cfg[f'{split}_evaluator']),
        default_hooks=copy.deepcopy(cfg.get('default_hooks')),
        env_cfg=dict(dist_cfg=dict(backend='nccl')),
        log_level=cfg.get('log_level', 'INFO'),
        visualizer=copy.deepcopy(cfg.get('visualizer')),
        default_scope=cfg.get('default_scope', 'mmengine'),
        # two runs in one process must not share a log
        experiment_name=f'evaluate_{next(_RUNS)}')
    return dict(runner.test())
