# Copyright (c) mmbasis authors. All rights reserved.
"""Resuming amid an accumulation of gradients is exact, or refused."""
import pytest
import torch

from mmbasis.utils.saving import ACCUMULATED_KEY
from tests.toy import dense_checkpoint, run, toy_cfg


def config(folder, work_dir, optimizer, hooks=True):
    """Seven iterations per epoch, and steps of three."""
    cfg = toy_cfg(folder / work_dir, dense_checkpoint(folder / 'dense.pth'),
                  epochs=3)
    cfg.train_dataloader.dataset.size = 56
    cfg.optim_wrapper = dict(
        type='OptimWrapper',
        optimizer=optimizer,
        accumulative_counts=3,
        clip_grad=dict(max_norm=1.))
    if not hooks:
        cfg.custom_hooks = []
    return cfg


def load(folder, epoch=3):
    return torch.load(folder / f'epoch_{epoch}.pth', weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('accumulated')
    run(config(folder, 'whole', dict(type='SGD', lr=.05, momentum=.9)))
    return folder


@pytest.mark.parametrize('epoch', [1, 2])
@pytest.mark.parametrize('hooks', [True, False], ids=['basis', 'dense'])
def test_resumed_is_uninterrupted(tmp_path, epoch, hooks):
    optimizer = dict(type='AdamW', lr=.01)
    cfg = config(tmp_path, 'whole', optimizer, hooks)
    run(cfg)
    start = tmp_path / 'whole' / f'epoch_{epoch}.pth'
    assert torch.load(start, weights_only=True)[ACCUMULATED_KEY]['gradients']
    cfg.merge_from_dict(dict(
        load_from=str(start), resume=True,
        work_dir=str(tmp_path / 'resumed')))
    run(cfg)
    whole, again = load(tmp_path / 'whole'), load(tmp_path / 'resumed')
    for key in ('state_dict', 'optimizer', 'param_schedulers'):
        assert same(whole[key], again[key]), key
    # 21 iterations are seven steps: nothing is left
    assert whole[ACCUMULATED_KEY] == dict(counts=[21], gradients={})


def test_a_run_that_ended_is_prolonged(trained):
    """Its last step took what there was."""
    cfg = config(trained, 'short', dict(type='SGD', lr=.05, momentum=.9))
    cfg.train_cfg.max_epochs = 2
    run(cfg)
    assert load(trained / 'short', 2)[ACCUMULATED_KEY] == dict(
        counts=[14], gradients={})
    cfg.merge_from_dict(dict(
        train_cfg=dict(max_epochs=3), resume=True,
        load_from=str(trained / 'short' / 'epoch_2.pth')))
    assert run(cfg).iter == 21


def test_refused(trained, tmp_path):
    content = load(trained / 'whole', 1)
    del content[ACCUMULATED_KEY]
    torch.save(content, tmp_path / 'epoch_1.pth')
    cfg = config(trained, 'refused', dict(type='SGD', lr=.05, momentum=.9))
    cfg.merge_from_dict(dict(
        load_from=str(tmp_path / 'epoch_1.pth'), resume=True))
    with pytest.raises(
            RuntimeError,
            match=r'of iteration 7, was saved amid an accumulation of '
            r'gradients \(accumulative_counts=3\), and it does not hold the '
            r'gradients: it cannot be resumed exactly'):
        run(cfg)


def test_a_start_does_not_take_them(trained, tmp_path):
    """Who starts from a checkpoint without resuming begins a new run."""
    cfg = config(trained, 'started', dict(type='SGD', lr=.05, momentum=.9))
    cfg.load_from = str(trained / 'whole' / 'epoch_1.pth')
    started = run(cfg).model.state_dict()
    content = load(trained / 'whole', 1)
    del content[ACCUMULATED_KEY]
    cfg.load_from = str(tmp_path / 'without.pth')
    torch.save(content, cfg.load_from)
    assert same(started, run(cfg).model.state_dict())
