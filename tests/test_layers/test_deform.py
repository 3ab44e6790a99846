# Copyright (c) mmbasis authors. All rights reserved.
"""Deformable basis layers, against the real operators."""
import copy

import pytest
import torch
import torch.nn as nn
from mmcv.cnn import fuse_conv_bn
from mmcv.ops import (
    DeformConv2d,
    DeformConv2dPack,
    ModulatedDeformConv2d,
    ModulatedDeformConv2dPack,
)

from mmbasis.layers import BasisLayer, DeformConvKind, kind_of, why_not

GEOMETRY = dict(kernel_size=3, padding=1, bias=False)
# class, arguments
LAYERS = {
    'v1': (DeformConv2d, dict(GEOMETRY)),
    'v1_stride': (DeformConv2d, dict(GEOMETRY, stride=2)),
    'v1_groups': (DeformConv2d, dict(GEOMETRY, groups=2, deform_groups=2)),
    'v1_pack': (DeformConv2dPack, dict(GEOMETRY, deform_groups=4)),
    'v1_pack_dilation':
    (DeformConv2dPack, dict(GEOMETRY, dilation=2, padding=2, groups=4)),
    'v2': (ModulatedDeformConv2d, dict(GEOMETRY, bias=True)),
    'v2_groups':
    (ModulatedDeformConv2d, dict(GEOMETRY, groups=2, deform_groups=4)),
    'v2_pack': (ModulatedDeformConv2dPack, dict(GEOMETRY, bias=True)),
    'v2_pack_stride': (ModulatedDeformConv2dPack,
                       dict(GEOMETRY, stride=2, groups=2, deform_groups=2)),
}
every_layer = pytest.mark.parametrize('name', LAYERS)
#: those whose deformable groups an input basis would mix
ONE_SIDED = ['v1_pack', 'v2_groups']
two_sided = pytest.mark.parametrize('form, name', [
    (form, name) for form in ('input', 'both') for name in LAYERS
    if name not in ONE_SIDED])
PACKS = [name for name in LAYERS if 'pack' in name]
every_pack = pytest.mark.parametrize('name', PACKS)


