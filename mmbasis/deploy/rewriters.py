# Copyright (c) mmbasis authors. All rights reserved.
"""What MMDeploy's rewriters of detectors lack, which imports this file where
a deploy config names it in ``codebase_config.module``."""
from typing import Any, List, Optional, Tuple

import torch
from mmdeploy.codebase.mmdet.deploy import get_post_processing_params
from mmdeploy.codebase.mmdet.models.task_modules.prior_generators import (
    anchor,
)
from mmdeploy.core import FUNCTION_REWRITER
from mmdeploy.mmcv.ops import multiclass_nms
from mmdeploy.utils import IR, cfg_apply_marks
from torch import Tensor

from ..compat import repair_partition, repair_roi_align

repair_partition()
repair_roi_align()
# a plugin where the size of the image is free; the first rewriter wins
FUNCTION_REWRITER._registry.remove_record(
    anchor.anchorgenerator__single_level_grid_priors__trt)


@FUNCTION_REWRITER.register_rewriter(
    'mmdeploy.codebase.mmdet.deploy.utils.gather_topk', backend='tensorrt')
def gather_topk__plain(*inputs: Optional[Tensor], inds: Tensor,
                       **kwargs) -> Any:
    """Pick the best candidates with ONNX's own operators instead of MMDeploy's
    plugin, unless the graph has another one, non-maximum suppression."""
    ctx = FUNCTION_REWRITER.get_context()
    if ctx.cfg.get('partition_config') is None:
        return ctx.origin_func(*inputs, inds=inds, **kwargs)
    outputs = list(inputs)
    for i, x in enumerate(inputs):
        if x is not None:
            index = inds.reshape(*inds.shape, *[1] * (x.dim() - 2))
            index = index.expand(*inds.shape, *x.shape[2:])
            # priors are the same for all images of a batch
            x = x.expand(inds.shape[0], *x.shape[1:])
            outputs[i] = torch.gather(x, 1, index)
    return outputs[0] if len(outputs) == 1 else outputs


@FUNCTION_REWRITER.register_rewriter(
    'mmdet.models.dense_heads.rtmdet_head.RTMDetHead.predict_by_feat',
    ir=IR.ONNX)
def rtmdet_head__predict_by_feat(self, cls_scores: List[Tensor],
                                 bbox_preds: List[Tensor],
                                 batch_img_metas: List[dict],
                                 **_) -> Tuple[Tensor, Tensor]:
    """Decode RTMDet's boxes as MMDetection does: MMDeploy's own rewriter does
    not clip them to the image, which changes non-maximum suppression."""
    cfg, ctx = self.test_cfg, FUNCTION_REWRITER.get_context()
    scores, distances = [
        torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)
        for levels in (cls_scores, bbox_preds)
    ]
    points = torch.cat(
        self.prior_generator.grid_priors([x.shape[2:] for x in cls_scores],
                                         device=scores.device))
    boxes = self.bbox_coder.decode(points[None, :, :2], distances,
                                   batch_img_metas[0]['img_shape'])
    params = get_post_processing_params(ctx.cfg)
    return multiclass_nms(
        boxes,
        scores.sigmoid(),
        params.max_output_boxes_per_class,
        nms_type=cfg.nms.get('type', 'nms'),
        iou_threshold=cfg.nms.get('iou_threshold', params.iou_threshold),
        score_threshold=cfg.get('score_thr', params.score_threshold),
        pre_top_k=params.pre_top_k,
        keep_top_k=cfg.get('max_per_img', params.keep_top_k))


@FUNCTION_REWRITER.register_rewriter(
    'mmdeploy.core.optimizers.function_marker.Mark.symbolic', ir=IR.ONNX)
def mark_symbolic__typed(g, x, *args):
    """A mark whose output has the type and shape of its input: SSD's poolings,
    which round up, cannot be exported without a known shape."""
    ctx = FUNCTION_REWRITER.get_context()
    if not cfg_apply_marks(ctx.cfg):
        return x
    marked = ctx.origin_func(g, x, *args)
    marked.setType(x.type())
    return marked
