# Copyright (c) mmbasis authors. All rights reserved.
"""A place where tools can be run as a user runs them, within seconds."""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS, init_default_scope

from mmbasis.utils import load_config

CONFIG = """
_base_ = {runtime!r}
data_root = '{{{{$MMBASIS_DATA:data}}}}/tiny'
pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmbasis.CifarResNet', depth=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead', num_classes=3, in_channels={channels},
        topk=(1, )))
data_preprocessor = dict(
    type='mmpretrain.ClsDataPreprocessor', mean=[127.] * 3, std=[60.] * 3,
    num_classes=3, to_rgb=True)
train_dataloader = dict(
    batch_size=6, num_workers=0,
    dataset=dict(type='mmbasis.ImageFolder', data_root=data_root + '/train',
                 pipeline=pipeline, hint='Draw some.'),
    sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(
    batch_size=5, num_workers=0,
    dataset=dict(type='mmbasis.ImageFolder', data_root=data_root + '/test',
                 pipeline=pipeline, hint='Draw some.', test_mode=True),
    sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(type='mmpretrain.Accuracy', topk=(1, ))
val_dataloader, val_evaluator = test_dataloader, test_evaluator
test_cfg = val_cfg = dict()
train_cfg = dict(by_epoch=True, max_epochs=1)
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
"""
FORKS = """
import gc, json, os, runpy, sys, traceback
answers = os.fdopen(os.dup(1), 'w')
os.dup2(2, 1)  # libraries print while they are imported
import matplotlib.pyplot, rich.table
import mmpretrain.datasets, mmpretrain.evaluation, mmpretrain.models
import mmpretrain.visualization
import mmbasis
gc.freeze()
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        sys.argv = job['argv']
        os.environ.update(job['env'])
        for number, key in ((1, 'out'), (2, 'err')):
            os.dup2(os.open(job[key], os.O_WRONLY | os.O_CREAT), number)
        code = 1
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
            code = 0
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.WEXITSTATUS(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""


class Workplace:
    """Images, a config and a dense checkpoint, and the tool to run."""

    def __init__(self, folder, root):
        self.folder, self.root = folder, root
        self.data = folder / 'data'
        self.config = folder / 'dense.py'
        self.checkpoint = folder / 'dense.pth'
        rng = np.random.default_rng(0)
        for split in ('train', 'test'):
            for label, name in enumerate(('a', 'b', 'c')):
                target = self.data / 'tiny' / split / name
                target.mkdir(parents=True)
                for i in range(6):
                    image = rng.integers(0, 200, (16, 16, 3), np.uint8)
                    image[..., label] += 50
                    cv2.imwrite(str(target / f'{i}.png'), image)
        runtime = root / 'configs' / '_base_' / 'default_runtime.py'
        self.config.write_text(
            CONFIG.format(runtime=str(runtime), channels=64))
        init_default_scope('mmpretrain')
        torch.manual_seed(0)
        model = MODELS.build(load_config(str(self.config)).model)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.running_mean, std=0.3)
        init_default_scope('mmengine')
        torch.save(
            dict(meta=dict(epoch=3), state_dict=model.state_dict()),
            self.checkpoint)

    def command(self, *args, tool='compress', config=None, checkpoint=None):
        command = [
            self.root / 'tools' / f'{tool}.py', config or self.config,
            checkpoint or self.checkpoint, *args
        ]
        return list(map(str, command))

    def run(self, *args, data=None, **kwargs):
        return self.forks.run(
            self.command(*args, **kwargs), MMBASIS_DATA=str(data or self.data))


class Forks:
    """Runs Python scripts, each in a process of its own, that all start from
    one process that has done the imports: they take seconds."""

    def __init__(self):
        self.server = subprocess.Popen([sys.executable, '-c', FORKS],
                                       stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE,
                                       text=True)

    def run(self, command, **env):
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, 'out'), Path(folder, 'err')
            job = dict(argv=command, env=env, out=str(out), err=str(err))
            self.server.stdin.write(json.dumps(job) + '\n')
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(command, code, out.read_text(),
                                               err.read_text())

    def close(self):
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
