# Copyright (c) mmbasis authors. All rights reserved.
"""What an autograd graph tells of layers, one mechanism at a time."""
import inspect
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
import torchvision
from mmcv.ops import DeformConv2d, ModulatedDeformConv2dPack
from mmcv.ops.deform_conv import DeformConv2dFunction
from mmcv.ops.deform_roi_pool import DeformRoIPoolFunction
from mmcv.ops.modulated_deform_conv import ModulatedDeformConv2dFunction
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmcv.ops.roi_align import RoIAlignFunction

from mmbasis.planning import find_layers
from mmbasis.running.graph import _sampling_operands, trace_targets


def trace(model, run=None, shape=(1, 3, 8, 8)):
    """Targets, with a model called on random numbers by default."""
    layers = {x.name: x.module for x in find_layers(model)}
    run = run or partial(model, torch.rand(shape))
    return trace_targets(model, layers, run)


class Net(nn.Module):
    """Named layers, and what to do with them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.run = forward

    def forward(self, *args):
        return self.run(self, *args)


def conv(inputs=4, outputs=4, size=3):
    return nn.Conv2d(inputs, outputs, size, padding=size // 2)


def predictions(forward, shape=(1, 3, 8, 8), **layers):
    return trace(Net(forward, **layers), shape=shape).predictions


# ------------------------------------------------- what may stand in between
def affine(m, x):
    return m.norm(m.last(m.first(x))) * m.scale + m.shift


BETWEEN = {
    'nothing':
    lambda m, x: m.last(m.first(x)),
    'activation':
    lambda m, x: m.last(m.first(x)).sigmoid_(),
    'in_place':
    lambda m, x: m.last(m.first(x).relu_()).add_(1).clamp_(0),
    'a slice':
    lambda m, x: m.last(m.first(x))[:, 1:].exp(),
    'softmax':
    lambda m, x: m.last(m.first(x)).flatten(2).softmax(-1),
    'affine':
    affine,
    'resize':
    lambda m, x: F.interpolate(m.last(m.first(x)), scale_factor=2),
    'shapes':
    lambda m, x: m.last(m.first(x)).permute(0, 2, 3, 1).flatten(),
    'a loss':
    lambda m, x: F.mse_loss(m.last(m.first(x)), x[:, :1].expand(1, 4, 8, 8)),
    'a constant':
    lambda m, x: m.last(m.first(x)) @ torch.eye(8),
}


@pytest.mark.parametrize('name', BETWEEN)
def test_what_may_follow_a_prediction(name):
    net = Net(
        BETWEEN[name],
        first=conv(3),
        last=conv(),
        norm=nn.BatchNorm2d(4).eval(),
        scale=nn.Parameter(torch.rand(4, 1, 1)),
        shift=nn.Parameter(torch.rand(1, 4, 8, 8)))
    assert trace(net).predictions == {'last'}


# ---------------------------------------------------------- weight matrices
class WeightedConv(nn.Conv2d):
    """A layer that no basis can replace, with a weight that is computed."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std(), self.bias, padding=1)


def attend(m, x):
    x = m.first(x).flatten(2).transpose(1, 2)
    return m.attention(x, x, x)[0]


WEIGHTED = {
    'standardised': (lambda m, x: m.last(m.first(x)),
                     lambda: dict(last=WeightedConv(4, 4, 3))),
    'spectral norm': (lambda m, x: m.last(m.first(x)),
                      lambda: dict(last=nn.utils.spectral_norm(conv()))),
    'weight norm': (lambda m, x: m.last(m.first(x)),
                    lambda: dict(last=nn.utils.weight_norm(conv()))),
    'functional': (lambda m, x: F.conv2d(m.first(x), m.last),
                   lambda: dict(last=nn.Parameter(torch.rand(2, 4, 3, 3)))),
    'product': (lambda m, x: m.first(x).mean(
        (2, 3)) @ m.last, lambda: dict(last=nn.Parameter(torch.rand(4, 2)))),
    'normalised':
    (lambda m, x: F.linear(m.first(x).mean((2, 3)), F.normalize(m.last)),
     lambda: dict(last=nn.Parameter(torch.rand(2, 4)))),
    'einsum': (lambda m, x: torch.einsum('ncij,cd->ndij', m.first(x), m.last),
               lambda: dict(last=nn.Parameter(torch.rand(4, 2)))),
    'attention':
    (attend,
     lambda: dict(attention=nn.MultiheadAttention(4, 2, batch_first=True))),
    'recurrent': (lambda m, x: m.last(m.first(x).mean(3).transpose(1, 2))[0],
                  lambda: dict(last=nn.LSTM(4, 4))),
    'another kind': (lambda m, x: m.last(m.first(x)),
                     lambda: dict(last=nn.Conv2d(4, 4, 3, groups=4))),
}


