# Copyright (c) mmbasis authors. All rights reserved.
import random

import numpy as np
import pytest
import torch
import torch.nn as nn
from mmengine.analysis import FlopAnalyzer

from mmbasis.planning import (calibrate, find_layers, input_samples,
                              output_samples, sum_of_products)
from mmbasis.planning.calibration import MAX_POSITIONS
from mmbasis.running import evaluation, train_deterministically


def found(model, batches, **kwargs):
    layers = find_layers(model)
    calibrate(model, layers, batches, **kwargs)
    return {layer.name: layer for layer in layers}


def covariance(samples, groups=1):
    """Of samples of shape (positions, channels), for each group."""
    samples = samples.double().view(len(samples), groups, -1)
    samples = samples - samples.mean(0)
    return torch.einsum('ngi,ngj->gij', samples, samples) / len(samples)


def moment_of(layer):
    vectors, values = layer.spectrum.vectors, layer.spectrum.values
    return vectors * values.unsqueeze(-2) @ vectors.mT


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    scale = expected.abs().max()
    assert (actual - expected).abs().max() <= tolerance * scale


def channels_last(y, axis):
    return y.detach().movedim(axis, -1).flatten(0, -2)


LAYERS = {
    'conv': (lambda: nn.Conv2d(3, 8, 3, padding=1), (4, 3, 12, 12), 1),
    'no_bias': (lambda: nn.Conv2d(3, 8, 3, bias=False), (4, 3, 9, 9), 1),
    'groups': (lambda: nn.Conv2d(6, 8, 3, groups=2), (4, 6, 9, 9), 1),
    'strided': (lambda: nn.Conv2d(5, 8, 3, stride=2), (4, 5, 12, 9), 1),
    'reduction': (lambda: nn.Conv2d(8, 3, 1), (4, 8, 9, 9), 1),
    'expansion': (lambda: nn.Conv2d(3, 8, 1), (4, 3, 9, 9), 1),
    'expansion_strided':
    (lambda: nn.Conv2d(3, 8, 1, stride=(2, 3)), (4, 3, 9, 8), 1),
    'expansion_groups':
    (lambda: nn.Conv2d(6, 16, 1, groups=2, bias=False), (4, 6, 9, 9), 1),
    'expansion_same':
    (lambda: nn.Conv2d(3, 8, 1, padding='same'), (4, 3, 9, 9), 1),
    # the border is not a pointwise map of the input
    'expansion_padded':
    (lambda: nn.Conv2d(3, 8, 1, padding=1), (4, 3, 9, 9), 1),
    'conv1d': (lambda: nn.Conv1d(3, 8, 3), (4, 3, 30), 1),
    'expansion1d': (lambda: nn.Conv1d(3, 8, 1, stride=2), (4, 3, 31), 1),
    'conv3d': (lambda: nn.Conv3d(3, 8, 2), (4, 3, 5, 4, 6), 1),
    'transpose': (lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2),
                  (4, 6, 7, 7), 1),
    'transpose_pointwise': (lambda: nn.ConvTranspose2d(3, 8, 1, stride=2),
                            (4, 3, 7, 7), 1),
    'linear': (lambda: nn.Linear(9, 6), (40, 9), -1),
    'linear_expansion': (lambda: nn.Linear(6, 9), (40, 6), -1),
    'linear_3d': (lambda: nn.Linear(6, 9, bias=False), (4, 10, 6), -1),
    'linear_4d': (lambda: nn.Linear(9, 6), (4, 5, 3, 9), -1),
}


@pytest.mark.parametrize('name', LAYERS)
def test_covariance_and_mean_of_every_output(name):
    build, shape, axis = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build(), torch.randn(shape) + 0.5
    model = nn.Sequential(layer)
    info = found(model, [x[:1], x[1:]])['0']
    y = channels_last(layer(x), axis)
    groups = info.matrix_shape[0]
    assert_close(moment_of(info), covariance(y, groups))
    bias = 0 if layer.bias is None else layer.bias.detach()
    assert_close(info.mean, (y.mean(0) - bias).view(groups, -1).double())


@pytest.mark.parametrize('name', [
    'expansion', 'expansion_strided', 'expansion_groups', 'linear_expansion',
    'linear_3d', 'expansion1d'
])
def test_input_side_is_the_smaller_one(name):
    """Only as many directions as inputs, and the same ones."""
    build, shape, axis = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build(), torch.randn(shape)
    info = found(nn.Sequential(layer), [x])['0']
    groups, rows, in_size = info.matrix_shape
    assert in_size < rows
    assert info.spectrum.vectors.shape == (groups, rows, in_size)
    values = torch.linalg.eigvalsh(
        covariance(channels_last(layer(x), axis), groups)).flip(-1)
    assert_close(info.spectrum.values, values[:, :in_size])


@pytest.mark.parametrize(
    'layer', [
        nn.Conv2d(3, 6, 3, padding=1),
        nn.Conv2d(3, 6, 1),
        nn.Conv2d(3, 6, 1, stride=2),
        nn.ConvTranspose2d(3, 6, 2, stride=2)
    ],
    ids=['conv', 'expansion', 'strided', 'transpose'])
