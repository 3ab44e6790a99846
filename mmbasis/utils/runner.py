# Copyright (c) mmbasis authors. All rights reserved.
"""Examples and evaluation from a config, outside a training run."""
import copy
import itertools
import os.path as osp
from typing import Any, Dict

import torch.nn as nn
from mmengine.config import Config
from mmengine.runner import Runner

from ..datasets.calibration import single
from ..quirks import repair

_RUNS = itertools.count()


def example_batch(cfg: Config, *splits: str) -> Any:
    """A batch of one image, or of the first of its augmentations, from the
    first of some splits that has a data loader; or a :class:`KeyError`."""
    for split in splits:
        config = cfg.get(f'{split}_dataloader')
        if config is not None:
            loader = Runner.build_dataloader(config, seed=0)
            image = loader.dataset[next(iter(loader.sampler))]
            return loader.collate_fn([single(image)])
    raise KeyError('the config needs one of ' +
                   ', '.join(f'{split}_dataloader' for split in splits))


def check_evaluation(cfg: Config, split: str) -> None:
    """Check that a config can be evaluated, before any work starts: raises a
    :class:`KeyError` if it lacks the split's data loader or evaluator."""
    for key in (f'{split}_dataloader', f'{split}_evaluator'):
        if cfg.get(key) is None:
            raise KeyError(f'evaluation needs {key}, which the config does '
                           'not have')


def evaluate(cfg: Config, model: nn.Module,
             split: str = 'test') -> Dict[str, float]:
    """The metrics of a model, left in evaluation mode, by the
    ``<split>_dataloader`` and the ``<split>_evaluator`` of a config."""
    cfg = copy.deepcopy(cfg)
    runner = Runner(
        model=repair(model),
        work_dir=osp.join(cfg.work_dir, 'evaluate'),
        test_dataloader=cfg[f'{split}_dataloader'],
        test_cfg=cfg.get('test_cfg') or {},
        test_evaluator=cfg[f'{split}_evaluator'],
        default_hooks=cfg.get('default_hooks'),
        log_level=cfg.get('log_level', 'INFO'),
        visualizer=cfg.get('visualizer'),
        default_scope=cfg.get('default_scope', 'mmengine'),
        # two runs in one process must not share a log
        experiment_name=f'evaluate_{next(_RUNS)}')
    return dict(runner.test())
