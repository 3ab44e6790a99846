# Copyright (c) mmbasis authors. All rights reserved.
"""Deployment of compressed models that merge their branches."""
import copy
import pickle

import mmcv.cnn
import mmpretrain.models  # noqa: F401
import pytest
import torch
import torch.nn as nn
from mmdet.models.necks import FPG
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.models.backbones import RepLKNet, RepMLPNet, RepVGG, RIFormer
from mmpretrain.models.backbones.levit import LeViT
from mmpretrain.models.backbones.mobileone import MobileOne
from mmpretrain.models.backbones.tinyvit import ConvBN2d, TinyViT
from mmpretrain.models.heads import LeViTClsHead
from torch.nn.modules.batchnorm import _BatchNorm

from mmbasis.compression import apply_plan, basis_layers, get_plan
from mmbasis.compression.merging import keep_structure
from mmbasis.compression.surgery import densified
from mmbasis.layers import BasisLayer, kind_of, why_not
from mmbasis.models import BasisModel, build_compressed
from mmbasis.planning import CompressionPlan, LayerPlan

REPVGG = dict(
    arch=dict(
        num_blocks=[1, 2, 1, 1],
        width_factor=[.125, .125, .125, .125],
        group_layer_map=None,
        se_cfg=None,  # which its deployed form leaves out
        stem_channels=8))


class SmallLeViT(LeViT):  # which takes no dictionary
    arch_zoo = dict(
        small=dict(
            embed_dims=[16, 24],
            num_heads=[2, 2],
            depths=[1, 1],
            key_dims=[8, 8]))


MOBILEONE = dict(
    num_blocks=[1, 2, 1, 1],
    width_factor=[.25, .25, .125, .0625],
    num_conv_branches=[2, 2, 2, 2],
    num_se_blocks=[0, 1, 0, 1])
REPLKNET = dict(
    large_kernel_sizes=[7, 7, 5, 5],
    layers=[1, 1, 1, 1],
    channels=[8, 8, 16, 16],
    small_kernel=3,
    dw_ratio=1)
REPMLP = dict(channels=[8, 16], depths=[2, 2], sharesets_nums=[1, 4])
RIFORMER = dict(
    layers=[1, 1, 1, 1],
    embed_dims=[8, 12, 16, 20],
    mlp_ratios=[2, 2, 2, 2],
    layer_scale_init_value=.5)
# a model, the side of its input
FAMILIES = {
    'RepVGG': (lambda: RepVGG(**REPVGG), 32),
    'MobileOne': (lambda: MobileOne(MOBILEONE), 32),
    'RepLKNet': (lambda: RepLKNet(REPLKNET), 64),
    'RepMLP': (lambda: RepMLPNet(
        REPMLP, img_size=16, out_indices=(1, ), reparam_conv_kernels=(1, 3)),
               16),
    'LeViT': (lambda: SmallLeViT('small', img_size=64), 64),
    'RIFormer': (lambda: RIFormer(RIFORMER, out_indices=(6, )), 64),
}
every_family = pytest.mark.parametrize('family', FAMILIES)


def randomise(model):
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, std=.3)
            nn.init.uniform_(module.running_var, .5, 2)
        if isinstance(module, (_BatchNorm, nn.GroupNorm)):
            nn.init.uniform_(module.weight, .5, 1.5)
            nn.init.normal_(module.bias, std=.3)
        for name, parameter in module.named_parameters(recurse=False):
            if 'layer_scale' in name:
                nn.init.uniform_(parameter, .3, 1)


def build(family):
    torch.manual_seed(0)
    function, side = FAMILIES[family]
    model = function()
    randomise(model)
    model.eval()  # apart: some override it without a result
    return model, torch.rand(2, 3, side, side)


FORMS = ['output', 'input', 'both', 'spatial']


