# Copyright (c) mmbasis authors. All rights reserved.
"""Resuming amid an accumulation of gradients is exact, or refused."""
import copy

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
    assert ACCUMULATED_KEY not in whole


@pytest.mark.parametrize('change, message', [
    (lambda x: x.pop(ACCUMULATED_KEY), 'it holds no gradients'),
    (lambda x: x[ACCUMULATED_KEY].update(processes=2),
     'each process had gradients of its own'),
])
def test_refused(trained, tmp_path, change, message):
    content = copy.deepcopy(load(trained / 'whole', 1))
    change(content)
    torch.save(content, tmp_path / 'epoch_1.pth')
    cfg = config(trained, 'refused', dict(type='SGD', lr=.05, momentum=.9))
    cfg.merge_from_dict(dict(
        load_from=str(tmp_path / 'epoch_1.pth'), resume=True))
    with pytest.raises(RuntimeError, match='of iteration 7, was saved amid an '
                       'accumulation over accumulative_counts=3 iterations, '
                       f'and {message}'):
        run(cfg)


def test_a_start_does_not_take_them(trained, tmp_path):
    """Who starts from a checkpoint without resuming begins anew."""
    cfg = config(trained, 'started', dict(type='SGD', lr=.05, momentum=.9))
    cfg.load_from = str(trained / 'whole' / 'epoch_1.pth')
    started = run(cfg).model.state_dict()
    content = load(trained / 'whole', 1)
    del content[ACCUMULATED_KEY]
    cfg.load_from = str(tmp_path / 'without.pth')
    torch.save(content, cfg.load_from)
    assert same(started, run(cfg).model.state_dict())
