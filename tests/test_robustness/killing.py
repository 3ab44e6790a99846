# Copyright (c) mmbasis authors. All rights reserved.
"""Train by ``tools/train.py``, be killed, resume, and compare with the run
that nobody disturbed.

``python tests/test_robustness/killing.py FOLDER`` kills at every step on the
disk and at random moments, and prints the counts. It forks for each run, as
starting Python takes longer than the run.
"""
import argparse
import builtins
import importlib.util
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import torch
from mmengine.logging import MessageHub
from mmengine.registry import METRICS
from mmengine.runner import EpochBasedTrainLoop

import mmbasis  # noqa: F401
from mmbasis.utils import find_resumable
from tests.toy import ToyAccuracy, dense_checkpoint, toy_cfg

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 3
KILLED = 77
#: what a log says is not needed to go on
LOGS = re.compile(r'\.log$|\.json$|/vis_data')


@METRICS.register_module(force=True)
class Progress(ToyAccuracy):
    """Each epoch is the best."""

    def compute_metrics(self, results):
        return dict(epoch=MessageHub.get_current_instance().get_info('epoch'))


def write_config(folder):
    """A run with all that has state: a schedule, EMA, momentum, distillation
    by the dense weights, the best checkpoint, accumulated gradients."""
    hook = dict(
        planner=dict(type='BudgetPlanner', macs=.5),
        distillation=dict(terms=[dict(module='fc', type='kl')]))
    cfg = toy_cfg(folder / 'work', dense_checkpoint(folder / 'dense.pth'),
                  hook, EPOCHS)
    cfg.optim_wrapper.accumulative_counts = 3  # of 4 iterations per epoch
    cfg.custom_hooks.append(dict(type='EMAHook'))
    cfg.val_evaluator = cfg.test_evaluator = dict(type='Progress')
    cfg.default_hooks = dict(checkpoint=dict(
        type='CheckpointHook', interval=1, max_keep_ckpts=1,
        save_best='epoch', rule='greater'))
    cfg.custom_imports = dict(imports=['tests.toy', 'mmbasis'])
    cfg.dump(folder / 'config.py')


class Killer:
    """Ends the process at one of its steps on the disk: before a file is
    opened for writing, renamed or removed, and amid a write.

    Args:
        folder (Path): Only steps below it count.
        step (int): The one, counted from 1; with 0 none.
        note (Path): Where the count, or the epoch of death, is written.
    """

    def __init__(self, folder, step, note):
        self.folder, self.step, self.note = str(folder), step, note
        self.count = self.epoch = 0
        self.open = builtins.open
        builtins.open = self.opened
        for name in ('replace', 'rename', 'remove', 'unlink', 'rmdir'):
            setattr(os, name, self.watched(getattr(os, name)))
        run_epoch = EpochBasedTrainLoop.run_epoch

        def counted(loop):
            self.epoch = loop._epoch + 1
            run_epoch(loop)

        EpochBasedTrainLoop.run_epoch = counted

    def counts(self, path):
        return (isinstance(path, (str, os.PathLike))
                and os.path.abspath(path).startswith(self.folder)
                and not LOGS.search(str(path)))

    def arrive(self):
        """One more step; whether it is the last."""
        self.count += 1
        return self.count == self.step

    def die(self):
        with self.open(self.note, 'w') as file:
            file.write(str(self.epoch))
        os._exit(KILLED)

    def watched(self, do):

        def step(path, *args, **kwargs):
            if self.counts(path) and self.arrive():
                self.die()
            return do(path, *args, **kwargs)

        return step

    def opened(self, path, mode='r', *args, **kwargs):
        if not self.counts(path) or not set(mode) & set('wax+'):
            return self.open(path, mode, *args, **kwargs)
        if self.arrive():
            self.die()
        return Torn(self.open(path, mode, *args, **kwargs), self)


