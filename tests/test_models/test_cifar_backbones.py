# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
import torch.nn.functional as F
from mmengine.analysis import FlopAnalyzer

from mmbasis.models.backbones import (
    CifarBasicBlock,
    CifarDenseNet,
    CifarResNet,
    CifarVGG,
)
from mmbasis.registry import MODELS


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def conv_macs(model):
    counts = FlopAnalyzer(model.eval(), torch.rand(1, 3, 32, 32))
    return counts.by_operator()['conv']


# parameters without the classifier; MACs of the convolutions at 32x32.
# He et al. 2015, table 6: 0.27 M, 0.85 M, 1.7 M; DenseNet paper, table 2:
# 1.0 M; the MACs are sums of P * D * H * W over the layers.
@pytest.mark.parametrize('model, parameters, macs, shape', [
    (dict(type='mmbasis.CifarResNet', depth=20), 269_072, 40_550_400,
     (64, 8, 8)),
    (dict(type='mmbasis.CifarResNet', depth=56), 852_368, 125_485_056,
     (64, 8, 8)),
    (dict(type='mmbasis.CifarResNet', depth=110), 1_727_312, 252_887_040,
     (64, 8, 8)),
    (dict(type='mmbasis.CifarVGG', depth=16), 14_718_912, 313_196_544,
     (512, 1, 1)),
    (dict(type='mmbasis.CifarDenseNet', depth=40), 1_015_232, 264_808_448,
     (448, 8, 8)),
])
def test_published_sizes(model, parameters, macs, shape):
    model = MODELS.build(model)
    out = model(torch.rand(2, 3, 32, 32))
    assert [tuple(x.shape) for x in out] == [(2, *shape)]
    assert num_parameters(model) == parameters
    assert conv_macs(model) == macs


@pytest.mark.parametrize('build, depth', [
    (CifarResNet, 18),
    (CifarResNet, 2),
    (CifarVGG, 12),
    (CifarDenseNet, 41),
    (CifarDenseNet, 4),
])
def test_impossible_depth(build, depth):
    with pytest.raises(ValueError, match=f'but got {depth}'):
        build(depth)


def test_densenet_says_its_width():
    model = CifarDenseNet(depth=13, growth_rate=6)
    assert model.out_channels == 16 + 9 * 6
    assert model(torch.rand(1, 3, 32, 32))[0].shape[1] == model.out_channels


def test_densenet_drops_only_in_training():
    model = CifarDenseNet(depth=7, drop_rate=0.5).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


def test_shortcut_has_no_parameters():
    block = CifarBasicBlock(16, 32, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.randn(2, 16, 8, 8)
    out = block(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], F.relu(x[:, :, ::2, ::2]))
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_initialisation_of_the_source():
    torch.manual_seed(0)
    model = CifarResNet(20)
    model.init_weights()
    conv = model.layer3[0].conv2
    assert conv.weight.std().item() == pytest.approx((2 / (64 * 9))**.5, 0.03)
    assert (model.bn1.weight == 1).all() and (model.bn1.bias == 0).all()


@pytest.mark.parametrize('build, depth', [
    (CifarResNet, 8),
    (CifarVGG, 11),
    (CifarDenseNet, 7),
])
def test_gradients_reach_every_parameter(build, depth):
    model = build(depth)
    model.init_weights()
    model(torch.rand(2, 3, 32, 32))[0].square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
