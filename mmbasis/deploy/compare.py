# Copyright (c) mmbasis authors. All rights reserved.
"""Does the exported graph compute what the PyTorch model computes?"""
import copy
import os
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Sequence, Tuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ..quirks import repair
from .export import Deployment

#: largest difference of scores and of values before non-maximum suppression
SCORE_TOLERANCE = 1e-3
#: largest difference of box corners after it, in pixels
BOX_TOLERANCE = .5
#: share of the candidates before it that near ties may swap at a cut
MAX_SWAPPED = .005
#: share of a two-stage detector's boxes that may have no partner, or two boxes
#: of either list: MMDeploy suppresses the proposals of all levels together,
#: MMDetection level by level
MAX_UNMATCHED_TWO_STAGE = .1


def open_onnx(path: str) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        RuntimeError: If the file needs operators that ONNX Runtime lacks; it
            names them.
    """
    import onnx
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    nodes = onnx.load(path, load_external_data=False).graph.node
    custom = sorted({
        f'{n.domain}::{n.op_type}'
        for n in nodes if n.domain not in ('', 'ai.onnx')
    })
    if custom:
        from mmdeploy.backend.onnxruntime.init_plugins import get_ops_path
        if os.path.isfile(get_ops_path()):
            options.register_custom_ops_library(get_ops_path())
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # its errors have no common class
        if not custom:
            raise
        raise RuntimeError(
            f'{path} needs the custom operators {", ".join(custom)}, which '
            "neither ONNX Runtime nor MMDeploy's library for it has: "
            f'{error}') from error


def _run(session: Any, x: Tensor) -> Dict[str, Tensor]:
    """Outputs of a session by name."""
    names = [output.name for output in session.get_outputs()]
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return {k: torch.from_numpy(v) for k, v in zip(names, outputs)}


def _predict(model: Any, data: dict, inputs: Tensor) -> Any:
    with torch.no_grad():
        return model(
            inputs, copy.deepcopy(data['data_samples']), mode='predict')


def _before_nms(deployment: Deployment, data: dict,
                inputs: Tensor) -> Dict[str, Tensor]:
    """Run the rewritten model in PyTorch; the tensors that MMDeploy marks as
    places to cut the graph, as ``'function[call]:input.name'``."""
    from mmdeploy.core import RewriterContext, patch_model
    from mmdeploy.core.optimizers import function_marker
    from mmdeploy.utils import IR
    marks: Dict[str, Tensor] = {}

    def record(x, dtype, shape, func, func_id, io, name, *_):
        marks[f'{func}[{func_id}]:{io}.{name}'] = x
        return x

    cfg = copy.deepcopy(deployment.deploy_cfg)
    cfg.ir_config = cfg.onnx_config
    backend = deployment.backend
    model = patch_model(
        repair(deployment.task.build_pytorch_model(deployment.checkpoint)),
        cfg=cfg,
        backend=backend,
        ir=IR.ONNX)
    function_marker.reset_mark_function_count()
    recorder = SimpleNamespace(apply=record)
    with RewriterContext(
            cfg, backend, IR.ONNX, opset=cfg.onnx_config.opset_version
    ), mock.patch.object(function_marker, 'Mark', recorder):
        _predict(model, data, inputs)
    return marks


def _spread(difference: Tensor) -> Dict[str, float]:
    error = difference.double().abs()
    if not error.numel():
        return dict(largest=0., mean=0.)
    return dict(largest=float(error.max()), mean=float(error.mean()))


def _rows(boxes: Tensor, scores: Tensor) -> Tensor:
    """Boxes ``(N, 4)`` and scores ``(N, C)`` in units of the tolerances."""
    return torch.cat([boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE],
                     1).double()


def _to_nearest(rows: Tensor, others: Tensor) -> Tensor:
    """Differences of rows from the nearest of others; infinite without any."""
    none = others.new_full((1, others.shape[1]), float('inf'))
    others = torch.cat([others, none])
    nearest = torch.cdist(rows, others, p=float('inf')).argmin(1)
    return (rows - others[nearest]).abs()


def _summary(error: Tensor) -> Dict[str, Any]:
    """Rows compared, those without a partner within the tolerances, and the
    spread of the others."""
    found = error[error.amax(1) <= 1]
    return dict(
        compared=len(error),
        unmatched=len(error) - len(found),
        boxes=_spread(found[:, :4] * BOX_TOLERANCE),
        scores=_spread(found[:, 4:] * SCORE_TOLERANCE))


def _match_candidates(ours: Tensor, theirs: Tensor) -> Dict[str, Any]:
    """Compare rows in place, and those that differ with all others:
    candidates of nearly equal score may swap places where the best of a level
    are picked, and the last one picked may be another."""
    error = (ours - theirs).abs()
    wrong = error.amax(1) > 1
    error[wrong] = _to_nearest(theirs[wrong], ours)
    return _summary(error)


def _compare_before_nms(deployment: Deployment, sessions: Sequence[Any],
                        image: Any) -> Dict[str, Any]:
    data, inputs = deployment.create_input(image)
    marks = _before_nms(deployment, data, inputs)
    outputs = _run(sessions[0], inputs)
    names = ('boxes', 'scores')
    result = _match_candidates(
        _rows(*(outputs[x][0] for x in names)),
        _rows(*(marks[f'multiclass_nms[0]:input.{x}'][0] for x in names)))
    agrees = result['unmatched'] <= MAX_SWAPPED * result['compared']
    if len(sessions) > 1:
        regions = marks['bbox_head_forward[0]:input.bbox_feats']
        outputs = _run(sessions[1], regions)
        for name in ('cls_score', 'bbox_pred'):
            theirs = marks[f'bbox_head_forward[0]:output.{name}']
            result[name] = _spread(outputs[name] - theirs)
            agrees &= result[name]['largest'] <= SCORE_TOLERANCE
    return dict(result, agrees=agrees)


def _compare_scores(deployment: Deployment, session: Any,
                    image: Any) -> Dict[str, Any]:
    data, inputs = deployment.create_input(image)
    samples = _predict(deployment.model, data, inputs)
    theirs = torch.stack([sample.pred_score for sample in samples])
    ours = next(iter(_run(session, inputs).values()))
    difference = _spread(ours - theirs)
    top1 = torch.equal(ours.argmax(1), theirs.argmax(1))
    return dict(
        scores=difference,
        top1=top1,
        agrees=top1 and difference['largest'] <= SCORE_TOLERANCE)


Boxes = Tuple[np.ndarray, np.ndarray, np.ndarray]


def _instances(samples: Sequence[Any]) -> Boxes:
    """Detections in one image, clipped to it; those wholly outside are
    dropped, which MMDeploy leaves to its user."""
    found = samples[0].pred_instances
    height, width = samples[0].ori_shape[:2]
    boxes = found.bboxes.detach().numpy()
    boxes = boxes.clip(0, np.array([width, height] * 2))
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return tuple(x[inside] for x in (boxes, found.scores.detach().numpy(),
                                     found.labels.numpy()))


def match_boxes(ours: Boxes, theirs: Boxes) -> Dict[str, Any]:
    """Partners of detections, in both directions.

    Either list may be cut off at its own number of boxes, so only those count
    whose score is clearly above the lowest that both still hold.

    Args:
        ours (tuple[ndarray]): Boxes ``(N, 4)`` in pixels, scores ``(N, )``
            and labels ``(N, )``.
        theirs (tuple[ndarray]): The same, ``(M, …)``.

    Returns:
        dict: ``compared`` detections, ``unmatched`` ones (no partner of the
        same label within the tolerances), and the largest and mean difference
        of coordinates (``boxes``, pixels) and of ``scores`` among partners.
    """
    lowest = [x[1].min() for x in (ours, theirs) if len(x[1])]
    floor = max(lowest) + SCORE_TOLERANCE if len(lowest) == 2 else -1.
    rows, high = [], []
    for boxes, scores, labels in (ours, theirs):
        # so that scores of different labels are never near
        apart = scores.astype(np.float64) + 10. * labels
        rows.append(
            _rows(torch.from_numpy(boxes), torch.from_numpy(apart)[:, None]))
        high.append(rows[-1][torch.from_numpy(scores > floor)])
    return _summary(
        torch.cat(
            [_to_nearest(*pair) for pair in zip(high, reversed(rows))]))


def _compare_boxes(deployment: Deployment, backend_model: Any,
                   image: Any) -> Dict[str, Any]:
    data, inputs = deployment.create_input(image)
    result = match_boxes(*(_instances(_predict(model, data, inputs))
                           for model in (backend_model, deployment.model)))
    allowed = max(4, MAX_UNMATCHED_TWO_STAGE * result['compared']) if hasattr(
        deployment.model, 'rpn_head') else 0
    return dict(result, agrees=result['unmatched'] <= allowed)


def compare(deployment: Deployment, files: Sequence[str],
            images: Sequence[Any]) -> List[Dict[str, Any]]:
    """Compare ONNX Runtime with PyTorch on images.

    A classifier's scores, and a detector's boxes after non-maximum
    suppression, are compared with the untouched PyTorch model; boxes and
    scores before it with the rewritten model in PyTorch.

    Args:
        deployment (Deployment): What was exported.
        files (Sequence[str]): The ONNX files.
        images (Sequence[str | ndarray]): Real images.

    Returns:
        list[dict]: For each image the largest and mean differences, and
        ``agrees``.

    Raises:
        RuntimeError: If the files need custom operators.
    """
    run: Any = [open_onnx(path) for path in files]
    if deployment.partition is not None:
        compare_one: Callable = _compare_before_nms
    elif deployment.deploy_cfg.codebase_config.task == 'ObjectDetection':
        compare_one = _compare_boxes
        run = deployment.task.build_backend_model(list(files))
    else:
        compare_one, run = _compare_scores, run[0]
    return [compare_one(deployment, run, image) for image in images]


def evaluate_onnx(deployment: Deployment, files: List[str],
                  work_dir: str) -> Dict[str, float]:
    """Run MMDeploy's evaluator on exported files, in ONNX Runtime.

    Args:
        deployment (Deployment): Its model config has a test set.
        files (list[str]): The ONNX files.
        work_dir (str): For the log.

    Returns:
        dict[str, float]: The evaluator's metrics.
    """
    model = deployment.task.build_backend_model(
        files,
        data_preprocessor_updater=deployment.task.update_data_preprocessor)
    loader = copy.deepcopy(deployment.model_cfg.test_dataloader)
    axes = deployment.deploy_cfg.onnx_config.get('dynamic_axes') or {}
    if 0 not in axes.get('input', {}):
        loader.batch_size = 1
    runner = deployment.task.build_test_runner(
        model, work_dir, dataloader=loader)
    return {k: float(v) for k, v in runner.test().items()}
