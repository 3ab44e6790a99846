# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch

from tests.toy import dense_checkpoint, processes, run, toy_cfg


@pytest.mark.parametrize(
    'planner', [
        dict(type='BudgetPlanner', macs=.5),
        dict(type='BudgetPlanner', macs=.5, forms=['both']),
        dict(type='EnergyPlanner', threshold=.8)
    ],
    ids=['all forms', 'both', 'output'])
def test_two_processes_are_one(tmp_path, planner):
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
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', device_ids=None)
    cfg.work_dir = str(tmp_path / 'two')
    processes(cfg, tmp_path, 2)
    two = torch.load(tmp_path / 'two' / 'epoch_2.pth', weights_only=True)
    plan = two['meta']['mmbasis']
    assert plan['layers'] == one.model.plan.to_dict()['layers']
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(
            two['state_dict'][key], value.cpu(), rtol=1e-3, atol=1e-5,
            msg=key)
