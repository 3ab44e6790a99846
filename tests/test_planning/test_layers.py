# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule

from mmbasis.layers import BasisLayer, ConvKind, ConvTransposeKind, LinearKind
from mmbasis.planning import Reason, check_finite, find_layers


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = ConvModule(3, 8, 3, norm_cfg=dict(type='BN'))
        self.blocks = nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1),
            nn.ConvTranspose2d(12, 6, 2))
        self.head = nn.ModuleDict(dict(fc=nn.Linear(6, 10)))


def obstacles(model):
    """Why layers can never be compressed; empty where they can."""
    return {
        x.name: x.obstacle.words if x.obstacle else ''
        for x in find_layers(model)
    }


def test_names_kinds_and_obstacles():
    layers = find_layers(Net())
    assert [(layer.name, layer.kind) for layer in layers] == [
        ('stem.conv', ConvKind),
        ('blocks.0', ConvKind),
        ('blocks.1', ConvKind),
        ('blocks.2', ConvTransposeKind),
        ('head.fc', LinearKind),
    ]
    assert 'depthwise' in layers[1].obstacle.words
    assert layers[1].obstacle.reason is Reason.UNSUPPORTED
    assert [x.name for x in layers if x.obstacle] == ['blocks.0']


def test_shared_layer_is_listed_once():
    model = Net()
    model.again = model.blocks[1]
    layers = find_layers(model)
    assert [layer.name for layer in layers].count('blocks.1') == 1
    assert 'again' not in [layer.name for layer in layers]
    assert all(layer.obstacle is None for layer in layers
               if layer.name == 'blocks.1')


def test_tied_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    assert obstacles(model) == {
        '0': 'shares its parameters with 2',
        '1': '',
        '2': 'shares its parameters with 0'
    }
    assert find_layers(model)[0].obstacle.reason is Reason.TIED


def test_tied_to_a_module_of_another_kind():
    model = nn.ModuleDict(
        dict(words=nn.Embedding(10, 6), scores=nn.Linear(6, 10, bias=False)))
    model.scores.weight = model.words.weight
    layer, = find_layers(model)
    assert layer.obstacle.words == 'shares its parameters with words'


def test_tied_bias():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(4, 6, 1))
    model[1].bias = model[0].bias
    assert all('shares' in words for words in obstacles(model).values())
    assert len(obstacles(model)) == 2


def test_basis_layers_are_not_looked_into():
    model = nn.Sequential(
        BasisLayer(nn.Conv2d(4, 6, 3), 2), nn.Conv2d(6, 6, 3))
    assert [layer.name for layer in find_layers(model)] == ['1']


# ------------------------------------------------------------------ checks
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_broken_weights_are_named(value):
    model = Net()
    check_finite(model)
    with torch.no_grad():
        model.blocks[1].weight[3, 2] = value
    with pytest.raises(ValueError, match=r'infinite in blocks\.1\.weight \('):
        check_finite(model)


@pytest.mark.parametrize('key', ['weight', 'bias', 'running_mean',
                                 'running_var'])
def test_broken_statistics_are_named(key):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check_finite(model)
    with torch.no_grad():
        getattr(model[1], key)[2] = float('nan')
    with pytest.raises(ValueError, match=rf'infinite in 1\.{key} \(1 tensors'):
        check_finite(model)


def test_weights_of_a_class_of_their_own_are_not_lazy():
    """``isinstance`` takes every such parameter for one of a lazy layer, but
    for the newest torch."""

    class Own(torch.Tensor):
        pass

    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Own))
    assert find_layers(net)[0].obstacle is None


def test_lazy_layers_do_no_harm():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LazyConv2d(6, 3))
    layers = find_layers(model)
    check_finite(model)
    assert 'lazy' in layers[1].obstacle.words


def test_layers_that_are_not_saved_stay_dense():
    model = Net()
    # as mmpretrain's LoRAModel does around its module
    model.blocks._register_state_dict_hook(
        lambda module, state_dict, prefix, _: [
            state_dict.pop(key) for key in list(state_dict)
            if key.startswith(prefix)
        ])
    found = obstacles(model)
    assert 'checkpoints' in found['blocks.1']
    assert 'depthwise' in found['blocks.0']
    assert found['stem.conv'] == found['head.fc'] == ''
    # a model that is a layer itself
    assert find_layers(nn.Linear(2, 3))[0].obstacle is None