class Torn:
    """A file of which the last write is cut in the middle."""

    def __init__(self, file, killer):
        self.file, self.killer = file, killer

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, content):
        if self.killer.arrive():
            self.file.write(content[:len(content) // 2])
            self.file.flush()
            self.killer.die()
        return self.file.write(content)


def start(folder, work_dir, step=0):
    """Start or resume the run in a process of its own; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(folder / 'output.txt',
                      os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        killer = Killer(work_dir, step, folder / 'note.txt')
        sys.argv = ['train.py', str(folder / 'config.py'), '--work-dir',
                    str(work_dir), '--resume']
        spec = importlib.util.spec_from_file_location(
            'train_tool', ROOT / 'tools' / 'train.py')
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        tool.main()
        with killer.open(killer.note, 'w') as file:
            file.write(str(killer.count))
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(pid):
    """How a process ended: its exit status, or that of a shell for a
    signal."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def state_of(work_dir):
    """What a run leaves: weights, EMA, optimizer, schedulers, plan."""
    path = work_dir / f'epoch_{EPOCHS}.pth'
    found = torch.load(path, map_location='cpu', weights_only=True)
    return dict(
        {k: found[k] for k in ('state_dict', 'ema_state_dict', 'optimizer',
                               'param_schedulers')},
        plan=found['meta']['mmbasis'])


def difference(a, b, path=''):
    """Where two states are not the same to the bit; None if nowhere."""
    if isinstance(a, torch.Tensor):
        return None if torch.equal(a, b) and a.dtype == b.dtype else path
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return f'{path}: other keys'
        a, b, keys = list(a.values()), list(b.values()), list(a)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return f'{path}: other length'
        keys = range(len(a))
    else:
        return None if a == b else f'{path}: {a} and {b}'
    found = (difference(x, y, f'{path}/{k}') for k, x, y in zip(keys, a, b))
    return next((x for x in found if x is not None), None)


def resume(folder, work_dir, expected):
    """Resume a run that was killed; what went wrong, or None."""
    end = ended(start(folder, work_dir))
    if end:
        text = (folder / 'output.txt').read_text()
        return f'exit status {end}: {text[-1500:]}'
    left = [x.name for x in work_dir.rglob('*') if '.tmp' in x.name]
    if left:
        return f'temporary files are left: {left}'
    return difference(expected, state_of(work_dir))


def killed_at(folder, step, expected):
    """Kill a run at one step on the disk; what went wrong, or None."""
    work_dir = folder / f'step_{step}'
    end = ended(start(folder, work_dir, step))
    if end != KILLED:
        return f'exit status {end} instead of being killed'
    epoch = int((folder / 'note.txt').read_text())
    found = find_resumable(str(work_dir))
    done = 0 if found is None else torch.load(
        found, weights_only=True)['meta']['epoch']
    if done < epoch - 1:
        return f'killed in epoch {epoch}, but only {done} are left'
    return resume(folder, work_dir, expected)


def killed_after(folder, seconds, number, expected):
    """Kill a run after a time; what went wrong, or None."""
    work_dir = folder / f'random_{number}'
    pid = start(folder, work_dir)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    return resume(folder, work_dir, expected)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', type=Path)
    parser.add_argument(
        '--steps', type=int, help='kill at so many steps (default: at all)')
    parser.add_argument('--random', type=int, default=40)
    args = parser.parse_args()
    folder = args.folder.absolute()
    write_config(folder)
    began = time.monotonic()
    end = ended(start(folder, folder / 'whole'))
    seconds = time.monotonic() - began
    assert end == 0, (folder / 'output.txt').read_text()
    expected = state_of(folder / 'whole')
    count = int((folder / 'note.txt').read_text())
    # a run that is not killed, to know that two are the same at all
    end = ended(start(folder, folder / 'again'))
    assert end == 0
    assert difference(expected, state_of(folder / 'again')) is None

    steps = range(1, count + 1)
    if args.steps is not None:
        steps = random.Random(0).sample(steps, min(args.steps, count))
    moments = random.Random(1)
    problems = {f'step {x}': killed_at(folder, x, expected) for x in steps}
    problems.update({
        f'moment {x}': killed_after(folder, moments.uniform(0, seconds), x,
                                    expected) for x in range(args.random)})
    print(json.dumps(dict(
        steps=count,
        killed_at_steps=len(steps),
        killed_at_moments=args.random,
        problems={k: x for k, x in problems.items() if x is not None})))


if __name__ == '__main__':
    main()