def a_plan(model, chosen=lambda name: True, norm=False, form='output'):
    """Layers that can be, at half of their full rank, with a bias; those that
    take no input basis in output form."""
    if chosen == 'later':
        names = list(a_plan(model).layers)
        chosen = names[len(names) // 2:].__contains__
    layers = {}
    for name, module in model.named_modules():
        if name and why_not(module) is None and chosen(name):
            kind = kind_of(module)
            full = min(kind.matrix_shape(module)[1:])
            rank, inputs = (full + 1) // 2, None
            spatial = form == 'spatial' and not kind.why_not_spatial(module)
            if form in ('input', 'both') and not kind.why_one_sided(module):
                inputs = kind.in_channels(module)
                rank = None if form == 'input' else rank
            layers[name] = LayerPlan(rank, full, kind.name,
                                     list(module.weight.shape), True, 1.,
                                     [2., 1.], [2, 1], inputs, spatial)
    assert layers
    return CompressionPlan(layers, {}, norm)


def compress(model, chosen=lambda name: True, norm=False, form='output'):
    # projecting takes time, and any weights will do
    apply_plan(model, a_plan(model, chosen, norm, form), project=False)
    for _, layer in basis_layers(model):
        layer.basis.reset_parameters()
        nn.init.normal_(layer.last.bias, std=.3)
    randomise(model)
    model.eval()
    return model


def outputs(model, x):
    with torch.no_grad():
        y = model(x)
    y = y if isinstance(y, (tuple, list)) else [y]
    return torch.cat([part.flatten() for part in y])


def assert_same(actual, expected):
    assert (actual - expected).norm() <= 1e-4 * expected.norm()
    assert expected.norm() > 0


def structure(model):
    return {
        name: [weight.shape for weight in layer.weights]
        for name, layer in basis_layers(model)
    }


@every_family
@pytest.mark.parametrize('form, norm', [(form, norm) for form in FORMS
                                        for norm in (False, True)
                                        if form in ('output', 'both')
                                        or not norm])
@pytest.mark.parametrize('chosen', [lambda name: True, 'later'],
                         ids=['all', 'later'])
def test_function_and_structure_stay(family, chosen, norm, form):
    model, x = build(family)
    compress(model, chosen, norm, form)
    expected, before = outputs(model, x), structure(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for net in (model, *copies):
        net.switch_to_deploy()
        if family != 'RepMLP':  # whose dense blocks cannot do it twice
            net.switch_to_deploy()
        assert_same(outputs(net, x), expected)
        assert structure(net) == before
        assert all(layer.norm is None for _, layer in basis_layers(net))


@every_family
def test_dense_blocks_are_merged(family):
    """All that are merged in the dense model and hold no basis layers."""
    model, x = build(family)
    merged = copy.deepcopy(model)
    merged.switch_to_deploy()
    assert_same(outputs(merged, x), outputs(model, x))  # the test is right
    names = dict(merged.named_modules())
    compress(model, 'later')
    expected = outputs(model, x)
    model.switch_to_deploy()
    assert_same(outputs(model, x), expected)
    merged_blocks = kept_blocks = 0
    for name, module in model.named_modules():
        if type(module).__name__ in (
                'RepVGGBlock', 'MobileOneBlock', 'ReparamLargeKernelConv',
                'RepMLPBlock', 'RIFormerBlock'):
            own = {k for k, _ in module.named_modules()}
            theirs = {k for k, _ in names[name].named_modules()}
            if any(True for _ in basis_layers(module)):
                kept_blocks += 1
                assert own != theirs
            else:
                merged_blocks += 1
                assert own == theirs
    if family == 'LeViT':
        kinds = [type(x) for x in model.modules()]
        kept_blocks = sum(x.__name__.endswith('BatchNorm') for x in kinds)
        merged_blocks = sum(
            isinstance(x, (nn.Conv2d, nn.Linear)) and x.bias is not None
            for x in model.modules())
    assert merged_blocks and (kept_blocks or family == 'RepLKNet')


@every_family
def test_densified_models_are_merged_as_ever(family):
    model, x = build(family)
    dense = densified(compress(model, 'later', norm=True))
    expected, count = outputs(dense, x), len(list(dense.modules()))
    if family in ('RepVGG', 'MobileOne', 'RepMLP', 'LeViT'):
        # mergers expect convolutions without a bias
        for module in dense.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.bias = None
        expected = outputs(dense, x)
    dense.switch_to_deploy()
    assert_same(outputs(dense, x), expected)
    assert len(list(dense.modules())) < count


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('family, method', [('RepVGG', 'switch_to_deploy'),
                                            ('MobileOne', 'switch_to_deploy'),
                                            ('RIFormer', 'switch_to_deploy'),
                                            ('RepMLP', 'local_inject'),
                                            ('RepLKNet', 'merge_kernel')])
def test_a_single_block(family, method, norm):
    model, x = build(family)
    compress(model, norm=norm)
    expected, before = outputs(model, x), structure(model)
    blocks = [
        m for m in model.modules()
        if m is not model and hasattr(type(m), method)
    ]
    assert len(blocks) > 1
    for block in blocks:
        getattr(block, method)()
        assert_same(outputs(model, x), expected)
    assert structure(model) == before


def test_a_deployed_form_is_compressed_whole():
    model, x = build('RepVGG')
    model.switch_to_deploy()
    compress(model, norm=True)
    expected, before = outputs(model, x), structure(model)
    assert any('branch_reparam' in name for name in before)
    model.switch_to_deploy()
    assert_same(outputs(model, x), expected)
    assert structure(model) == before


@pytest.mark.parametrize('norm', [False, True])
def test_head_of_levit(norm):
    loss = dict(type='mmpretrain.CrossEntropyLoss')
    head = LeViTClsHead(12, in_channels=16, loss=loss)
    compress(head, norm=norm)
    x = (torch.rand(3, 16), )
    expected, before = outputs(head, x), structure(head)
    assert len(before) == 2
    head.switch_to_deploy()
    assert_same(outputs(head, x), expected)
    assert structure(head) == before


def test_tinyvit():
    """It has blocks that can be merged, and nothing that merges them."""
    model = TinyViT(
        dict(channels=[8, 8, 16, 16], num_heads=[1, 1, 2, 2],
             depths=[1, 1, 1, 1]),
        img_size=(64, 64),
        window_size=[4, 4, 4, 2])
    compress(model, norm=True)
    x = torch.rand(2, 3, 64, 64)
    expected, kept = outputs(model, x), 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ConvBN2d) and any(
                    True for _ in basis_layers(child)):
                setattr(parent, name, child.fuse())
                kept += 1
    assert kept
    assert_same(outputs(model, x), expected)


CLASSIFIER = dict(
    type='mmpretrain.ImageClassifier',
    backbone=dict(type='mmpretrain.RepVGG', **REPVGG),
    neck=dict(type='mmpretrain.GlobalAveragePooling'),
    head=dict(
        type='mmpretrain.LinearClsHead',
        num_classes=5,
        in_channels=64,
        loss=dict(type='mmpretrain.CrossEntropyLoss')))


@pytest.mark.parametrize('norm', [False, True])
def test_built_from_a_plan(norm):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    trained = MODELS.build(copy.deepcopy(CLASSIFIER))
    trained.head.fc.weight.data.normal_()
    compress(trained, norm=norm)
    model = build_compressed(copy.deepcopy(CLASSIFIER), get_plan(trained))
    model.load_state_dict(trained.state_dict())
    x = torch.rand(2, 3, 32, 32)
    expected = outputs(model.eval(), x)
    assert_same(expected, outputs(trained, x))
    # as MMDeploy does
    model.backbone.switch_to_deploy()
    if norm:
        model.switch_to_deploy()
    assert_same(outputs(model, x), expected)
    assert structure(model) == structure(trained)
    assert all(layer.norm is None for _, layer in basis_layers(model))


@pytest.mark.parametrize('norm', [False, True])
def test_inside_the_wrapper(norm):
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    dense = MODELS.build(copy.deepcopy(CLASSIFIER))
    model = BasisModel(dense, plan=a_plan(dense, norm=norm))
    for _, layer in basis_layers(model):
        layer.basis.reset_parameters()
    randomise(model)
    model.head.fc.coefficients.weight.data.normal_()
    x = torch.rand(2, 3, 32, 32)
    expected, before = outputs(model.eval(), x), structure(model)
    clone = copy.deepcopy(model)
    for net in (model, clone):
        net.backbone.switch_to_deploy()
        assert_same(outputs(net, x), expected)
        assert structure(net) == before


def test_what_compresses_better_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(MMLogger, 'info', lambda _, text, *args: said.append(
        text % args))
    model, _ = build('RepVGG')
    apply_plan(model, a_plan(model))
    assert len([x for x in said if 'deploy=True' in x]) == 1
    said.clear()
    model, _ = build('RepLKNet')
    apply_plan(model, a_plan(model))
    assert not [x for x in said if 'deploy=True' in x]


def test_methods_that_merge_other_things():
    """FPG's ``fuse`` takes arguments."""

    class Neck(nn.Module):

        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 1)

        fuse = FPG.fuse

    neck = compress(Neck())
    assert keep_structure(neck) == []
    assert 'fuse' not in vars(neck)