def test_large_outputs_are_sampled(layer):
    torch.manual_seed(0)
    side = 90
    assert side**2 / 4 > MAX_POSITIONS
    x = torch.randn(6, 3, side, side)
    info = found(nn.Sequential(layer), [x])['0']
    y = channels_last(layer(x), 1)
    # an estimate: 6144 positions of far more
    assert_close(moment_of(info), covariance(y), 0.15)
    assert not torch.allclose(moment_of(info), covariance(y), rtol=1e-6)
    # costs are those of all positions
    out = layer(x).shape
    assert info.out_positions == out[2] * out[3]


@pytest.mark.parametrize('side', [8, 80])
def test_batches_may_be_split_anyhow(side):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 1), nn.ConvTranspose2d(9, 4, 2))
    x = torch.randn(8, 3, side, side)
    whole = found(model, [x])
    for sizes in ((4, 4), (1, 5, 2)):
        split = found(model, x.split(sizes))
        for name, layer in whole.items():
            other = split[name]
            assert other.weight_positions == layer.weight_positions
            assert other.out_positions == layer.out_positions
            assert_close(moment_of(other), moment_of(layer), 1e-5)
            assert_close(other.mean, layer.mean, 1e-4)


@pytest.mark.parametrize(
    'batch, images', [
        (torch.rand(4, 3, 8, 8), 4),
        ((torch.rand(4, 3, 8, 8), torch.zeros(4)), 4),
        ([torch.rand(4, 3, 8, 8), torch.zeros(4)], 4),
        (dict(x=torch.rand(4, 3, 8, 8)), 4),
    ],
    ids=['tensor', 'tuple', 'list', 'dict'])
def test_batches_of_a_plain_module(batch, images):

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x):
            return self.conv(x)

    info = found(Net(), [batch])['conv']
    assert info.out_positions == 36


@pytest.mark.parametrize('shape, positions', [((7, 6), 1), ((7, 5, 6), 5)])
def test_batches_of_vectors_with_labels(shape, positions):
    model = nn.Sequential(nn.Linear(6, 4))
    info = found(model, [(torch.rand(shape), torch.zeros(7))])['0']
    assert info.out_positions == positions


@pytest.mark.parametrize(
    'layer', [
        nn.Conv2d(3, 40, 3),
        nn.Conv2d(3, 40, 1),
        nn.Conv2d(6, 80, 2, groups=2),
        nn.ConvTranspose2d(3, 20, 2, stride=2),
        nn.Conv2d(8, 40, 3),
    ],
    ids=str)
def test_full_rank_holds_for_images_of_any_kind(layer):
    """Calibrated on grey and flat images alone."""
    torch.manual_seed(0)
    channels = layer.in_channels
    grey = torch.rand(4, 1, 1, 1).expand(4, channels, 8, 8)
    info = found(nn.Sequential(layer), [grey])['0']
    basis = info.kind(layer, info.full_rank, bias=True)
    basis.project(layer, info.spectrum.vectors, info.mean)
    x = torch.randn(2, channels, 8, 8)
    assert_close(basis(x), layer(x))


# ------------------------------------------------------------------- costs
class Mixed(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.groups = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 3, stride=2, groups=2)
        self.dilated = nn.Conv2d(6, 6, (1, 3), dilation=2)
        self.tokens = nn.Linear(6, 5)
        self.fc = nn.Linear(5, 7)

    def forward(self, x):
        x = self.depthwise(self.groups(self.stem(x)))
        x = self.dilated(self.up(x)).flatten(2).transpose(1, 2)
        return self.fc(self.tokens(x).mean(1))


def test_macs_are_those_of_mmengine():
    model = Mixed().eval()
    layers = found(model, [torch.rand(5, 3, 19, 17)])
    counted = FlopAnalyzer(model, torch.rand(1, 3, 19, 17)).by_module()
    assert len(layers) == 7
    for name, layer in layers.items():
        assert layer.macs() == counted[name], name


@pytest.mark.parametrize('name',
                         ['stem', 'groups', 'up', 'dilated', 'tokens', 'fc'])
def test_macs_after_are_those_of_mmengine(name):
    model = Mixed().eval()
    layer = found(model, [torch.rand(5, 3, 19, 17)])[name]
    setattr(model, name, layer.kind(layer.module, 2))
    counted = FlopAnalyzer(model, torch.rand(1, 3, 19, 17)).by_module()
    assert layer.macs(2) == counted[name]
    assert layer.params(2) == sum(p.numel()
                                  for p in getattr(model, name).parameters())


