# Copyright (c) mmbasis authors. All rights reserved.
import copy

import pytest
import torch
import torch.nn as nn
from mmcv.cnn.bricks import (
    Conv2dAdaptivePadding,
    ConvTranspose2d,
    ConvTranspose3d,
)
from mmcv.cnn.bricks import Linear as MMCVLinear
from mmcv.cnn.bricks.wrappers import Conv2d as MMCVConv2d
from mmcv.cnn.bricks.wrappers import Conv3d as MMCVConv3d

from mmbasis.layers import BasisLayer, kind_of, retract, why_not

# a layer, the shape of its input
LAYERS = {
    'conv1d': (lambda: nn.Conv1d(6, 8, 3, padding=1), (2, 6, 11)),
    'conv1d_groups':
    (lambda: nn.Conv1d(6, 8, 5, stride=2, groups=2), (2, 6, 11)),
    'conv2d': (lambda: nn.Conv2d(5, 7, 3), (2, 5, 9, 8)),
    'conv2d_no_bias': (lambda: nn.Conv2d(5, 7, 3, bias=False), (2, 5, 9, 8)),
    'conv2d_stride':
    (lambda: nn.Conv2d(5, 7, 3, stride=(2, 3), padding=1), (2, 5, 9, 8)),
    'conv2d_dilation':
    (lambda: nn.Conv2d(5, 7, 3, dilation=(2, 1), padding=2), (2, 5, 9, 8)),
    'conv2d_groups': (lambda: nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6,
                                                                        9, 8)),
    'conv2d_kernel': (lambda: nn.Conv2d(5, 7,
                                        (1, 5), padding=(0, 2)), (2, 5, 9, 8)),
    'conv2d_same': (lambda: nn.Conv2d(5, 7, 4, padding='same'), (2, 5, 9, 8)),
    'conv2d_valid': (lambda: nn.Conv2d(5, 7, 4, padding='valid'), (2, 5, 9,
                                                                   8)),
    'conv2d_reflect':
    (lambda: nn.Conv2d(5, 7, 3, padding=(2, 1), padding_mode='reflect'),
     (2, 5, 9, 8)),
    'conv2d_replicate':
    (lambda: nn.Conv2d(5, 7, 3, padding=2, padding_mode='replicate'), (2, 5, 9,
                                                                       8)),
    'conv2d_circular':
    (lambda: nn.Conv2d(5, 7, 3, padding=2, padding_mode='circular'), (2, 5, 9,
                                                                      8)),
    'conv2d_same_reflect':
    (lambda: nn.Conv2d(5, 7, 4, padding='same', padding_mode='reflect'),
     (2, 5, 9, 8)),
    'conv2d_expansion': (lambda: nn.Conv2d(3, 12, 1), (2, 3, 5, 5)),
    'conv2d_unbatched': (lambda: nn.Conv2d(5, 7, 3), (5, 9, 8)),
    'conv3d': (lambda: nn.Conv3d(4, 6, 3, padding=1), (2, 4, 5, 6, 4)),
    'conv3d_groups': (lambda: nn.Conv3d(4, 6, (1, 3, 3), stride=2, groups=2),
                      (2, 4, 5, 6, 4)),
    'transpose1d': (lambda: nn.ConvTranspose1d(6, 5, 4, stride=2, padding=1),
                    (2, 6, 7)),
    'transpose2d': (lambda: nn.ConvTranspose2d(6, 5, 3), (2, 6, 7, 5)),
    'transpose2d_groups': (lambda: nn.ConvTranspose2d(
        6, 8, 3, stride=2, padding=1, output_padding=1, groups=2, bias=False),
                           (2, 6, 7, 5)),
    'transpose2d_dilation':
    (lambda: nn.ConvTranspose2d(6, 5, 3, stride=(1, 2), dilation=2), (2, 6, 7,
                                                                      5)),
    'transpose3d': (lambda: nn.ConvTranspose3d(
        4, 6, 2, stride=2, output_padding=(1, 0, 1), groups=2), (2, 4, 3, 4,
                                                                 3)),
    'linear_2d': (lambda: nn.Linear(9, 7), (4, 9)),
    'linear_3d': (lambda: nn.Linear(7, 9, bias=False), (4, 5, 7)),
    'linear_4d': (lambda: nn.Linear(9, 7), (4, 3, 2, 9)),
    'mmcv_conv2d': (lambda: MMCVConv2d(5, 7, 3, padding=1), (2, 5, 9, 8)),
    'mmcv_conv3d': (lambda: MMCVConv3d(4, 6, 3), (2, 4, 5, 6, 4)),
    'mmcv_transpose2d': (lambda: ConvTranspose2d(6, 5, 3, stride=2), (2, 6, 7,
                                                                      5)),
    'mmcv_transpose3d': (lambda: ConvTranspose3d(4, 6, 2, stride=2), (2, 4, 3,
                                                                      4, 3)),
    'mmcv_linear': (lambda: MMCVLinear(9, 7), (4, 9)),
    'adaptive_padding':
    (lambda: Conv2dAdaptivePadding(5, 7, 3, stride=2, dilation=2), (2, 5, 9,
                                                                    8)),
}

