# Copyright (c) mmbasis authors. All rights reserved.
"""What stays dense by default, against the autograd graphs of real heads."""
import pytest
import torch
import torch.nn as nn
from mmdet.models.layers import DinoTransformerDecoder
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope

from mmbasis.planning import find_layers
from mmbasis.planning.layers import OFFSETS, PREDICTION, choose_layers

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
    """What a head puts out for random features."""
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
    truth = last_layers(outputs_of(name, head, channels, levels), weights)

    choose_layers(model, layers)
    dense = {x.name for x in layers if not x.compressible}
    assert truth and truth <= dense
    assert {x.name for x in layers if x.reason == PREDICTION} <= truth
    # most of the head is compressed all the same
    assert len(dense) < len(layers) or name in ('yolov3', 'ssd300', 'ssdlite')

    asked = find_layers(model)
    choose_layers(model, asked, prediction_layers=True)
    assert PREDICTION not in {x.reason for x in asked}


def names_by_reason(**heads):
    model = nn.ModuleDict(heads)
    layers = find_layers(model)
    choose_layers(model, layers)
    found = {}
    for layer in layers:
        found.setdefault(layer.reason, []).append(layer.name)
    return found


def test_mask_rcnn():
    """Whose heads look at one region at a time."""
    cfg = get_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py').model
    found = names_by_reason(
        rpn_head=MODELS.build(cfg.rpn_head),
        roi_head=MODELS.build(
            dict(
                cfg.roi_head,
                train_cfg=cfg.train_cfg.rcnn,
                test_cfg=cfg.test_cfg.rcnn)))
    assert found[PREDICTION] == [
        'rpn_head.rpn_cls', 'rpn_head.rpn_reg', 'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg', 'roi_head.mask_head.conv_logits'
    ]
    assert len(found['']) == 8  # rpn_conv, two linear layers, five of masks


def test_deformable_attention():
    cfg = get_config('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py').model
    cfg.decoder.num_layers = 1
    decoder = DinoTransformerDecoder(**cfg.decoder)
    found = names_by_reason(decoder=decoder)
    attention = 'decoder.layers.0.cross_attn'
    assert found[OFFSETS] == [
        f'{attention}.sampling_offsets', f'{attention}.attention_weights',
        'decoder.ref_point_head.layers.1'
    ]
    assert f'{attention}.value_proj' in found['']
    assert 'decoder.ref_point_head.layers.0' in found['']
    assert ['decoder.layers.0.self_attn.attn.out_proj'
            ] == found['nn.MultiheadAttention reads its weight and never '
                       'calls it']
