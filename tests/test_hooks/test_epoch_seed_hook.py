# Copyright (c) mmbasis authors. All rights reserved.
import random
from unittest.mock import patch

import numpy as np
import pytest
import torch
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmbasis.hooks.training_hooks import EpochSeedHook
from tests.toy import device_of


class RandomDataset(Dataset):
    """Each sample is the next number of all three generators."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        drawn = [random.random(), np.random.rand(), torch.rand(()).item()]
        return torch.tensor([index, *drawn], dtype=torch.float64)


class Recorder(BaseModel):
    """Keeps the batches it sees, and a dropout mask for each."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 1).double()
        self.seen = []

    def forward(self, inputs, mode='loss'):
        mask = torch.rand(2, dtype=inputs.dtype, device=inputs.device)
        self.seen.append(torch.cat([inputs.flatten(), mask]))
        return dict(loss=self.linear(inputs).mean())


def train(work_dir, epochs, num_workers=0, resume=False, **kwargs):
    """Train, and return the batches seen, one row per iteration."""
    model = Recorder()
    model.data_preprocessor.forward = lambda data, training: [
        data.to(device_of(model))]
    runner = Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=RandomDataset(),
            sampler=dict(type='DefaultSampler', shuffle=True),
            collate_fn=dict(type='default_collate'),
            batch_size=2,
            num_workers=num_workers,
            persistent_workers=kwargs.pop('persistent_workers', False)),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        train_cfg=kwargs.pop('train_cfg',
                             dict(by_epoch=True, max_epochs=epochs)),
        randomness=dict(seed=3),
        resume=resume,
        custom_hooks=[EpochSeedHook(**kwargs)],
        default_scope='mmengine',
        experiment_name=f'{work_dir.name}_{random.random()}')
    runner.train()
    return torch.stack(model.seen).cpu()


@pytest.mark.parametrize('num_workers', [0, 2])
def test_resume_draws_the_same(tmp_path, num_workers):
    whole = train(tmp_path / 'whole', 3, num_workers)
    first = train(tmp_path / 'parts', 1, num_workers)
    rest = train(tmp_path / 'parts', 3, num_workers, resume=True)
    assert torch.equal(whole, torch.cat([first, rest]))


@pytest.mark.parametrize('num_workers', [0, 2])
def test_epochs_differ(tmp_path, num_workers):
    seen = train(tmp_path, 2, num_workers)
    assert len(torch.unique(seen[:, 1])) == len(seen)
    # MMEngine's own seeding repeats the numbers of the workers
    if num_workers:
        plain = train(tmp_path / 'plain', 2, num_workers, enabled=False)
        assert torch.equal(plain[:4, 1], plain[4:, 1])


def test_ranks_differ(tmp_path):
    first = train(tmp_path / '0', 1)
    with patch('mmbasis.hooks.training_hooks.get_rank', return_value=1):
        second = train(tmp_path / '1', 1)
    assert not torch.isclose(first[:, 1:4], second[:, 1:4]).any()


def test_refuses_persistent_workers(tmp_path):
    with pytest.raises(ValueError, match='persistent_workers to False'):
        train(tmp_path, 1, num_workers=1, persistent_workers=True)


def test_keeps_a_worker_init_fn_of_the_user(tmp_path):

    class Loader:
        persistent_workers = False
        worker_init_fn = staticmethod(print)

    class FakeRunner:
        train_dataloader = Loader()
        train_loop = None
        logger = type('Logger', (), {'warning': staticmethod(lambda _: None)})

    EpochSeedHook().before_train(FakeRunner())
    assert FakeRunner.train_dataloader.worker_init_fn is print


def test_warns_about_iterations(tmp_path, caplog):
    train_cfg = dict(by_epoch=False, max_iters=2)
    with patch('mmengine.logging.MMLogger.warning') as warning:
        train(tmp_path, None, train_cfg=train_cfg)
    assert any('IterBasedTrainLoop' in str(call)
               for call in warning.mock_calls)