every_layer = pytest.mark.parametrize('name', LAYERS)


def build(name):
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    return layer(), torch.randn(shape)


def represent(dense, rank=None, **kwargs):
    kind = kind_of(dense)
    full_rank = min(kind.matrix_shape(dense)[1:])
    layer = BasisLayer(dense, full_rank if rank is None else rank, **kwargs)
    layer.project(dense)
    return layer


def assert_same(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()
    assert expected.norm() > 0


def tensors(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def randomise_norm(layer):
    nn.init.uniform_(layer.norm.weight, 0.5, 2)
    nn.init.normal_(layer.norm.bias)


@every_layer
def test_full_rank_is_the_same_function(name):
    dense, x = build(name)
    assert why_not(dense) is None
    assert_same(represent(dense)(x), dense(x))


@every_layer
def test_weight_is_that_of_the_dense_layer(name):
    dense, _ = build(name)
    layer = represent(dense)
    torch.testing.assert_close(
        layer.weight, dense.weight, rtol=1e-4, atol=1e-5)
    assert 'weight' not in layer.state_dict()


@every_layer
def test_geometry_is_that_of_the_dense_layer(name):
    """DINO asks its head how many classes it predicts."""
    dense, _ = build(name)
    layer, asked = represent(dense, 1), 0
    for key in ('in_channels', 'out_channels', 'kernel_size', 'stride',
                'padding', 'dilation', 'groups', 'in_features',
                'out_features'):
        if hasattr(dense, key):
            assert getattr(layer, key) == getattr(dense, key)
            asked += 1
    assert asked >= 2


@every_layer
def test_truncation_loses_the_dropped_singular_values(name):
    dense, _ = build(name)
    matrix = kind_of(dense).to_matrix(dense).detach().double()
    values = torch.linalg.svdvals(matrix)
    layer = represent(dense, 2)
    lost = layer.to_dense().weight - dense.weight
    torch.testing.assert_close(
        lost.double().square().sum(),
        values[:, 2:].square().sum(),
        rtol=1e-4,
        atol=1e-10)
    assert lost.norm() > 0.01
    assert layer.orthogonality_error < 1e-5


@every_layer
@pytest.mark.parametrize('norm', [False, True])
def test_to_dense_is_the_same_function(name, norm):
    dense, x = build(name)
    if norm and name == 'conv2d_unbatched':
        x = x.unsqueeze(0)
    layer = represent(dense, 2, norm=norm)
    if norm:
        randomise_norm(layer)
        layer.train()(x)
        layer.eval()
    before = tensors(layer)
    again = layer.to_dense()
    assert_same(again(x), layer(x))
    # the layer itself is as before
    assert all(torch.equal(before[k], v) for k, v in tensors(layer).items())

    assert type(again) is type(dense)
    assert again.weight.shape == dense.weight.shape
    state = {
        k: v
        for k, v in vars(again).items() if k not in ('_parameters', 'training')
    }
    assert state == {k: vars(dense)[k] for k in state}
    assert repr(again).replace(', bias=False',
                               '').replace(', bias=True',
                                           '') == repr(dense).replace(
                                               ', bias=False',
                                               '').replace(', bias=True', '')


@every_layer
def test_fold_norm_keeps_the_function(name):
    dense, x = build(name)
    if name == 'conv2d_unbatched':
        x = x.unsqueeze(0)
    layer = represent(dense, 2, norm=True)
    randomise_norm(layer)
    layer.train()
    for _ in range(3):
        layer(x + torch.rand(()))
    layer.eval()
    expected = layer(x)
    # statistics matter: it is not the function of fresh ones
    fresh = represent(dense, 2, norm=True).eval()(x)
    assert (fresh - expected).norm() > 0.01 * expected.norm()
    keys = set(layer.state_dict())
    assert layer.fold_norm() is layer
    assert_same(layer(x), expected)
    assert keys - set(layer.state_dict()) >= {
        'norm.weight', 'norm.running_mean'
    }
    assert layer.fold_norm() is layer  # nothing left to do
    assert_same(layer(x), expected)


@every_layer
def test_dense_layer_is_never_changed(name):
    dense, x = build(name)
    before, output = tensors(dense), dense(x)
    layer = represent(dense, 2, bias=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    again = layer.to_dense()
    nn.init.zeros_(again.weight)
    assert all(torch.equal(before[k], v) for k, v in tensors(dense).items())
    assert set(before) == set(dense.state_dict())
    assert torch.equal(dense(x), output)


@every_layer
def test_gradients_reach_both_factors(name):
    dense, x = build(name)
    layer = represent(dense, 2)
    layer(x).square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad.abs().max() > 0


@every_layer
def test_state_dict_round_trip(name):
    dense, x = build(name)
    layer = represent(dense, 2, norm=True, bias=True).eval()
    randomise_norm(layer)
    x = x.unsqueeze(0) if name == 'conv2d_unbatched' else x
    other = BasisLayer(dense, 2, norm=True, bias=True).eval()
    assert not other.factors[0].any()  # a new layer is no function yet
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    wrong = BasisLayer(dense, 1, norm=True, bias=True)
    with pytest.raises(RuntimeError, match='size mismatch'):
        wrong.load_state_dict(layer.state_dict())


@every_layer
def test_deepcopy_is_independent(name):
    dense, x = build(name)
    layer = represent(dense, 2)
    expected = layer(x)
    clone = copy.deepcopy(layer)
    assert torch.equal(clone(x), expected)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), expected)


@every_layer
def test_retract_keeps_the_function(name):
    dense, x = build(name)
    layer = represent(dense, 2)
    with torch.no_grad():
        layer.basis.weight.add_(torch.rand_like(layer.basis.weight))
    expected = layer(x)
    assert layer.orthogonality_error > 0.1
    layer.retract()
    assert layer.orthogonality_error < 1e-5
    assert_same(layer(x), expected)


@every_layer
def test_factors_set_and_got(name):
    dense, _ = build(name)
    layer = represent(dense, 2)
    basis = torch.randn_like(layer.factors[0])
    coefficients = torch.randn_like(layer.factors[1])
    layer.set_factors(basis, coefficients)
    assert torch.equal(layer.factors[0], basis)
    assert torch.equal(layer.factors[1], coefficients)


# --------------------------------------------------- with given directions
@pytest.mark.parametrize(
    'name', ['conv2d', 'conv2d_groups', 'transpose2d_groups', 'linear_3d'])
def test_projection_on_given_directions(name):
    dense, x = build(name)
    groups, rows, _ = kind_of(dense).matrix_shape(dense)
    vectors = torch.linalg.qr(torch.randn(groups, rows, rows).double())[0]
    layer = BasisLayer(dense, 2)
    layer.project(dense, vectors)

    matrix = kind_of(dense).to_matrix(dense).detach().double()
    kept = vectors[..., :2] @ vectors[..., :2].mT @ matrix
    product = (layer.factors[1] @ layer.factors[0]).double()
    torch.testing.assert_close(product, kept, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', [
    'conv2d', 'conv2d_no_bias', 'conv2d_groups', 'transpose2d_groups',
    'linear_2d'
])
def test_mean_output_is_kept_by_the_bias(name):
    dense, x = build(name)
    x = x + 3
    bias = 0 if dense.bias is None else dense.bias.detach()
    axis = kind_of(dense).channel_axis(dense)
    y = dense(x).detach().movedim(axis, -1).flatten(0, -2)
    mean = (y.mean(0) - bias).view(
        kind_of(dense).matrix_shape(dense)[0], -1)
    layer = BasisLayer(dense, 1, bias=True)
    layer.project(dense, mean=mean)
    z = layer(x).detach().movedim(axis, -1).flatten(0, -2)
    torch.testing.assert_close(z.mean(0), y.mean(0), rtol=1e-4, atol=1e-4)
    # without the mean it is not
    layer.project(dense)
    z = layer(x).detach().movedim(axis, -1).flatten(0, -2)
    assert (z.mean(0) - y.mean(0)).abs().max() > 1e-2


