# Copyright (c) mmbasis authors. All rights reserved.
import numpy as np
import pytest
import torch
import torch.nn as nn

from mmbasis.planning import find_layers
from mmbasis.planning.samples import (
    BLOCK,
    _places,
    add_products,
    chosen_positions,
    gram,
    input_samples,
    output_samples,
)


def test_large_means_do_not_hide_small_deviations():
    """In float32 alone the covariance would be off by more than itself."""
    torch.manual_seed(0)
    samples = 1000 + .01 * torch.randn(1, 4, 500)
    moments = torch.zeros(1, 4, 4, dtype=torch.float64)
    add_products(moments, samples, samples)
    moments /= 500
    mean = samples.double().mean(-1, True)
    expected = (samples - mean) @ (samples - mean).mT / 500
    assert expected.diagonal(dim1=1, dim2=2).min() > 5e-5
    torch.testing.assert_close(
        moments - mean @ mean.mT, expected, rtol=.01, atol=1e-6)


def test_products_add_up():
    """Of two kinds of samples, each with a mean."""
    torch.manual_seed(0)
    left, right = 3 + torch.randn(2, 4, 50), torch.randn(2, 5, 50) - 2
    total = torch.ones(2, 4, 5, dtype=torch.float64)
    add_products(total, left, right)
    expected = 1 + left.double() @ right.double().mT
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize('shape', [(300, ), (20, 17), (5, 9, 11)])
def test_positions_are_places_in_a_window(shape):
    """On the device, as NumPy finds them."""
    positions = chosen_positions(torch.Size(shape).numel(),
                                 torch.device('cpu'))
    found = _places(positions, torch.Size(shape))
    for one, other in zip(found, np.unravel_index(positions.numpy(), shape)):
        assert one.tolist() == other.tolist()


@pytest.mark.parametrize('size', [3, BLOCK, BLOCK + 1, 2 * BLOCK + 7])
def test_blocks_of_a_symmetric_product(size):
    torch.manual_seed(0)
    samples = torch.randn(2, size, 9)
    found = gram(samples)
    torch.testing.assert_close(found, samples @ samples.mT)
    assert torch.equal(found, found.mT)


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
    found = find_layers(nn.Sequential(module))[0]
    assert found.kind.sees_patches(module)
    with torch.no_grad():
        y = module(x)
        expected = output_samples(found, y)
        if module.bias is not None:
            expected = expected - module.bias.view(len(expected), -1, 1)
        actual = found.kind.to_matrix(module) @ input_samples(found, x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