@pytest.mark.parametrize('frozen', (False, True))
@pytest.mark.parametrize('name', WEIGHTED)
def test_what_ends_the_search(name, frozen):
    """Whether or not the last weights can be compressed, and are trained."""
    forward, build = WEIGHTED[name]
    net = Net(forward, first=conv(3), **build()).eval()
    if frozen:
        net.requires_grad_(False)
    assert 'first' not in trace(net).predictions
    assert not any(p.requires_grad for p in net.parameters()) or not frozen


def test_weights_used_without_their_layer():
    assert predictions(
        lambda m, x: F.linear(m.first(x).mean((2, 3)), m.fc.weight),
        first=conv(3),
        fc=nn.Linear(4, 2)) == {'fc'}


def test_views_changed_in_place():
    """A linear layer with a bias returns a view for three dimensions."""
    tokens = Net(
        lambda m, x: m.two(m.one(x).relu_()).sigmoid_(),
        one=nn.Linear(8, 8),
        two=nn.Linear(8, 4))
    assert trace(tokens, shape=(2, 3, 8)).predictions == {'two'}


# -------------------------------------------------------- how models are run
def checkpointed(m, x, **kwargs):
    x = m.first(x)
    return torch.utils.checkpoint.checkpoint(
        lambda x: m.last(m.middle(x).relu()), x, **kwargs)


@pytest.mark.parametrize('reentrant', (False, True))
def test_checkpoints(reentrant):
    original = torch.utils.checkpoint.CheckpointFunction
    assert predictions(
        partial(checkpointed, use_reentrant=reentrant),
        first=conv(3),
        middle=conv(),
        last=conv()) == {'last'}
    assert torch.utils.checkpoint.CheckpointFunction is original


def test_shared_head_over_levels():
    assert predictions(
        lambda m, x: [
            m.cls(m.tower(x).relu())
            for x in (m.first(x), F.max_pool2d(m.first(x), 2))
        ],
        first=conv(3),
        tower=conv(),
        cls=conv()) == {'cls'}


@dataclass
class Outputs:
    logits: torch.Tensor
    labels: list


def test_nested_outputs():
    assert predictions(
        lambda m, x: dict(
            a=[Outputs(m.cls(m.first(x)), ['a'])], b=(m.reg(m.first(x)), None)
        ),
        first=conv(3),
        cls=conv(),
        reg=conv()) == {'cls', 'reg'}


def test_detached_predictions():
    """Proposals: what is sampled there is no function of them."""

    def forward(m, x):
        x = m.first(x)
        peak = m.rpn(x).detach().amax()
        return m.cls(x * (x < peak))

    assert predictions(
        forward, first=conv(3), rpn=conv(), cls=conv()) == {'rpn', 'cls'}


def test_without_gradients():
    """A teacher is not looked into; nor is a model that is one."""

    def forward(m, x):
        with torch.no_grad():
            target = m.teacher(x)
        return F.mse_loss(m.student(m.first(x)), target)

    layers = dict(teacher=conv(3), first=conv(3), student=conv())
    assert predictions(forward, **layers) == {'student'}
    net = Net(torch.no_grad()(lambda m, x: m.first(x)), first=conv(3))
    assert trace(net) == (set(), set())


def test_no_activations_are_kept():
    """So that they are not there to compute gradients from."""
    net = nn.Sequential(conv(3), nn.ReLU(), conv())

    def run():
        y = net(torch.rand(1, 3, 8, 8))
        with pytest.raises(RuntimeError, match='forward pass'):
            torch.autograd.grad(y.sum(), net[0].weight)
        return y

    assert trace(net, run).predictions == {'2'}


def test_hooks_go_when_the_model_fails():
    net = Net(lambda m, x: m.missing(x), first=conv(3))
    net.first.requires_grad_(False)
    with pytest.raises(AttributeError, match='missing'):
        trace(net)
    assert not net.first._forward_hooks
    assert not net.first.weight.requires_grad