# ------------------------------------------------------------- inheritance
@pytest.mark.parametrize('name', ['conv2d_groups', 'transpose2d', 'linear_2d'])
def test_frozen_layers_stay_frozen(name):
    dense, _ = build(name)
    dense.requires_grad_(False)
    layer = represent(dense, 2, norm=True, bias=True)
    assert not any(p.requires_grad for p in layer.parameters())
    again = layer.to_dense()
    assert not any(p.requires_grad for p in again.parameters())
    layer.fold_norm()
    assert not any(p.requires_grad for p in layer.parameters())
    trained = represent(build(name)[0], 2, norm=True)
    assert all(p.requires_grad for p in trained.parameters())
    trained = trained.fold_norm().to_dense()
    assert all(p.requires_grad for p in trained.parameters())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('name', ['conv2d', 'transpose2d', 'linear_2d'])
def test_dtype_and_device_are_inherited(name, dtype):
    dense, x = build(name)
    dense.to(dtype)
    layer = represent(dense, norm=True, bias=True).eval()
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert layer.norm.running_var.dtype == dtype
    assert layer(x.to(dtype)).dtype == dtype
    assert layer.to_dense().weight.dtype == dtype
    assert layer.fold_norm().coefficients.bias.dtype == dtype
    if dtype == torch.float64:
        plain = represent(dense)
        assert_same(plain(x.double()), dense(x.double()), 1e-12)
    meta = BasisLayer(copy.deepcopy(dense).to('meta'), 2)
    assert {p.device.type for p in meta.parameters()} == {'meta'}


