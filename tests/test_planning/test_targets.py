# Copyright (c) mmbasis authors. All rights reserved.
"""What stays dense by default, in real heads, detectors and classifiers."""
from unittest.mock import patch

import pytest
import torch
import torch.nn as nn
from mmcv.ops import ModulatedDeformRoIPoolPack
from mmdet.testing import demo_mm_inputs
from mmengine.hub import get_config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from torchvision.models import resnet18

from mmbasis.compression import Recipe, analyze
from mmbasis.compression.pipeline import find_targets
from mmbasis.planning import Reason, Rules, find_layers
from mmbasis.running import Targets, adapter_of, trace_targets

# config, field of its model that is a head, number of levels
HEADS = {
    'retinanet': ('retinanet/retinanet_r50_fpn_1x_coco', 'bbox_head', 5),
    'rpn': ('faster_rcnn/faster-rcnn_r50_fpn_1x_coco', 'rpn_head', 5),
    'fcos': ('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 'bbox_head', 5),
    'atss': ('atss/atss_r50_fpn_1x_coco', 'bbox_head', 5),
    'gfl': ('gfl/gfl_r50_fpn_1x_coco', 'bbox_head', 5),
    'yolox': ('yolox/yolox_s_8xb8-300e_coco', 'bbox_head', 3),
    'rtmdet': ('rtmdet/rtmdet_tiny_8xb32-300e_coco', 'bbox_head', 3),
    'rtmdet_ins': ('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco', 'bbox_head', 3),
    'ssd300': ('ssd/ssd300_coco', 'bbox_head', 6),
    'ssdlite':
    ('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco', 'bbox_head', 6),
    'yolov3': ('yolo/yolov3_d53_8xb8-ms-608-273e_coco', 'bbox_head', 3),
    'yolof': ('yolof/yolof_r50-c5_8xb8-1x_coco', 'bbox_head', 1),
    'centernet':
    ('centernet/centernet_r18_8xb16-crop512-140e_coco', 'bbox_head', 1),
    'vfnet': ('vfnet/vfnet_r50_fpn_1x_coco', 'bbox_head', 5),
    'tood': ('tood/tood_r50_fpn_1x_coco', 'bbox_head', 5),
    'reppoints':
    ('reppoints/reppoints-moment_r50_fpn_1x_coco', 'bbox_head', 5),
    'guided_anchors':
    ('guided_anchoring/ga-retinanet_r50_fpn_1x_coco', 'bbox_head', 5),
    'fovea': ('foveabox/fovea_r50_fpn_4xb4-1x_coco', 'bbox_head', 5),
    'ddod': ('ddod/ddod_r50_fpn_1x_coco', 'bbox_head', 5),
    'solo': ('solo/solo_r50_fpn_1x_coco', 'mask_head', 5),
    'detr': ('detr/detr_r50_8xb2-150e_coco', 'bbox_head', 0),
    'dab_detr': ('dab_detr/dab-detr_r50_8xb2-50e_coco', 'bbox_head', 0),
    'dino': ('dino/dino-4scale_r50_8xb2-12e_coco', 'bbox_head', 0),
}


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
    yield
    init_default_scope('mmengine')


def build(config, field):
    """A head, and the channels of its inputs."""
    cfg = get_config(f'mmdet::{config}.py').model[field]
    torch.manual_seed(0)
    return MODELS.build(cfg), cfg.get('in_channels')


def outputs_of(name, head, channels, levels):
    """What a head returns for random features."""
    if levels:
        if isinstance(channels, int):
            channels = [channels] * levels
        sizes = [max(3, 32 >> i) for i in range(levels)]
        return head([torch.rand(1, c, s, s) for c, s in zip(channels, sizes)])
    stages = len(getattr(head, 'cls_branches', 'x'))
    hidden = torch.rand(stages, 1, 10, head.embed_dims)
    points = torch.rand(stages, 1, 10, 4)
    return head(hidden) if name == 'detr' else head(hidden, points)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for item in value for x in tensors(item)]


def last_layers(outputs, weights):
    """Names of the layers between which and an output there is no other.

    Args:
        outputs: Of the head.
        weights (dict): Name of the layer by id of its weight.
    """

    def weight(node):
        variable = getattr(node, 'variable', None)
        if variable is None and type(node).__name__ == 'TBackward0':
            return weight(node.next_functions[0][0])
        return weights.get(id(variable))

    found, seen = set(), set()
    nodes = [x.grad_fn for x in tensors(outputs)]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = [x for x, _ in node.next_functions if x is not None]
        names = {weight(x) for x in following} - {None}
        found |= names
        if not names:
            nodes += following
    return found


