# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
import torch.nn as nn

from mmbasis.planning import find_layers
from mmbasis.planning.samples import (
    input_samples,
    output_samples,
    sum_of_products,
)


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
    found = find_layers(nn.Sequential(module))[0]
    assert found.kind.sees_patches(module)
    with torch.no_grad():
        y = module(x)
        expected = output_samples(found, y)
        if module.bias is not None:
            expected = expected - module.bias.view(len(expected), -1, 1)
        actual = found.kind.to_matrix(module) @ input_samples(found, x, y)
    assert actual.shape == expected.shape
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