# -------------------------------------------------- networks without a head
def residual(m, x):
    x = m.stem(x)
    for block in (m.one, m.two):
        x = (x + block(x)).relu()
    return x


def block():
    return nn.Sequential(conv(), nn.ReLU(), conv())


def test_residual_stream():
    layers = dict(stem=conv(3), one=block(), two=block())
    assert predictions(residual, **layers) == {'two.2'}
    assert predictions(
        lambda m, x: m.head(residual(m, x)), head=conv(),
        **layers) == {'head'}


def test_dense_block():

    def forward(m, x):
        x = m.stem(x)
        x = torch.cat([x, m.one(x)], 1)
        return torch.cat([x, m.two(x)], 1)

    assert predictions(
        forward, stem=conv(3), one=conv(), two=conv(8)) == {'two'}


def test_losses_count_all():
    """A prediction that another one is made from is one, too."""

    def forward(m, x):
        x = m.stem(x)
        coarse = m.coarse(x)
        return coarse.sum() + m.fine(torch.cat([x, coarse], 1)).sum()

    assert predictions(
        forward, stem=conv(3), coarse=conv(),
        fine=conv(8)) == {'coarse', 'fine'}


# ----------------------------------------------------------------- sampling
def shifted(m, x):
    x = m.stem(x)
    shift = m.shift(m.tower(x))[:, :2].permute(0, 2, 3, 1)
    return m.cls(F.grid_sample(x, shift.tanh(), align_corners=False))


def tv_deformed(m, x):
    x = m.stem(x)
    return m.cls(m.deform(x, m.shift(m.tower(x)), m.mask(x).sigmoid()))


def mm_deformed(m, x):
    x = m.stem(x)
    return m.cls(m.deform(x, m.shift(m.tower(x))))


def regions(m, x):
    x = m.stem(x)
    boxes = F.pad(m.shift(m.tower(x)).mean((2, 3))[:, :4].sigmoid(), (1, 0))
    boxes = torch.cat([boxes[:, :3], boxes[:, 1:3] + 1], 1)
    return m.cls(torchvision.ops.roi_align(x, boxes, 3))


SAMPLING = {
    'grid': (shifted, dict),
    'torchvision': (tv_deformed, lambda: dict(
        deform=torchvision.ops.DeformConv2d(4, 4, 3, padding=1),
        mask=conv(4, 9))),
    'mmcv':
    (mm_deformed, lambda: dict(deform=DeformConv2d(4, 4, 3, padding=1))),
    'regions': (regions, dict),
}


@pytest.mark.parametrize('name', SAMPLING)
def test_offsets(name, request):
    if name in ('torchvision', 'regions'):
        request.getfixturevalue('torchvision_ops')
    forward, build = SAMPLING[name]
    net = Net(
        forward,
        stem=conv(3),
        tower=conv(),
        shift=conv(4, 18),
        cls=conv(),
        **build())
    mask = {'mask'} if hasattr(net, 'mask') else set()
    assert trace(net) == ({'cls'}, {'shift'} | mask)


def test_packed_offsets():
    net = Net(
        lambda m, x: m.cls(m.deform(m.stem(x))),
        stem=conv(3),
        deform=ModulatedDeformConv2dPack(4, 4, 3, padding=1),
        cls=conv())
    assert trace(net) == ({'cls'}, {'deform.conv_offset'})


@pytest.mark.parametrize('function, names', [
    (DeformConv2dFunction, ['offset']),
    (ModulatedDeformConv2dFunction, ['offset', 'mask']),
    (DeformRoIPoolFunction, ['rois', 'offset']),
    (RoIAlignFunction, ['rois']),
    (MultiScaleDeformableAttnFunction,
     ['sampling_locations', 'attention_weights']),
])
def test_operands_of_operators(function, names):
    """Also of those that run on a GPU only."""
    context, *operands = inspect.signature(function.forward).parameters
    node = SimpleNamespace(name=lambda: f'{function.__name__}Backward')
    assert [operands[i] for i in _sampling_operands(node)] == names


def test_reference_points():
    """What others sample at, and is part of a prediction, does not count as
    a feature of it."""

    def forward(m, x):
        x = m.stem(x)
        points = m.points(x)
        grid = points[:, :2].permute(0, 2, 3, 1)
        return points + m.reg(F.grid_sample(x, grid, align_corners=False))

    net = Net(forward, stem=conv(3), points=conv(), reg=conv())
    assert trace(net) == ({'points', 'reg'}, {'points'})
