# Copyright (c) mmbasis authors. All rights reserved.
"""Export of families that merge their branches for deployment: the graph holds
what the plan says, and computes what the compressed model computes."""
import mmpretrain.models  # noqa: F401
import pytest
from mmengine.registry import MODELS
from mmpretrain.models.backbones.levit import LeViT

from mmbasis.compression import merging, surgery
from mmbasis.compression.merging import MERGING_METHODS
from mmbasis.deploy import Deployment, check_weights, compare
from mmbasis.layers import BasisLayer

CLS = 'classification_onnxruntime_static-32x32'


@MODELS.register_module(force=True)
class TinyLeViT(LeViT):
    """One of two stages: LeViT takes no dictionary."""
    arch_zoo = dict(
        tiny=dict(embed_dims=[16, 24], num_heads=[2, 2], depths=[1, 1],
                  key_dims=[8, 8]))


REPVGG = dict(
    num_blocks=[1, 2, 1, 1], width_factor=[.25, .25, .25, .125],
    group_layer_map=None, se_cfg=None, stem_channels=16)
# backbone, channels of its output, side of the image
FAMILIES = dict(
    RepVGG=(dict(type='RepVGG', arch=REPVGG), 64, 32),
    # compressed in the form that it is deployed in
    RepVGG_deployed=(dict(type='RepVGG', arch=REPVGG, deploy=True), 64, 32),
    MobileOne=(dict(
        type='MobileOne',
        arch=dict(num_blocks=[1, 2, 1, 1], width_factor=[.5, .5, .25, .125],
                  num_conv_branches=[2, 2, 2, 2],
                  num_se_blocks=[0, 1, 0, 1])), 64, 32),
    RepLKNet=(dict(
        type='RepLKNet',
        arch=dict(large_kernel_sizes=[7, 7, 5, 5], layers=[1, 1, 1, 1],
                  channels=[16, 16, 32, 32], small_kernel=3, dw_ratio=1)),
        32, 64),
    RepMLP=(dict(
        type='RepMLPNet', img_size=32, reparam_conv_kernels=(1, 3),
        out_indices=(1, ),
        arch=dict(channels=[16, 32], depths=[2, 2], sharesets_nums=[1, 4])),
        32, 32),
    LeViT=(dict(type='TinyLeViT', arch='tiny', img_size=64), 24, 64),
    TinyViT=(dict(
        type='TinyViT', img_size=(64, 64), window_size=[4, 4, 4, 2],
        arch=dict(channels=[16, 16, 32, 32], num_heads=[1, 1, 2, 2],
                  depths=[1, 1, 1, 1])), 32, 64),
    RIFormer=(dict(
        type='RIFormer',
        arch=dict(layers=[1, 1, 1, 1], embed_dims=[12, 16, 24, 32],
                  mlp_ratios=[2, 2, 2, 2], layer_scale_init_value=.5)),
        32, 64),
    EdgeNeXt=(dict(
        type='EdgeNeXt',
        arch=dict(channels=[16, 16, 32, 32], depths=[1, 1, 1, 1],
                  num_heads=[2, 2, 2, 2])), 32, 64))


@pytest.fixture
def make_family(make_classifier):
    """Function that compresses a small model of a family; with it, an
    image."""

    def make(family):
        backbone, channels, side = FAMILIES[family]

        def change(model):
            model.backbone = backbone
            model.head.update(in_channels=channels, num_classes=5)
            if family == 'LeViT':
                model.head.update(type='LeViTClsHead', distillation=True)
            if family in ('TinyViT', 'EdgeNeXt'):  # they pool themselves
                model.neck = None

        return make_classifier(change, side, type='RatioPlanner', ratio=.6)

    return make


def of_side(deploy_cfg, family):
    return deploy_cfg(CLS, FAMILIES[family][2])


def merging_blocks(model):
    """Whether modules that can merge their branches hold basis layers."""
    return any(
        isinstance(x, BasisLayer) for module in model.modules()
        if any(hasattr(type(module), m) for m in MERGING_METHODS)
        for x in module.modules())


@pytest.mark.parametrize('family', FAMILIES)
def test_graph_holds_the_plan(family, make_family, deploy_cfg, tmp_path):
    found, image = make_family(family)
    deployment = Deployment(of_side(deploy_cfg, family), found.config,
                            found.checkpoint)
    assert merging_blocks(deployment.model) or family == 'EdgeNeXt'
    files = deployment.export(image, str(tmp_path))
    weights = check_weights(deployment, files)
    assert weights['unused'] == []
    assert weights['planned'] == sum(
        x.numel() for m in deployment.model.modules()
        if isinstance(m, BasisLayer) for x in m.weights)
    result, = compare(deployment, files, [image])
    assert result['agrees'] and result['head']['values'] >= 5, result


def test_merged_layers_are_an_error(make_family, deploy_cfg, tmp_path,
                                    monkeypatch):
    """Branches merge, were it not for mmbasis, into dense layers."""
    found, image = make_family('RepVGG')
    deployment = Deployment(of_side(deploy_cfg, 'RepVGG'), found.config,
                            found.checkpoint)
    right = deployment.export(image, str(tmp_path / 'right'))
    monkeypatch.setattr(surgery, 'keep_structure', lambda model: [])
    wrong = deployment.export(image, str(tmp_path / 'wrong'))
    with pytest.raises(RuntimeError, match='merged .* basis layers before'):
        check_weights(deployment, wrong)
    monkeypatch.setattr(surgery, 'keep_structure', merging.keep_structure)
    with pytest.raises(RuntimeError, match='does not hold the basis layer b'):
        check_weights(deployment, wrong)
    assert check_weights(deployment, right)['unused'] == []