class Shared(nn.Module):
    """One convolution at two resolutions."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 5, 3)
        self.also = nn.Sequential(self.head)
        self.unused = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.head(x), self.also(x[..., ::2, ::2])


def test_uses_of_a_shared_layer_add_up():
    model, x = Shared(), torch.randn(4, 3, 12, 12)
    info = found(model, [x])['head']
    assert info.out_positions == 100 + 16
    y = torch.cat([channels_last(y, 1) for y in model(x)])
    assert_close(moment_of(info), covariance(y))


@pytest.mark.parametrize('moments', [False, True])
def test_unused_layers_are_reported(moments):
    layers = found(Shared(), [torch.rand(4, 3, 12, 12)], moments=moments)
    assert layers['unused'].reason == 'not used in the forward pass'
    assert layers['head'].compressible
    assert (layers['head'].spectrum is not None) == moments


def test_layers_called_by_keyword():

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x):
            return self.fc(input=x)

    model, x = Net(), torch.randn(9, 4)
    assert_close(
        moment_of(found(model, [x])['fc']), covariance(model.fc(x).detach()))


# ------------------------------------------------------------ side effects
class Noisy(nn.Module):
    """Uses every source of randomness, and statistics that training moves."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        noise = random.random() + np.random.rand() + torch.rand(())
        return self.drop(self.norm(self.conv(x))) + noise


def draws():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_random_states_and_modes_are_restored():
    model = Noisy().train()
    model.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    x = torch.rand(2, 3, 8, 8)
    seed()
    expected = draws()
    seed()
    layers = found(model, [x])
    assert draws() == expected
    assert model.training and model.conv.training and model.drop.training
    assert not model.norm.training
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not model.conv._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert not layers['conv'].spectrum.vectors.requires_grad


def test_everything_is_restored_after_an_error():
    model = Noisy().train()
    batches = [torch.rand(2, 3, 8, 8), torch.rand(2, 4, 8, 8)]
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    with pytest.raises(RuntimeError, match='expected input'):
        found(model, batches)
    assert torch.equal(torch.rand(()), expected)
    assert model.training and not model.conv._forward_hooks


def test_evaluation_runs_without_dropout_and_gradients():
    model = Noisy().train()
    with evaluation(model):
        assert not model.drop.training
        assert not model(torch.rand(1, 3, 5, 5)).requires_grad
    assert model.drop.training and torch.is_grad_enabled()


# -------------------------------------------------------------------- errors
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


def test_no_images():
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    with pytest.raises(RuntimeError, match='dataloader is empty'):
        found(model, [])


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('layer', [
    nn.Conv2d(6, 8, 3),
    nn.Conv2d(6, 8, 1),
])
def test_broken_outputs_name_the_layer(layer, value):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), layer)
    model[1].running_mean[2] = value
    with pytest.raises(ValueError, match='^2 puts out NaN or infinite'):
        found(model, [torch.rand(2, 3, 8, 8)])


def test_broken_images_name_the_first_layer():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3))
    x = torch.rand(2, 3, 8, 8)
    x[1, 0, 3, 3] = float('nan')
    with pytest.raises(ValueError, match='^0 puts out NaN or infinite'):
        found(model, [x])


def test_large_means_do_not_hide_small_deviations():
    """In float32 alone the covariance would be off by more than itself."""
    torch.manual_seed(0)
    samples = 1000 + .01 * torch.randn(1, 4, 500)
    moments = sum_of_products(samples, samples) / 500
    mean = samples.double().mean(-1, True)
    expected = (samples - mean) @ (samples - mean).mT / 500
    assert expected.diagonal(dim1=1, dim2=2).min() > 5e-5
    torch.testing.assert_close(
        moments - mean @ mean.mT, expected, rtol=.01, atol=1e-6)


@pytest.mark.parametrize('layer, shape', [
    (lambda: nn.Conv2d(
        6,
        8,
        3,
        padding=1,
        groups=2,
        stride=2,
        dilation=2,
        padding_mode='reflect'), (3, 6, 40, 37)),
    (lambda: nn.Conv2d(6, 8, (3, 5), padding='valid'), (2, 6, 40, 37)),
    (lambda: nn.Conv2d(6, 8, 4, padding='same', padding_mode='circular'),
     (2, 6, 40, 37)),
    (lambda: nn.Conv2d(6, 8, 1), (6, 5, 5)),
    (lambda: nn.Conv1d(6, 8, 4, padding=2, bias=False), (3, 6, 400)),
    (lambda: nn.Conv3d(2, 8, (1, 2, 3), stride=(2, 1, 1), padding=(0, 1, 2)),
     (2, 2, 9, 8, 13)),
    (lambda: nn.Linear(6, 8), (5, 7, 9, 6)),
    (lambda: nn.Linear(6, 8), (5, 6)),
])
def test_patches_are_what_the_weights_are_multiplied_with(layer, shape):
    """At the sampled positions, whatever the geometry."""
    torch.manual_seed(0)
    module, x = layer(), torch.randn(shape)
    info = find_layers(nn.Sequential(module))[0]
    assert info.kind.sees_patches(module)
    with torch.no_grad():
        y = module(x)
        expected = output_samples(info, y)
        if module.bias is not None:
            expected = expected - module.bias.view(len(expected), -1, 1)
        actual = info.kind.to_matrix(module) @ input_samples(info, x, y)
    assert_close(actual, expected)