@pytest.mark.parametrize('name', HEADS)
def test_last_layers_of_heads_stay_dense(name):
    config, field, levels = HEADS[name]
    head, channels = build(config, field)
    model = nn.ModuleDict({field: head})
    layers = find_layers(model)
    weights = {id(x.module.weight): x.name for x in layers}

    def run():
        return outputs_of(name, head, channels, levels)

    truth = last_layers(run(), weights)
    targets = trace_targets(model, modules(layers), run)
    assert targets.predictions == truth

    excluded = Rules().select(layers, targets).excluded
    dense = set(excluded)
    assert truth and truth <= dense
    assert of_reason(excluded, Reason.PREDICTION) <= truth
    # most of the head is compressed all the same
    assert len(dense) < len(layers) or name in ('yolov3', 'ssd300', 'ssdlite')

    asked = Rules(prediction_layers=True).select(layers, targets).excluded
    assert not of_reason(asked, Reason.PREDICTION)


def of_reason(excluded, reason):
    return {name for name, x in excluded.items() if x.reason is reason}


def modules(layers):
    return {x.name: x.module for x in layers}


def detector(config, **parts):
    """A small detector, and a batch without annotations."""
    cfg = get_config(f'mmdet::{config}.py')
    channels = [64, 128, 256, 512][-len(cfg.model.neck.in_channels):]
    cfg.merge_from_dict({
        'model.backbone.depth': 18,
        'model.backbone.init_cfg': None,
        'model.neck.in_channels': channels,
        **parts
    })
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    return model, demo_mm_inputs(1, [(3, 96, 96)], num_items=[0])


def targets_of(model, data):
    return find_targets(adapter_of(model), find_layers(model), data)


def test_two_stages():
    """Proposals are detached, and no loss shows that they are predictions."""
    model, data = detector('mask_rcnn/mask-rcnn_r50_fpn_1x_coco')
    assert targets_of(model, data) == Targets(
        {
            'rpn_head.rpn_cls', 'rpn_head.rpn_reg',
            'roi_head.bbox_head.fc_cls', 'roi_head.bbox_head.fc_reg',
            'roi_head.mask_head.conv_logits'
        }, set())


def test_cascade():
    """Regions that the first stages refine are no features of the last."""
    model, data = detector('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco')
    found = targets_of(model, data)
    for stage in range(3):
        for layer in ('fc_cls', 'fc_reg'):
            name = f'roi_head.bbox_head.{stage}.{layer}'
            assert name in found.predictions | found.offsets


def test_queries():
    model, data = detector(
        'dino/dino-4scale_r50_8xb2-12e_coco', **{
            'model.encoder.num_layers': 1,
            'model.decoder.num_layers': 1,
            'model.num_queries': 10
        })
    predictions, offsets = targets_of(model, data)
    assert predictions == {
        f'bbox_head.{branch}.{stage}{last}'
        for branch, last in (('cls_branches', ''), ('reg_branches', '.4'))
        for stage in range(2)
    }
    assert offsets == {
        f'{attention}.{layer}'
        for attention in ('encoder.layers.0.self_attn',
                          'decoder.layers.0.cross_attn')
        for layer in ('sampling_offsets', 'attention_weights')
    }


def test_masks_of_regions():
    """Which the graph does not show."""
    init_default_scope('mmengine')
    pool = ModulatedDeformRoIPoolPack((3, 3), 4)
    pool.forward = lambda x: x
    found = targets_of(pool, torch.rand(1, 4, 8, 8))
    assert found == (set(), {'mask_fc.2'})
    last = [x for x in pool.mask_fc if isinstance(x, nn.Linear)][-1]
    assert pool.get_submodule('mask_fc.2') is last


def test_plain_classifier():
    """Whose layers are named as nobody in OpenMMLab names them."""
    init_default_scope('mmengine')
    recipe = Recipe.of(planner=dict(type='FixedPlanner', ranks={'.*': 'full'}))
    excluded = analyze(
        resnet18(num_classes=10), recipe,
        [torch.rand(2, 3, 32, 32)]).selection.excluded
    assert of_reason(excluded, Reason.PREDICTION) == {'fc'}
    assert not of_reason(excluded, Reason.OFFSETS)


def test_model_without_gradients():
    """Of which nothing is known: not in silence."""
    init_default_scope('mmengine')
    model = resnet18()
    model.forward = torch.no_grad()(model.forward)
    logger = MMLogger.get_current_instance()
    with patch.object(logger, 'warning') as warning:
        assert targets_of(model, torch.rand(2, 3, 32, 32)) == (set(), set())
    assert 'without gradients' in warning.call_args[0][0]


class Tracker(nn.Module):
    """Its post-processing leaves PyTorch, as that of DeepSORT does."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Conv2d(3, 8, 3)
        self.scores = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return torch.from_numpy(self.scores(self.backbone(x)).numpy())


def test_outputs_that_leave_pytorch():
    init_default_scope('mmengine')
    found = targets_of(Tracker(), torch.rand(2, 3, 8, 8))
    assert found.predictions == {'scores'}


def test_model_is_as_before():
    init_default_scope('mmengine')
    model = resnet18().train().requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert targets_of(model, torch.rand(2, 3, 32, 32)).predictions == {'fc'}
    assert model.training
    assert not any(x.requires_grad for x in model.parameters())
    assert not any(x._forward_hooks for x in model.modules())
    assert all(
        torch.equal(v, before[k]) for k, v in model.state_dict().items())
