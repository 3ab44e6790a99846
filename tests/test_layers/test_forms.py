# Copyright (c) mmbasis authors. All rights reserved.
"""Layers with a basis of their inputs, of their outputs, or of both."""
import copy
import itertools

import pytest
import torch
import torch.nn as nn
from mmcv.cnn.bricks import Conv2dAdaptivePadding

from mmbasis.factorization import merge, orthonormalize
from mmbasis.layers import BasisLayer

LAYERS = {
    'plain': (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 7)),
    'strided': (nn.Conv2d(6, 8, 3, stride=2, bias=False), (2, 6, 9, 9)),
    'grouped': (nn.Conv2d(6, 8, 3, groups=2, dilation=2), (2, 6, 9, 9)),
    'reflecting': (nn.Conv2d(6, 8, 3, padding=1, padding_mode='reflect'),
                   (2, 6, 7, 7)),
    'circular': (nn.Conv1d(6, 8, 5, padding=2, padding_mode='circular'),
                 (2, 6, 9)),
    'volume': (nn.Conv3d(6, 8, 2), (2, 6, 4, 4, 4)),
    'same': (nn.Conv2d(6, 8, (2, 3), padding='same', dilation=2),
             (2, 6, 7, 8)),
    'uneven': (nn.Conv2d(6, 8, (2, 5), (2, 3), (1, 4), (3, 1), 2,
                         padding_mode='circular'), (2, 6, 12, 15)),
    'replicating': (nn.Conv2d(8, 3, 3, padding=(2, 1),
                                    padding_mode='replicate'), (2, 8, 7, 7)),
    'transposed': (nn.ConvTranspose2d(6, 8, 4, stride=2, padding=1, groups=2),
                   (2, 6, 5, 5)),
}
SPATIAL = ['plain', 'strided', 'grouped', 'reflecting', 'same', 'uneven',
           'replicating']
FORMS = [*itertools.product(LAYERS, ['output', 'input', 'both']),
         *((name, 'spatial') for name in SPATIAL)]


def ranks(dense, form, less=0):
    """Those of a form, that much below the full ones."""
    rank, inputs = sides(dense, form, less)
    if form == 'spatial':
        height, width = dense.kernel_size
        rank = min(height * (inputs + less), width * (rank + less)) - less
        return dict(rank=rank, spatial=True)
    return dict(rank=rank, input_rank=inputs)


def sides(dense, form, less=0):
    """Rank and input rank of a form, that much below the full ones."""
    rank = dense.out_channels // dense.groups - less
    inputs = dense.in_channels // dense.groups - less
    return (None if form == 'input' else rank,
            None if form == 'output' else inputs)


def built(name, form, less=0, **kwargs):
    torch.manual_seed(0)
    dense, shape = copy.deepcopy(LAYERS[name])
    dense = dense.double()
    layer = BasisLayer(dense, **ranks(dense, form, less), **kwargs).eval()
    layer.project(dense)
    return dense, layer, torch.randn(shape).double()


@pytest.mark.parametrize('name, form', FORMS)
def test_full_rank_is_the_same_function(name, form):
    dense, layer, x = built(name, form)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer(input=x), dense(x))
    torch.testing.assert_close(layer.weight, dense.weight)


