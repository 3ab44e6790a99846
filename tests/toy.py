# Copyright (c) mmbasis authors. All rights reserved.
"""A model, a dataset and a run that take a second."""
import atexit
import copy
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, RUNNERS
from mmengine.runner import FlexibleRunner  # noqa: F401


@MODELS.register_module(force=True)
class ToyNet(BaseModel):
    """Three convolutions and a prediction layer."""

    def __init__(self,
                 data_preprocessor=None,
                 frozen=False,
                 width=12,
                 norm=True):
        super().__init__(data_preprocessor)
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        norm = nn.BatchNorm2d if norm else nn.GroupNorm
        self.bn1 = norm(*([width] if norm is nn.BatchNorm2d else [4, width]))
        self.conv2 = nn.Conv2d(width, 16, 3, padding=1, bias=False)
        self.bn2 = norm(*([16] if norm is nn.BatchNorm2d else [4, 16]))
        self.conv3 = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.fc = nn.Linear(16, 4)
        if frozen:
            self.conv1.requires_grad_(False)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = torch.relu(self.bn1(self.conv1(inputs)))
        x = torch.relu(self.bn2(self.conv2(x)))
        x = self.fc(torch.relu(self.conv3(x)).mean((2, 3)))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(x, data_samples))
        if mode == 'predict':
            return list(zip(x.argmax(1), data_samples))
        return x


@DATASETS.register_module(force=True)
class ToyImages(torch.utils.data.Dataset):
    """Random images with labels that their means decide."""

    def __init__(self, size=32):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(size, 3, 8, 8, generator=generator)
        self.images += torch.arange(size).view(-1, 1, 1, 1) % 4
        self.metainfo = dict(classes=('a', 'b', 'c', 'd'))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index], data_samples=index % 4)


@METRICS.register_module(force=True)
class ToyAccuracy(BaseMetric):

    def process(self, data_batch, data_samples):
        self.results += [float(a == b) for a, b in data_samples]

    def compute_metrics(self, results):
        return dict(accuracy=sum(results) / len(results))


class Noisy(nn.Module):
    """Uses every source of randomness, and statistics that training moves."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        noise = random.random() + np.random.rand() + torch.rand(())
        return self.drop(self.norm(self.conv(x))) + noise


def dense_checkpoint(path, **model):
    """Save a dense model with random weights and statistics; its path."""
    torch.manual_seed(0)
    net = ToyNet(**model)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, .5, 2)
            nn.init.normal_(module.running_mean)
    torch.save(dict(state_dict=net.state_dict(), meta={}), path)
    return str(path)


def toy_cfg(work_dir, load_from, hook=None, epochs=2, **options):
    """Config of a training run under the compression hook."""
    loader = dict(
        batch_size=8,
        num_workers=0,
        dataset=dict(type='ToyImages'),
        sampler=dict(type='DefaultSampler', shuffle=True),
        collate_fn=dict(type='default_collate'))
    hook = hook or dict(planner=dict(type='BudgetPlanner', macs=.5))
    cfg = Config(
        dict(
            default_scope='mmengine',
            model=dict(type='ToyNet'),
            work_dir=str(work_dir),
            train_dataloader=loader,
            val_dataloader=copy.deepcopy(loader),
            val_evaluator=dict(type='ToyAccuracy'),
            val_cfg=dict(),
            train_cfg=dict(by_epoch=True, max_epochs=epochs),
            optim_wrapper=dict(
                optimizer=dict(type='SGD', lr=.05, momentum=.9)),
            param_scheduler=dict(type='MultiStepLR', milestones=[1]),
            custom_hooks=[
                dict(type='mmbasis.EpochSeedHook'),
                dict(type='mmbasis.BasisCompressionHook', **hook)
            ],
            randomness=dict(seed=0),
            load_from=load_from))
    cfg.test_dataloader = cfg.val_dataloader
    cfg.test_evaluator, cfg.test_cfg = cfg.val_evaluator, dict()
    cfg.merge_from_dict(options)
    return cfg


_COUNT = iter(range(10**6))


def run(cfg):
    """Train; the runner."""
    cfg = copy.deepcopy(cfg)
    cfg.experiment_name = f'toy_{next(_COUNT)}'
    runner = RUNNERS.get(cfg.get('runner_type', 'Runner')).from_cfg(cfg)
    runner.train()
    return runner


def device_of(model):
    """Where the parameters of a model are."""
    return next(model.parameters()).device


def processes(cfg, folder, count, backend='gloo'):
    """Train in several processes, which share a GPU if there is one."""
    cfg = copy.deepcopy(cfg)
    cfg.launcher = 'pytorch'
    cfg.env_cfg = dict(dist_cfg=dict(backend=backend))
    path = Path(folder) / f'processes_{next(_COUNT)}.py'
    cfg.dump(path)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[1]
    env = dict(
        os.environ,
        PYTHONPATH=str(root),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        WORLD_SIZE=str(count),
        OMP_NUM_THREADS='1')
    # MMEngine takes the local rank for the number of the GPU
    alone = torch.cuda.is_available()
    started = [
        subprocess.Popen([sys.executable, '-m', 'tests.toy', path],
                         cwd=root,
                         env=dict(
                             env,
                             RANK=str(rank),
                             LOCAL_RANK='0' if alone else str(rank)),
                         stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE) for rank in range(count)
    ]
    errors = [x.communicate(timeout=240)[1].decode() for x in started]
    assert [x.returncode for x in started] == [0] * count, '\n'.join(errors)


def run_beside(folder, *args):
    """Run code in a process of its own that finds the modules of a folder
    first: ``-c`` is given."""
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', *args],
                          capture_output=True,
                          text=True,
                          env=dict(
                              os.environ,
                              PYTHONPATH=os.pathsep.join(
                                  [str(folder), *sys.path[1:]])))


def _threads():
    """How many threads this process has, where Linux tells."""
    tasks = Path('/proc/self/task')
    return len(list(tasks.iterdir())) if tasks.exists() else 1


def _check_threads(before):
    """Fail the process whose threads outlive the interpreter: one that still
    works then aborts a run that has succeeded."""
    if not torch.cuda.is_available() and _threads() > before:
        print(f'{_threads()} threads at the end, {before} at the start',
              file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == '__main__':
    # one of several processes: tests.toy CONFIG
    from mmbasis.utils import init_cpu_dist
    atexit.register(_check_threads, _threads())  # the last to run
    init_cpu_dist('pytorch')
    run(Config.fromfile(sys.argv[1]))
