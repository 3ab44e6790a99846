# Copyright (c) mmbasis authors. All rights reserved.
import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.toy import dense_checkpoint, run, toy_cfg


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    'planner', [
        dict(type='BudgetPlanner', macs=.5),
        dict(type='BudgetPlanner', macs=.5, forms=['both']),
        dict(type='EnergyPlanner', threshold=.8)
    ],
    ids=['all forms', 'both', 'output'])
def test_two_processes_are_one(tmp_path, repo_root, planner):
    """Two gloo processes end with the ranks and weights of one process that
    has the same total batch."""
    dense = dense_checkpoint(tmp_path / 'dense.pth', norm=False)
    hook = dict(
        planner=planner,
        calibration=dict(num_batches=2),
        orthogonality=dict(weight=.01))
    cfg = toy_cfg(tmp_path / 'one', dense, hook)
    cfg.model.norm = False
    cfg.train_dataloader.batch_size = 16
    one = run(cfg)

    cfg.train_dataloader.batch_size = 8
    cfg.launcher = 'pytorch'
    cfg.env_cfg = dict(dist_cfg=dict(backend='gloo'))
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', device_ids=None)
    cfg.work_dir = str(tmp_path / 'two')
    path = tmp_path / 'two.py'
    cfg.dump(path)
    env = dict(
        os.environ,
        PYTHONPATH=str(repo_root),
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(free_port()),
        WORLD_SIZE='2',
        OMP_NUM_THREADS='1')
    processes = [
        subprocess.Popen([sys.executable, '-m', 'tests.toy', path],
                         cwd=repo_root,
                         env=dict(env, RANK=str(rank), LOCAL_RANK=str(rank)),
                         stdout=subprocess.DEVNULL,
                         stderr=subprocess.PIPE) for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [p.returncode for p in processes] == [0, 0], errors

    two = torch.load(tmp_path / 'two' / 'epoch_2.pth', weights_only=True)
    plan = two['meta']['mmbasis']
    assert plan['layers'] == one.model.plan.to_dict()['layers']
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(
            two['state_dict'][key], value, rtol=1e-3, atol=1e-5, msg=key)
