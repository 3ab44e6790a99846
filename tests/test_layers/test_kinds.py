# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule, ConvWS2d
from mmcv.cnn.bricks.conv2d_adaptive_padding import Conv2dAdaptivePadding
from torch.nn.utils import parametrizations

from mmbasis.layers import (
    BasisLayer,
    ConvKind,
    ConvTransposeKind,
    LinearKind,
    kind_of,
    why_not,
)


class Scaled(nn.Conv2d):

    def forward(self, x):
        return 2 * super().forward(x)


class Quantised(nn.Conv2d):

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.round(), bias)


class Initialised(nn.Conv2d):
    """Computes what its parent does."""

    def reset_parameters(self):
        nn.init.ones_(self.weight)


class ScaledAgain(Scaled):
    """Its parent's parent is a plain convolution, its parent is not."""


class ScaledLinear(nn.Linear):

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    'module, reason', [
        (nn.Conv2d(6, 6, 3, groups=6), 'depthwise'),
        (nn.Conv1d(6, 6, 3, groups=6), 'depthwise'),
        (nn.ConvTranspose2d(6, 6, 3, groups=6), 'depthwise'),
        (nn.Conv2d(6, 1, 3), 'one output channel'),
        (nn.Linear(6, 1), 'one output channel'),
        (nn.utils.weight_norm(nn.Conv2d(4, 6, 3)), 'computed'),
        (nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)), 'computed'),
        (nn.utils.weight_norm(nn.Linear(4, 6)), 'computed'),
        (parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)), 'computed'),
        (parametrizations.orthogonal(nn.Linear(4, 6)), 'computed'),
        (ConvWS2d(4, 6,
                  3), 'ConvWS2d computes its output in a way of its own'),
        (Scaled(4, 6, 3), 'Scaled computes its output in a way of its own'),
        (ScaledAgain(4, 6, 3), 'ScaledAgain computes its output in a way'),
        (Quantised(4, 6,
                   3), 'Quantised computes its output in a way of its own'),
        (ScaledLinear(4, 6), 'ScaledLinear computes its output in a way'),
        (nn.MultiheadAttention(4, 2).out_proj, 'nn.MultiheadAttention reads'),
        (nn.LazyConv2d(6, 3), 'not initialised'),
        (nn.LazyLinear(6), 'not initialised'),
    ],
    ids=lambda x: type(x).__name__)
def test_refused_with_the_reason(module, reason):
    assert why_not(module).startswith(reason) or reason in why_not(module)


def test_parametrized_weight_norm_is_refused():
    weight_norm = getattr(parametrizations, 'weight_norm', None)
    if weight_norm is None:
        pytest.skip('torch < 2.1 has no parametrized weight norm')
    assert 'computed' in why_not(weight_norm(nn.Conv2d(4, 6, 3)))


@pytest.mark.parametrize('module', [
    nn.BatchNorm2d(4),
    nn.Sequential(nn.Conv2d(4, 6, 3)),
    ConvModule(4, 6, 3),
    nn.Embedding(4, 6),
    nn.Bilinear(4, 6, 3),
])
def test_no_layer_to_speak_of(module):
    assert why_not(module) == ''
    assert kind_of(module) is None


@pytest.mark.parametrize('module, kind', [
    (nn.Conv1d(4, 6, 3), ConvKind),
    (nn.Conv3d(4, 6, 3), ConvKind),
    (Initialised(4, 6, 3), ConvKind),
    (Conv2dAdaptivePadding(4, 6, 3), ConvKind),
    (nn.ConvTranspose2d(4, 6, 3), ConvTransposeKind),
    (nn.Linear(4, 6), LinearKind),
    (nn.Conv2d(6, 12, 3, groups=6), ConvKind),
])
def test_kind_of_each_layer(module, kind):
    assert kind_of(module) is kind
    assert why_not(module) is None


def test_subclass_is_copied_with_its_class():
    dense = Initialised(4, 6, 3)
    layer = BasisLayer(dense, 4)
    layer.project(dense)
    x = torch.rand(1, 4, 5, 5)
    torch.testing.assert_close(layer(x), dense(x))
    assert type(layer.to_dense()) is Initialised