@pytest.mark.parametrize('training', [False, True])
def test_mode_is_inherited(training):
    dense = nn.Conv2d(4, 6, 3).train(training)
    layer = represent(dense, 2, norm=True)
    assert {m.training for m in layer.modules()} == {training}
    assert layer.to_dense().training == training


def test_hooks_of_the_dense_layer_stay_with_it():
    dense, calls = nn.Conv2d(4, 6, 3), []
    dense.register_forward_hook(lambda *_: calls.append(1))
    layer = represent(dense)
    layer(torch.rand(1, 4, 5, 5))
    layer.to_dense()(torch.rand(1, 4, 5, 5))
    assert not calls
    dense(torch.rand(1, 4, 5, 5))
    assert calls == [1]


def test_what_a_model_hangs_on_its_layers_is_not_copied():
    """DDQ gives each of its layers the memory of the whole model."""
    dense = nn.Linear(8, 4)
    dense.cache = dict(model=[nn.Linear(8, 4)])
    layer = represent(dense, 2)
    assert layer.basis.cache is layer.to_dense().cache is dense.cache


def test_output_size_of_a_transposed_convolution():
    dense = nn.ConvTranspose2d(6, 5, 3, stride=2)
    layer, x = represent(dense), torch.rand(1, 6, 4, 4)
    for size in ((9, 9), (10, 10)):
        assert_same(layer(x, output_size=size), dense(x, output_size=size))


def test_called_by_keyword():
    dense, x = build('linear_2d')
    assert_same(represent(dense)(input=x), dense(input=x))


def test_adaptive_padding_of_another_resolution():
    dense, _ = build('adaptive_padding')
    layer = represent(dense)
    for size in ((9, 8), (7, 13), (4, 4)):
        x = torch.rand(1, 5, *size)
        assert_same(layer(x), dense(x))


def test_what_it_costs():
    layer = represent(nn.Conv2d(6, 8, 3, groups=2), 3)
    assert layer.basis.weight.shape == (6, 3, 3, 3)
    assert layer.coefficients.weight.shape == (8, 3, 1, 1)
    assert layer.coefficients.groups == 2
    assert layer.basis.bias is None and layer.coefficients.bias is not None


# ---------------------------------------------------------------- refusals
@pytest.mark.parametrize('rank', [0, -1, 8])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf'\[1, 7\], but got {rank}'):
        BasisLayer(nn.Conv2d(5, 7, 3), rank)
    with pytest.raises(ValueError, match=r'\[1, 5\], but got 6'):
        BasisLayer(nn.Conv2d(5, 7, 1), 6)


def test_no_retraction_through_a_norm():
    layer = represent(nn.Conv2d(5, 7, 3), 2, norm=True)
    with pytest.raises(RuntimeError, match='fold_norm'):
        layer.retract()
    layer.fold_norm().retract()


def test_layers_are_retracted_together_or_not_at_all():
    """Those of one shape, grouped or not, share a decomposition."""
    torch.manual_seed(0)
    layers = [
        represent(nn.Conv2d(size, 4 * groups, 3, groups=groups), 2)
        for size, groups in ((6, 1), (6, 1), (12, 2), (5, 1))
    ]
    for layer in layers:
        nn.init.normal_(layer.basis.weight)
    alone = copy.deepcopy(layers)
    for layer in alone:
        layer.retract()
    before = [[x.detach().clone() for x in layer.weights] for layer in layers]
    norm = represent(nn.Conv2d(6, 4, 3), 2, norm=True)
    with pytest.raises(RuntimeError, match='fold_norm'):
        retract([*layers, norm])
    for layer, weights in zip(layers, before):
        assert all(map(torch.equal, layer.weights, weights))
    retract(layers)
    for layer, other in zip(layers, alone):
        assert layer.orthogonality_error < 1e-5
        torch.testing.assert_close(layer.weights, other.weights)


def test_no_bias_to_set():
    layer = represent(nn.Conv2d(5, 7, 3, bias=False), 2)
    with pytest.raises(ValueError, match='no bias'):
        layer.set_factors(*layer.factors, bias=torch.zeros(7))
