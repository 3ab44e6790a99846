# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch.nn as nn
from mmcv.cnn import ConvModule
from mmcv.ops import DeformConv2d, DeformConv2dPack

from mmbasis.layers import DeformConvKind
from mmbasis.planning import Reason, Rules, find_layers
from mmbasis.planning.layers import OFFSETS, PREDICTION, UNUSED
from mmbasis.running import Targets


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = ConvModule(3, 8, 3, norm_cfg=dict(type='BN'))
        self.blocks = nn.Sequential(
            nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1),
            nn.ConvTranspose2d(12, 6, 2))
        self.head = nn.ModuleDict(dict(fc=nn.Linear(6, 10)))


TARGETS = Targets({'head.fc'}, {'conv2_offset'})


def select(model, **rules):
    rules = {k: v if k == 'prediction_layers' else tuple(v)
             for k, v in rules.items()}
    return Rules(**rules).select(find_layers(model), TARGETS)


def reasons(model, **rules):
    """Why layers stay dense, in words; empty for those that are chosen."""
    selection = select(model, **rules)
    return {
        x.name: getattr(selection.excluded.get(x.name), 'words', '')
        for x in selection.layers
    }


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


# --------------------------------------------------------------- selections
def test_reasons_are_for_programs_too():
    excluded = select(Net(), exclude=['stem.*']).excluded
    assert excluded['stem.conv'].reason is Reason.EXCLUDED
    assert excluded['blocks.0'].reason is Reason.UNSUPPORTED
    assert excluded['head.fc'] is PREDICTION
    assert select(Net(), include=['stem.*']).excluded['head.fc'].reason is (
        Reason.NOT_INCLUDED)
    assert select(Deformable()).excluded['conv2_offset'] is OFFSETS


def test_chosen_layers_in_order():
    assert [x.name for x in select(Net()).chosen
            ] == ['stem.conv', 'blocks.1', 'blocks.2']


def test_the_first_reason_stays():
    before = select(Net())
    after = before.without({'head.fc': UNUSED, 'stem.conv': UNUSED})
    assert after.excluded['head.fc'] is PREDICTION
    assert after.excluded['stem.conv'] is UNUSED
    assert 'stem.conv' not in before.excluded


@pytest.mark.parametrize('rules, needed', [
    (dict(), True),
    (dict(exclude=('stem.*', )), True),
    (dict(include=('stem.*', )), False),
    (dict(prediction_layers=True), False),
])
def test_targets_that_are_not_needed_are_not_looked_at(rules, needed):
    rules = Rules(**rules)
    assert rules.need_targets == needed
    if not needed:
        rules.select(find_layers(Net()), None)