@pytest.mark.parametrize('name, form', FORMS)
def test_parts_have_the_ranks(name, form):
    dense, layer, x = built(name, form, less=1, bias=True)
    rank, inputs = map(ranks(dense, form, less=1).get, ('rank', 'input_rank'))
    keys = {'basis.weight', 'last'}
    keys |= {'input_basis.weight'} if inputs else set()
    keys |= {'coefficients.weight'} if rank else set()
    end = 'coefficients.bias' if rank else 'basis.bias'
    assert {k.replace(end, 'last') for k in layer.state_dict()} == keys
    groups = dense.groups
    if inputs:
        assert layer.input_basis.out_channels == groups * inputs
    assert layer.basis.in_channels == groups * (
        inputs or dense.in_channels // groups)
    assert layer.basis.out_channels == groups * (
        rank or dense.out_channels // groups)
    assert layer(x).shape == dense(x).shape


@pytest.mark.parametrize('name, form', FORMS)
def test_dense_again(name, form):
    """Below full rank: as a dense layer, and after retraction."""
    dense, layer, x = built(name, form, less=1, bias=True)
    layer.last.bias.data.normal_()
    with torch.no_grad():
        for factor in layer.weights:
            factor += .1 * torch.randn_like(factor)
    y = layer(x)
    assert layer.orthogonality_error > 1e-3
    again = layer.to_dense()
    assert type(again) is type(dense)
    assert again.weight.shape == dense.weight.shape
    torch.testing.assert_close(again(x), y)
    torch.testing.assert_close(layer.weight, again.weight)
    torch.testing.assert_close(layer.bias, again.bias)
    layer.retract()
    assert layer.orthogonality_error < 1e-6
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize('name', LAYERS)
def test_norm_is_folded(name):
    _, layer, x = built(name, 'both', less=1, norm=True)
    layer.train()
    layer(x)
    layer.eval()
    y = layer(x)
    torch.testing.assert_close(layer.to_dense()(x), y)
    layer.fold_norm()
    assert layer.norm is None
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize('name, form', FORMS)
def test_trained_like_the_dense_layer(name, form):
    dense, _, x = built(name, form)
    dense.requires_grad_(False)
    layer = BasisLayer(dense, **ranks(dense, form), bias=True)
    assert not any(
        p.requires_grad for n, p in layer.named_parameters()
        if not n.endswith('bias') or dense.bias is not None)


def test_wrong_ranks_are_named():
    dense = nn.Conv2d(6, 8, 3)
    for kwargs, name in ((dict(rank=2, input_rank=7), 'input rank'),
                         (dict(rank=None, input_rank=0), 'input rank'),
                         (dict(rank=9, input_rank=2), 'rank'),
                         (dict(rank=None), 'rank')):
        with pytest.raises(ValueError, match=f'the {name} of a Conv2d'):
            BasisLayer(dense, **kwargs)
    with pytest.raises(ValueError, match='input rank of a Linear'):
        BasisLayer(nn.Linear(6, 8), 2, input_rank=3)


@pytest.mark.parametrize('dense, words', [
    (nn.Conv2d(6, 8, 1), 'a window of 1x1 cannot be split'),
    (nn.Conv2d(6, 8, (1, 3)), 'a window of 1x3 cannot be split'),
    (nn.Conv1d(6, 8, 3), 'a window of 3 cannot be split'),
    (nn.Conv3d(6, 8, 3), 'a window of 3x3x3 cannot be split'),
    (nn.Linear(6, 8), 'only convolutions have a window'),
    (nn.ConvTranspose2d(6, 8, 3), 'how a ConvTranspose2d splits'),
    (Conv2dAdaptivePadding(6, 8, 3), 'how a Conv2dAdaptivePadding splits'),
])
def test_other_layers_are_not_split(dense, words):
    with pytest.raises(ValueError, match=words):
        BasisLayer(dense, 2, spatial=True)


def test_what_split_windows_cannot_have():
    dense = nn.Conv2d(6, 8, 3)
    for kwargs in (dict(norm=True), dict(input_rank=3)):
        with pytest.raises(ValueError, match='no normalization .* no input'):
            BasisLayer(dense, 2, spatial=True, **kwargs)
    with pytest.raises(ValueError, match=r'must be in \[1, 18\], but got 19'):
        BasisLayer(dense, 19, spatial=True)


def test_chains_of_factors():
    """Of any length: orthonormal, and the product stays."""
    torch.manual_seed(0)
    front, basis, last = (torch.randn(2, *s).double()
                          for s in ((3, 6), (4, 27), (8, 4)))
    for factors in ((front, basis, last), (basis, last), (front, basis)):
        found = orthonormalize(*factors)
        torch.testing.assert_close(merge(*found), merge(*factors))
        for factor in found[:-1]:
            eye = torch.eye(factor.shape[1]).double().expand(2, -1, -1)
            torch.testing.assert_close(factor @ factor.mT, eye)
