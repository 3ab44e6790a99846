# Copyright (c) mmbasis authors. All rights reserved.
import random

import numpy as np
import pytest
import torch
import torch.nn as nn

from mmbasis.layers import BasisLayer
from mmbasis.planning import find_layers
from mmbasis.planning.layers import UNUSED
from mmbasis.planning.samples import MAX_POSITIONS
from tests.analyses import measured
from tests.toy import Noisy


def statistics(model, batches, **options):
    return measured(model, batches, **options).statistics


def covariance(samples, groups=1):
    """Of samples of shape (positions, channels), for each group."""
    samples = samples.double().view(len(samples), groups, -1)
    samples = samples - samples.mean(0)
    return torch.einsum('ngi,ngj->gij', samples, samples) / len(samples)


def moment_of(known):
    vectors, values = known.spectrum.vectors, known.spectrum.values
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
    known = statistics(model, [x[:1], x[1:]])['0']
    y = channels_last(layer(x), axis)
    groups = len(known.mean)
    assert_close(moment_of(known), covariance(y, groups))
    bias = 0 if layer.bias is None else layer.bias.detach()
    assert_close(known.mean, (y.mean(0) - bias).view(groups, -1).double())


@pytest.mark.parametrize('name', [
    'expansion', 'expansion_strided', 'expansion_groups', 'linear_expansion',
    'linear_3d', 'expansion1d'
])
def test_input_side_is_the_smaller_one(name):
    """Only as many directions as inputs, and the same ones."""
    build, shape, axis = LAYERS[name]
    torch.manual_seed(0)
    layer, x = build(), torch.randn(shape)
    model = nn.Sequential(layer)
    known = statistics(model, [x])['0']
    groups, rows, in_size = find_layers(model)[0].matrix_shape
    assert in_size < rows
    assert known.spectrum.vectors.shape == (groups, rows, in_size)
    values = torch.linalg.eigvalsh(
        covariance(channels_last(layer(x), axis), groups)).flip(-1)
    assert_close(known.spectrum.values, values[:, :in_size])


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
    known = statistics(nn.Sequential(layer), [x])['0']
    y = channels_last(layer(x), 1)
    # an estimate: 6144 positions of far more
    assert_close(moment_of(known), covariance(y), 0.15)
    assert not torch.allclose(moment_of(known), covariance(y), rtol=1e-6)
    # costs are those of all positions
    out = layer(x).shape
    assert known.out_positions == out[2] * out[3]


@pytest.mark.parametrize('side', [8, 80])
def test_batches_may_be_split_anyhow(side):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Conv2d(6, 9, 1), nn.ConvTranspose2d(9, 4, 2))
    x = torch.randn(8, 3, side, side)
    whole = statistics(model, [x])
    for sizes in ((4, 4), (1, 5, 2)):
        split = statistics(model, x.split(sizes))
        for name, layer in whole.items():
            other = split[name]
            assert other.weight_positions == layer.weight_positions
            assert other.out_positions == layer.out_positions
            assert other.calls == layer.calls == 1
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

    known = statistics(Net(), [batch])['conv']
    assert known.out_positions == 36


@pytest.mark.parametrize('shape, positions', [((7, 6), 1), ((7, 5, 6), 5)])
def test_batches_of_vectors_with_labels(shape, positions):
    model = nn.Sequential(nn.Linear(6, 4))
    known = statistics(model, [(torch.rand(shape), torch.zeros(7))])['0']
    assert known.out_positions == positions


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
    known = statistics(nn.Sequential(layer), [grey])['0']
    basis = BasisLayer(layer, known.spectrum.values.shape[-1], bias=True)
    basis.project(layer, known.spectrum.vectors, known.mean)
    x = torch.randn(2, channels, 8, 8)
    assert_close(basis(x), layer(x))


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
    known = statistics(model, [x])['head']
    assert known.out_positions == 100 + 16
    y = torch.cat([channels_last(y, 1) for y in model(x)])
    assert_close(moment_of(known), covariance(y))


@pytest.mark.parametrize('add, adds', [
    (lambda x, y: x + y, True),
    (lambda x, y: torch.add(input=x, other=y), False),
    (lambda x, y: torch.cat([x, y], 1), False),
    (lambda x, y: x.relu() + y, False),
], ids=['sum', 'by keyword', 'not a sum', 'used before'])
@pytest.mark.parametrize('data_aware', [False, True])
def test_layers_that_a_shortcut_is_added_to(add, adds, data_aware):

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.first(x)
            return add(self.norm(self.last(x)), x)

    images = [torch.rand(2, 3, 4, 4), torch.rand(1, 3, 4, 4)]
    known = measured(Net().eval(), images, data_aware).statistics
    assert known['last'].adds is adds and known['first'].adds is False
    assert known['last'].out_positions == 16 and known['last'].calls == 1


@pytest.mark.parametrize('data_aware', [False, True])
def test_unused_layers_are_excluded(data_aware):
    analysis = measured(Shared(), [torch.rand(4, 3, 12, 12)], data_aware)
    excluded = analysis.selection.excluded
    assert excluded['unused'] is UNUSED
    assert UNUSED.words == 'not used in the forward pass'
    assert analysis.statistics['unused'].spectrum is None
    assert 'head' not in excluded
    known = analysis.statistics['head']
    assert known.calls == 2
    assert (known.mean is not None) == data_aware


def test_weights_alone_need_one_batch():
    """Spectra are those of the weights, and costs are known."""
    model, x = Shared(), torch.rand(4, 3, 12, 12)
    analysis = measured(model, [x, 'never looked at'], data_aware=False)
    known = analysis.statistics['head']
    values = torch.linalg.svdvals(model.head.weight.flatten(1).double())
    torch.testing.assert_close(known.spectrum.values[0], values.square())
    assert known.out_positions == 116


def test_layers_called_by_keyword():

    class Net(nn.Module):

        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 6)

        def forward(self, x):
            return self.fc(input=x)

    model, x = Net(), torch.randn(9, 4)
    known = statistics(model, [x])['fc']
    assert_close(moment_of(known), covariance(model.fc(x).detach()))


# ------------------------------------------------------------ side effects
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
    layers = statistics(model, [x])
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
        statistics(model, batches)
    assert torch.equal(torch.rand(()), expected)
    assert model.training and not model.conv._forward_hooks


# -------------------------------------------------------------------- errors
def test_no_images():
    model = nn.Sequential(nn.Conv2d(3, 6, 3))
    with pytest.raises(RuntimeError, match='dataloader is empty'):
        statistics(model, [])


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('layer', [
    nn.Conv2d(6, 8, 3),
    nn.Conv2d(6, 8, 1),
])
def test_broken_outputs_name_the_layer(layer, value):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), layer)
    model[1].running_mean[2] = value
    with pytest.raises(ValueError, match='^2 returns NaN or infinite'):
        statistics(model, [torch.rand(2, 3, 8, 8)])


def test_broken_images_name_the_first_layer():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3))
    x = torch.rand(2, 3, 8, 8)
    x[1, 0, 3, 3] = float('nan')
    with pytest.raises(ValueError, match='^0 returns NaN or infinite'):
        statistics(model, [x])
