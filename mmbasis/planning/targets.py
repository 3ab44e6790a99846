# Copyright (c) mmbasis authors. All rights reserved.
"""Layers that stay dense unless somebody asks for them."""
import re

import torch.nn as nn

from ..layers import kind_of

# Names are those of the OpenMMLab libraries. Position -1 is the last layer of
# a stack, see _with_last_positions.
_AT = r'(\.-?\d+)?'  # level of a pyramid, stage of a cascade
_IN_HEAD = r'(.*\.)?\w*head\.(.*\.)?'

PREDICTION_LAYERS = [
    # classifiers: head.fc, head.layers.head, head.head_dist.linear, …
    r'(.*\.)?(glbctx_)?head\.fc',
    r'(.*\.)?head\.(fc2|classifier|\w+_head|layers\.-1\.fc)',
    r'(.*\.)?head\.((layers|csra_heads\.-?\d+)\.)?head(_dist)?(\.linear)?',
    r'backbone\.(fc|classifier\.-1)',
    # detectors, by what is predicted: retina_cls, rtm_reg.0, fc_cls_ref.1, …
    _IN_HEAD + r'(\w+_)?(cls|reg|obj|centerness|iou|loc|shape)(_ref)?' + _AT,
    _IN_HEAD + r'\w+_(pred|score|out|refine|coeff|kernel)' + _AT,
    _IN_HEAD + r'((conv|fc|cls)_logits|(cls|fc)_embed|controller|segm_conv)',
    _IN_HEAD + r'(conv_mask_list(_[xy])?|(aux_)?cls_branches)\.-?\d+',
    # … and as the end of a stack: SSD, DETR, MaskFormer, CenterNet, CornerNet
    _IN_HEAD + r'((cls|reg)_convs|(aux_)?reg_branches)\.-?\d+\.-1',
    _IN_HEAD + r'(fc_reg\.layers|mask_embed|protonet)\.-1',
    _IN_HEAD + r'(tl|br)_(heat|off|emb|\w+_shift)\.-?\d+\.-1\.conv',
    r'(.*\.)?(\w*head\.-1|mask_head\.projection)',
]

OFFSET_LAYERS = [
    # deformable convolution, also guided anchors and switchable atrous
    r'(.*\.)?(\w*conv\d*_offset|offset_[ls])',
    r'(.*\.)?(reg_offset_module|(tl|br)_dcn_offset|(offset|mask)_fc)\..*',
    # deformable attention and the points that it starts from
    r'(.*\.)?(sampling_offsets|attention_weights|reference_points_fc)',
    r'(.*\.)?ref_(point|anchor)_head\.layers\.-1',
]


def is_prediction_layer(model: nn.Module, name: str) -> bool:
    """Whether a layer of a model puts out predictions: it is small, and what
    it loses nothing repairs."""
    name = _with_last_positions(model, name)
    return any(re.fullmatch(pattern, name) for pattern in PREDICTION_LAYERS)


def is_offset_layer(model: nn.Module, name: str) -> bool:
    """Whether a layer of a model says where others sample: its errors move
    the samples of all channels."""
    name = _with_last_positions(model, name)
    return any(re.fullmatch(pattern, name) for pattern in OFFSET_LAYERS)


def _with_last_positions(model: nn.Module, name: str) -> str:
    """Write -1 for a position in a stack behind which no layer comes."""
    parts, module = [], model
    for part in name.split('.'):
        # HRNet leaves gaps in its lists
        children = {k: x for k, x in module._modules.items() if x is not None}
        following = list(children)[list(children).index(part) + 1:]
        is_last = part.isdigit() and not any(
            kind_of(layer) for key in following
            for layer in children[key].modules())
        parts.append('-1' if is_last else part)
        module = children[part]
    return '.'.join(parts)