def build(name, size=(9, 8)):
    """A layer that deforms, and its arguments."""
    torch.manual_seed(0)
    cls, kwargs = LAYERS[name]
    dense = cls(8, 12, **kwargs)
    if getattr(dense, 'bias', None) is not None:
        nn.init.normal_(dense.bias)
    args = [torch.randn(2, 8, *size)]
    if name in PACKS:
        nn.init.normal_(dense.conv_offset.weight, std=.1)
        nn.init.normal_(dense.conv_offset.bias)
    else:
        points = 9 * dense.deform_groups
        out = [-(-side // dense.stride[0]) for side in size]
        args.append(torch.randn(2, 2 * points, *out))
        if name.startswith('v2'):
            args.append(torch.rand(2, points, *out))
    return dense, args


def represent(dense, rank=None, **kwargs):
    full_rank = min(DeformConvKind.matrix_shape(dense)[1:])
    layer = BasisLayer(dense, rank or full_rank, **kwargs)
    layer.project(dense)
    return layer


def narrowed(dense, form, less=0, **kwargs):
    """With an input basis that drops as many channels of each group."""
    _, rows, _ = DeformConvKind.matrix_shape(dense)
    layer = BasisLayer(
        dense, None if form == 'input' else rows - less,
        input_rank=DeformConvKind.in_channels(dense) - less, **kwargs)
    layer.project(dense)
    return layer.eval()


def assert_same(actual, expected, tolerance=1e-5):
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()
    assert expected.norm() > 0


@every_layer
def test_full_rank_is_the_same_function(name):
    dense, args = build(name)
    assert why_not(dense) is None
    assert kind_of(dense) is DeformConvKind
    layer = represent(dense)
    assert_same(layer(*args), dense(*args))
    assert layer.orthogonality_error < 1e-5
    assert type(layer.basis) is type(dense)
    assert type(layer.coefficients) is nn.Conv2d
    assert layer.basis.deform_groups == dense.deform_groups
    assert layer.basis.groups == layer.coefficients.groups == dense.groups


@every_layer
def test_offsets_matter(name):
    """The comparisons of this file would see a lost offset."""
    dense, args = build(name)
    expected = dense(*args)
    if name in PACKS:
        nn.init.zeros_(dense.conv_offset.weight)
        nn.init.zeros_(dense.conv_offset.bias)
    else:
        args[1] = torch.zeros_like(args[1])
    assert (dense(*args) - expected).norm() > .1 * expected.norm()


@every_layer
def test_truncation_loses_the_dropped_singular_values(name):
    dense, args = build(name)
    matrix = DeformConvKind.to_matrix(dense).detach().double()
    values = torch.linalg.svdvals(matrix)
    layer = represent(dense, 2)
    again = layer.to_dense()
    lost = (again.weight - dense.weight).double().square().sum()
    torch.testing.assert_close(
        lost, values[:, 2:].square().sum(), rtol=1e-4, atol=1e-10)
    assert type(again) is type(dense)
    assert_same(layer(*args), again(*args))
    assert again.state_dict().keys() == dense.state_dict().keys()
    assert repr(again) == repr(dense)


@every_layer
def test_gradients_reach_factors_inputs_and_offsets(name):
    dense, args = build(name)
    layer = represent(dense, 2)
    args = [x.requires_grad_() for x in args]
    layer(*args).square().sum().backward()
    for tensor in [*layer.parameters(), *args]:
        assert tensor.grad.abs().max() > 0


@every_layer
@pytest.mark.parametrize('norm', [False, True])
def test_state_dict_round_trip(name, norm):
    dense, args = build(name)
    layer = represent(dense, 2, norm=norm, bias=True).eval()
    nn.init.normal_(layer.coefficients.bias)
    other = BasisLayer(build(name)[0], 2, norm=norm, bias=True).eval()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    missing = other.load_state_dict(layer.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(other(*args), layer(*args))
    prefix = 'basis.conv_offset.'
    found = {k[len(prefix):] for k in layer.state_dict() if prefix in k}
    assert found == ({'weight', 'bias'} if name in PACKS else set())


@every_layer
def test_norm_is_folded(name):
    dense, args = build(name)
    layer = represent(dense, 2, norm=True)
    nn.init.uniform_(layer.norm.weight, .5, 2)
    nn.init.normal_(layer.norm.bias)
    layer.train()(*args)
    layer.eval()
    expected = layer(*args)
    assert_same(layer.fold_norm()(*args), expected)
    layer.retract()
    assert_same(layer(*args), expected)


@every_pack
def test_offset_branch_is_kept_as_it_was(name):
    dense, _ = build(name)
    calls = []
    dense.conv_offset.register_forward_hook(lambda *_: calls.append(1))
    dense.conv_offset.weight.requires_grad_(False)
    before = copy.deepcopy(dense.conv_offset.state_dict())
    layer = represent(dense, 2)
    branch = layer.basis.conv_offset
    layer(torch.rand(1, 8, 9, 8))
    assert calls
    assert not branch.weight.requires_grad and branch.bias.requires_grad
    assert layer.basis.weight.requires_grad
    for key, value in branch.state_dict().items():
        assert torch.equal(value, before[key])
    again = layer.to_dense().conv_offset
    assert not again.weight.requires_grad and again.bias.requires_grad
    # a copy: the dense layer is left alone
    nn.init.zeros_(branch.bias)
    assert torch.equal(dense.conv_offset.bias, before['bias'])


@every_pack
def test_frozen_filters_leave_the_offset_branch_to_train(name):
    dense, _ = build(name)
    dense.weight.requires_grad_(False)
    layer = represent(dense, 2)
    trained = {k for k, v in layer.named_parameters() if v.requires_grad}
    assert trained == {'basis.conv_offset.weight', 'basis.conv_offset.bias'
                       } | ({'coefficients.bias'} & trained)
    assert not layer.coefficients.weight.requires_grad


def test_input_smaller_than_the_kernel():
    dense = DeformConv2d(8, 12, 3, padding=1)
    args = torch.randn(1, 8, 2, 1), torch.randn(1, 18, 2, 1)
    assert_same(represent(dense)(*args), dense(*args))


def test_a_bias_is_not_lost_in_merging():
    dense, args = build('v1')
    layer = represent(dense, 2, bias=True)
    nn.init.normal_(layer.coefficients.bias)
    with pytest.raises(ValueError, match='DeformConv2d has no bias'):
        layer.to_dense()
    with pytest.raises(ValueError, match='DeformConv2d has no bias'):
        represent(dense, 2, norm=True).to_dense()
    dense, args = build('v2_groups')
    layer = represent(dense, 2, bias=True)
    nn.init.normal_(layer.coefficients.bias)
    assert_same(layer.to_dense()(*args), layer(*args))


def test_masks_by_keyword():
    dense, args = build('v2')
    named = dict(zip(('x', 'offset', 'mask'), args))
    assert_same(represent(dense)(**named), dense(*args))


def test_subclass_with_a_forward_of_its_own_is_named():

    class Doubled(DeformConv2d):

        def forward(self, x, offset):
            return 2 * super().forward(x, offset)

    assert why_not(Doubled(
        8, 12, 3)) == ('Doubled computes its output in a way of its own')
    assert 'depthwise' in why_not(DeformConv2d(8, 8, 3, groups=8))


# ------------------------------------------------------------ input bases
@two_sided
def test_full_input_rank_is_the_same_function(name, form):
    dense, args = build(name)
    layer = narrowed(dense, form)
    assert_same(layer(*args), dense(*args))
    # also where samples lie outside of the input, which is zero there
    args[0][..., [0, -1]] += 9
    if name in PACKS:
        dense.conv_offset.bias.data *= 4
        layer = narrowed(dense, form)
    else:
        args[1] *= 4
    assert_same(layer(*args), dense(*args))


@two_sided
def test_below_full_rank_it_is_a_dense_layer(name, form):
    dense, args = build(name)
    layer = narrowed(dense, form, less=1)
    with torch.no_grad():
        for weight in layer.weights:
            weight += .1 * torch.randn_like(weight)
    y = layer(*args)
    again = layer.to_dense()
    assert type(again) is type(dense)
    assert_same(again(*args), y)
    assert again.state_dict().keys() == dense.state_dict().keys()
    assert repr(again) == repr(dense)
    assert_same(layer.weight, again.weight)
    assert layer.orthogonality_error > 1e-3
    layer.retract()
    assert layer.orthogonality_error < 1e-5
    assert_same(layer(*args), y)


@two_sided
def test_gradients_and_state_with_an_input_basis(name, form):
    dense, args = build(name)
    layer = narrowed(dense, form, less=1, bias=True)
    nn.init.normal_(layer.last.bias)
    other = narrowed(build(name)[0], form, less=1, bias=True)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    missing = other.load_state_dict(layer.state_dict())
    assert not missing.missing_keys and not missing.unexpected_keys
    assert torch.equal(other(*args), layer(*args))
    assert torch.equal(copy.deepcopy(layer)(*args), layer(*args))
    args = [x.requires_grad_() for x in args]
    layer(*args).square().sum().backward()
    for tensor in [*layer.parameters(), *args]:
        assert tensor.grad.abs().max() > 0


@pytest.mark.parametrize('name', [x for x in LAYERS if x not in ONE_SIDED])
def test_norm_between_three_parts_is_folded(name):
    dense, args = build(name)
    layer = narrowed(dense, 'both', less=1, norm=True)
    nn.init.uniform_(layer.norm.weight, .5, 2)
    nn.init.normal_(layer.norm.bias)
    layer.train()(*args)
    y = layer.eval()(*args)
    assert_same(layer.fold_norm()(*args), y)
    assert layer.norm is None


@two_sided
def test_batch_norm_behind_is_fused(name, form):
    """Into any of them, also where the operator knows no bias."""

    class Block(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = narrowed(dense, form, less=1)
            self.bn = nn.BatchNorm2d(12)

        def forward(self, *args):
            return self.bn(self.conv(*args))

    dense, args = build(name)
    block = Block().eval()
    nn.init.normal_(block.bn.bias)
    nn.init.normal_(block.bn.running_mean)
    nn.init.uniform_(block.bn.weight, .5, 2)
    y = block(*args)
    fused = fuse_conv_bn(block)
    assert isinstance(fused.bn, nn.Identity)
    assert_same(fused(*args), y)


@pytest.mark.parametrize('name', [x for x in PACKS if x not in ONE_SIDED])
def test_offset_branch_keeps_the_dense_input(name):
    dense, (x, ) = build(name)
    layer, seen = narrowed(dense, 'both', less=1), []
    layer.basis.conv_offset.register_forward_pre_hook(
        lambda module, args: seen.append(args[0]))
    layer(x)
    assert seen[0] is x
    assert layer.basis.conv_offset.in_channels == 8
    assert layer.basis.in_channels == 8 - dense.groups


@pytest.mark.parametrize('name', ONE_SIDED)
def test_deformable_groups_are_not_mixed(name):
    dense, _ = build(name)
    assert 'its 4 deformable groups sample in places of their own' in (
        DeformConvKind.why_one_sided(dense))
    with pytest.raises(ValueError, match='the input rank of a .*Deform'):
        narrowed(dense, 'both', less=1)


def test_bias_behind_an_input_basis_is_not_lost():
    dense, args = build('v1')
    layer = narrowed(dense, 'input', bias=True)
    nn.init.normal_(layer.last.bias)
    assert_same(layer(*args),
                dense(*args) + layer.bias.view(-1, 1, 1))
    with pytest.raises(ValueError, match='DeformConv2d has no bias'):
        layer.to_dense()


def test_arguments_by_keyword_in_any_order():
    dense, (x, offset, mask) = build('v2')
    expected = dense(x, offset, mask)
    for form in ('input', 'both'):
        layer = narrowed(dense, form)
        assert_same(layer(mask=mask, offset=offset, x=x), expected)
        assert_same(layer(x, mask=mask, offset=offset), expected)