class Hybrid(nn.Module):
    """Merges its parts, then what they have become."""

    def __init__(self, drop):
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 6, 1), ConvBN2d(6, 6)
        self.drop = drop

    def switch_to_deploy(self):
        if self.drop:
            self.conv = nn.Conv2d(3, 6, 1)
            self.conv.weight.data = self.conv.weight * 2


def test_basis_layers_are_not_merged_in_silence():
    compress(Hybrid(False)).switch_to_deploy()
    with pytest.raises(RuntimeError, match='Hybrid.switch_to_deploy.* merged'):
        compress(Hybrid(True)).switch_to_deploy()


# ----------------------------------------------------- mmcv's fuse_conv_bn
@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('second', [
    lambda: nn.Conv2d(6, 8, 3), lambda: nn.ConvTranspose2d(6, 8, 3),
    lambda: nn.Conv2d(6, 8, 3, groups=2)
])
def test_fuse_conv_bn_goes_into_the_right_layer(norm, second, form):
    torch.manual_seed(0)
    norm = norm and form != 'spatial'
    model = nn.Sequential(
        nn.Conv2d(4, 6, 3), second(), nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)))
    compress(model, lambda name: name == '1', norm, form)
    x = torch.rand(2, 4, 9, 9)
    expected, before = outputs(model, x), structure(model)
    assert mmcv.cnn.fuse_conv_bn(model) is model
    assert_same(outputs(model, x), expected)
    assert structure(model) == before
    assert isinstance(model[1], BasisLayer)
    assert not any(isinstance(x, _BatchNorm) for x in model.modules())
