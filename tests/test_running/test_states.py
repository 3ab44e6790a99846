# Copyright (c) mmbasis authors. All rights reserved.

import torch
import torch.nn as nn

from mmbasis.running import evaluation, train_deterministically
from tests.toy import Noisy


def test_evaluation_runs_without_dropout_and_gradients():
    model = Noisy().train()
    with evaluation(model):
        assert not model.drop.training
        assert not model(torch.rand(1, 3, 5, 5)).requires_grad
    assert model.drop.training and torch.is_grad_enabled()


class Caching(nn.Module):
    """Keeps what it needs in evaluation mode from when that was set, as the
    attention of LeViT does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.drop = nn.Dropout(.5)
        self.attention = nn.MultiheadAttention(8, 2, dropout=.5)
        self.norm = nn.BatchNorm2d(8)

    def train(self, mode=True):
        super().train(mode)
        self.cache = None if mode else self.conv.bias.detach() + 1
        return self

    def forward(self, x):
        x = self.drop(self.norm(self.conv(x))).flatten(2).permute(2, 0, 1)
        x = self.attention(x, x, x)[0]
        return x + (0 if self.training else self.cache)


def test_training_without_chance():
    """Nothing changes by chance or with the batch, all else is as in training,
    and afterwards in evaluation, as before."""
    torch.manual_seed(0)
    model, x = Caching().eval(), torch.randn(4, 3, 6, 6)
    expected = model(x)
    mean = model.norm.running_mean.clone()
    with evaluation(model):
        train_deterministically(model)
        assert model.training and model.conv.training
        # without the fused attention of evaluation mode
        torch.testing.assert_close(model(x), expected - model.conv.bias - 1)
    assert torch.equal(model.norm.running_mean, mean)
    assert torch.equal(model(x), expected)
