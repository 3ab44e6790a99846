# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch

from tests.toy import dense_checkpoint


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions that can be compared with a CPU's: by default those of a
    GPU round to ten bits."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)


@pytest.fixture
def dense(tmp_path):
    return dense_checkpoint(tmp_path / 'dense.pth')
