# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmcv.ops import DeformConv2d, DeformConv2dPack

from mmbasis.layers import (BasisLayer, ConvKind, ConvTransposeKind,
                            DeformConvKind, LinearKind)
from mmbasis.planning import check_finite, find_layers
from mmbasis.planning.layers import choose_layers
from mmbasis.running.graph import Targets


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = ConvModule(3, 8, 3, norm_cfg=dict(type='BN'))
        self.blocks = nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1),
            nn.ConvTranspose2d(12, 6, 2))
        self.head = nn.ModuleDict(dict(fc=nn.Linear(6, 10)))


def reasons(model, **kwargs):
    layers = find_layers(model)
    targets = Targets({'head.fc'}, {'conv2_offset'})
    choose_layers(model, layers, targets=targets, **kwargs)
    return {layer.name: layer.reason for layer in layers}


def test_names_kinds_and_reasons():
    layers = find_layers(Net())
    assert [(layer.name, layer.kind) for layer in layers] == [
        ('stem.conv', ConvKind),
        ('blocks.0', ConvKind),
        ('blocks.1', ConvKind),
        ('blocks.2', ConvTransposeKind),
        ('head.fc', LinearKind),
    ]
    assert 'depthwise' in layers[1].reason
    assert all(layer.compressible for i, layer in enumerate(layers) if i != 1)


def test_shared_layer_is_listed_once():
    model = Net()
    model.again = model.blocks[1]
    layers = find_layers(model)
    assert [layer.name for layer in layers].count('blocks.1') == 1
    assert 'again' not in [layer.name for layer in layers]
    assert all(layer.compressible for layer in layers
               if layer.name == 'blocks.1')


def test_tied_weights_are_left_alone():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    layers = find_layers(model)
    assert layers[0].reason == 'shares its parameters with 2'
    assert layers[1].reason == ''
    assert layers[2].reason == 'shares its parameters with 0'


def test_tied_to_a_module_of_another_kind():
    model = nn.ModuleDict(
        dict(words=nn.Embedding(10, 6), scores=nn.Linear(6, 10, bias=False)))
    model.scores.weight = model.words.weight
    layer, = find_layers(model)
    assert layer.reason == 'shares its parameters with words'


def test_tied_bias():
    model = nn.Sequential(nn.Linear(4, 6), nn.Conv2d(4, 6, 1))
    model[1].bias = model[0].bias
    assert [layer.compressible for layer in find_layers(model)] == [False] * 2


def test_basis_layers_are_not_looked_into():
    model = nn.Sequential(
        BasisLayer(nn.Conv2d(4, 6, 3), 2), nn.Conv2d(6, 6, 3))
    assert [layer.name for layer in find_layers(model)] == ['1']


# ---------------------------------------------------------------- patterns
def test_prediction_layers_stay_dense_by_default():
    assert reasons(Net())['head.fc'] == 'prediction layer'
    assert reasons(Net(), prediction_layers=True)['head.fc'] == ''


def test_prediction_layers_can_be_included():
    assert reasons(Net(), include=[r'head\.fc'])['head.fc'] == ''
    assert reasons(Net(), include=['Linear'])['head.fc'] == ''


class Deformable(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv1 = DeformConv2dPack(4, 8, 3, padding=1)
        self.conv2_offset = nn.Conv2d(8, 18, 3, padding=1)
        self.conv2 = DeformConv2d(8, 8, 3, padding=1)


@pytest.mark.parametrize('asked', [
    dict(),
    dict(prediction_layers=True),
    dict(include=['.*']),
])
def test_offset_branches(asked):
    """One inside a layer goes where the layer goes, and stays dense whatever
    is asked for."""
    model = Deformable()
    kinds = {layer.name: layer.kind for layer in find_layers(model)}
    assert kinds['conv1'] is kinds['conv2'] is DeformConvKind
    assert reasons(model, **asked) == {
        'conv1': '',
        'conv1.conv_offset': 'offset branch',
        'conv2_offset': '' if asked else 'offset branch',
        'conv2': ''
    }


def test_lists_with_gaps():
    """HRNet has None where a branch meets itself."""
    model = nn.Module()
    model.fuse_layers = nn.ModuleList(
        [nn.Conv2d(8, 8, 1), None,
         nn.Conv2d(8, 8, 1), None])
    assert reasons(model) == {'fuse_layers.0': '', 'fuse_layers.2': ''}


def test_include_by_regular_expression():
    found = reasons(Net(), include=[r'blocks\.\d', 'stem.*'])
    assert found['stem.conv'] == found['blocks.1'] == found['blocks.2'] == ''
    assert 'depthwise' in found['blocks.0']
    assert found['head.fc'] == 'not included'


def test_a_pattern_must_match_the_whole_name():
    with pytest.raises(ValueError, match="include: the pattern 'blocks'"):
        reasons(Net(), include=['blocks'])


@pytest.mark.parametrize('pattern, left_out', [
    ('ConvModule', ['stem.conv']),
    ('ConvTranspose2d', ['blocks.2']),
    ('Sequential', ['blocks.1', 'blocks.2']),
    ('Linear', ['head.fc']),
    (r'.*\.conv', ['stem.conv']),
])
def test_exclude_by_name_or_class(pattern, left_out):
    found = reasons(Net(), exclude=[pattern], prediction_layers=True)
    named = [k for k, v in found.items() if v == f'excluded by {pattern!r}']
    assert named == left_out


def test_exclude_wins_over_include():
    found = reasons(Net(), include=['blocks.*'], exclude=['.*2'])
    assert found['blocks.1'] == '' and 'excluded' in found['blocks.2']


@pytest.mark.parametrize('key', ['include', 'exclude'])
def test_pattern_without_match(key):
    with pytest.raises(ValueError) as error:
        reasons(Net(), **{key: ['stem.*', 'neck.*']})
    assert f"{key}: the pattern 'neck.*' matches none" in str(error.value)
    assert 'stem.conv' in str(error.value)


def test_pattern_that_is_no_regular_expression():
    with pytest.raises(ValueError, match='not a regular expression'):
        reasons(Net(), exclude=['blocks(['])


# ------------------------------------------------------------------ checks
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_broken_weights_are_named(value):
    model = Net()
    check_finite(find_layers(model))
    with torch.no_grad():
        model.blocks[1].weight[3, 2] = value
    with pytest.raises(ValueError, match=r'NaN or infinite in blocks\.1'):
        check_finite(find_layers(model))


def test_lazy_layers_do_no_harm():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.LazyConv2d(6, 3))
    layers = find_layers(model)
    check_finite(layers)
    assert 'lazy' in layers[1].reason


def test_layers_that_are_not_saved_stay_dense():
    model = Net()
    # as mmpretrain's LoRAModel does around its module
    model.blocks._register_state_dict_hook(
        lambda module, state_dict, prefix, _: [
            state_dict.pop(key) for key in list(state_dict)
            if key.startswith(prefix)
        ])
    found = {layer.name: layer.reason for layer in find_layers(model)}
    assert 'checkpoints' in found['blocks.1']
    assert 'depthwise' in found['blocks.0']
    assert found['stem.conv'] == found['head.fc'] == ''
    # a model that is a layer itself
    assert find_layers(nn.Linear(2, 3))[0].reason == ''
