# Copyright (c) mmbasis authors. All rights reserved.
"""Does the exported graph compute what the PyTorch model computes?"""
import copy
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Sequence
from unittest import mock

import torch
from torch import Tensor

from .export import Deployment

#: largest difference of scores and of values before non-maximum suppression
SCORE_TOLERANCE = 1e-3
#: largest difference of box corners after it, in pixels
BOX_TOLERANCE = .5
#: share of the candidates before it that near ties may swap at a cut
MAX_SWAPPED = .005
#: share of a two-stage detector's boxes that may have no partner: MMDeploy
#: suppresses the proposals of all levels together, MMDetection level by level
MAX_UNMATCHED_TWO_STAGE = .1


def open_onnx(path: str) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        RuntimeError: If the file needs operators that ONNX Runtime lacks.
    """
    import onnx
    from mmdeploy.backend.onnxruntime import ORTWrapper
    try:
        return ORTWrapper(path, 'cpu').sess
    except Exception as error:  # its errors have no common class
        nodes = onnx.load(path, load_external_data=False).graph.node
        custom = sorted({
            f'{x.domain}::{x.op_type}'
            for x in nodes if x.domain not in ('', 'ai.onnx')
        })
        if not custom:
            raise
        raise RuntimeError(
            f'{path} needs the custom operators {", ".join(custom)}, which '
            "neither ONNX Runtime nor MMDeploy's library for it has: "
            f'{error}') from error


def _run(session: Any, x: Tensor) -> Dict[str, Tensor]:
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    names = (output.name for output in session.get_outputs())
    return dict(zip(names, map(torch.from_numpy, outputs)))


@torch.no_grad()
def _predict(model: Any, data: dict, inputs: Tensor) -> Any:
    return model(inputs, copy.deepcopy(data['data_samples']), mode='predict')


def _before_nms(deployment: Deployment, data: dict,
                inputs: Tensor) -> Dict[str, Tensor]:
    """The tensors that the rewritten model marks as places to cut the graph,
    as ``'function[call]:input.name'``."""
    from mmdeploy.core import RewriterContext, patch_model
    from mmdeploy.core.optimizers import function_marker
    from mmdeploy.utils import IR
    marks: Dict[str, Tensor] = {}

    def record(x, dtype, shape, func, func_id, io, name, *_):
        marks[f'{func}[{func_id}]:{io}.{name}'] = x
        return x

    cfg = copy.deepcopy(deployment.deploy_cfg)
    cfg.ir_config = cfg.onnx_config
    context = dict(cfg=cfg, backend=deployment.backend, ir=IR.ONNX)
    model = patch_model(deployment.build_rewritable(), **context)
    recorder = SimpleNamespace(apply=record)
    with mock.patch.object(function_marker, 'Mark', recorder), \
            RewriterContext(**context, opset=cfg.onnx_config.opset_version):
        _predict(model, data, inputs)
    return marks


def _spread(difference: Tensor) -> Dict[str, float]:
    error = difference.double().abs()
    if not error.numel():
        error = torch.zeros(1)
    return dict(largest=float(error.max()), mean=float(error.mean()))


def _rows(boxes: Tensor, scores: Tensor) -> Tensor:
    """Boxes ``(N, 4)`` and scores ``(N, C)`` in units of the tolerances."""
    both = (boxes / BOX_TOLERANCE, scores / SCORE_TOLERANCE)
    return torch.cat(both, 1).double()


def _to_nearest(rows: Tensor, others: Tensor) -> Tensor:
    """Differences of rows from the nearest of others; infinite without any."""
    if not len(others):
        return torch.full_like(rows, torch.inf)
    nearest = torch.cdist(rows, others, p=torch.inf).argmin(1)
    return (rows - others[nearest]).abs()


def _summary(error: Tensor) -> Dict[str, Any]:
    found = error[error.amax(1) <= 1]
    return dict(
        compared=len(error),
        unmatched=len(error) - len(found),
        boxes=_spread(found[:, :4] * BOX_TOLERANCE),
        scores=_spread(found[:, 4:] * SCORE_TOLERANCE))


def _compare_before_nms(deployment: Deployment, sessions: Sequence[Any],
                        data: dict, inputs: Tensor) -> Dict[str, Any]:
    marks = _before_nms(deployment, data, inputs)
    outputs = _run(sessions[0], inputs)
    cut = 'multiclass_nms[0]:input'
    ours = _rows(outputs['boxes'][0], outputs['scores'][0])
    theirs = _rows(marks[f'{cut}.boxes'][0], marks[f'{cut}.scores'][0])
    error = (ours - theirs).abs()
    # candidates of nearly equal score may swap places where the best of a
    # level are picked, and the last one picked may be another
    wrong = error.amax(1) > 1
    error[wrong] = _to_nearest(theirs[wrong], ours)
    result = _summary(error)
    agrees = result['unmatched'] <= MAX_SWAPPED * result['compared']
    if len(sessions) > 1:
        head = 'bbox_head_forward[0]'
        outputs = _run(sessions[1], marks[f'{head}:input.bbox_feats'])
        for name in ('cls_score', 'bbox_pred'):
            theirs = marks[f'{head}:output.{name}']
            result[name] = _spread(outputs[name] - theirs)
            agrees &= result[name]['largest'] <= SCORE_TOLERANCE
    return dict(result, agrees=agrees)


def _compare_scores(deployment: Deployment, sessions: Sequence[Any],
                    data: dict, inputs: Tensor) -> Dict[str, Any]:
    ours, = _run(sessions[0], inputs).values()
    samples = _predict(deployment.model, data, inputs)
    theirs = torch.stack([sample.pred_score for sample in samples])
    scores = _spread(ours - theirs)
    top1 = torch.equal(ours.argmax(1), theirs.argmax(1))
    agrees = top1 and scores['largest'] <= SCORE_TOLERANCE
    return dict(scores=scores, top1=top1, agrees=agrees)


def _compare_boxes(deployment: Deployment, backend_model: Any,
                   data: dict, inputs: Tensor) -> Dict[str, Any]:
    result = match_boxes(*(_instances(_predict(model, data, inputs)[0])
                           for model in (backend_model, deployment.model)))
    allowed = 0.
    if hasattr(deployment.model, 'rpn_head'):
        allowed = max(4, MAX_UNMATCHED_TWO_STAGE * result['compared'])
    return dict(result, agrees=result['unmatched'] <= allowed)


def _instances(sample: Any) -> Sequence[Tensor]:
    """Detections, clipped to the image; those wholly outside are dropped,
    which MMDeploy leaves to its user."""
    found, (height, width) = sample.pred_instances, sample.ori_shape[:2]
    corner = found.bboxes.new_tensor([width, height] * 2)
    boxes = found.bboxes.clamp(min=0).minimum(corner)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[inside], found.scores[inside], found.labels[inside]


def match_boxes(ours: Sequence, theirs: Sequence) -> Dict[str, Any]:
    """Partners of detections, in both directions.

    Either list may be cut off at its own number of boxes, so only those count
    whose score is clearly above the lowest that both still hold.

    Args:
        ours (Sequence[Tensor | ndarray]): Boxes ``(N, 4)`` in pixels, scores
            ``(N, )`` and labels ``(N, )``.
        theirs (Sequence[Tensor | ndarray]): The same, ``(M, …)``.

    Returns:
        dict: ``compared`` detections, ``unmatched`` ones (no partner of the
        same label within the tolerances), and the largest and mean difference
        of coordinates (``boxes``, pixels) and of ``scores`` among partners.
    """
    both = [[torch.as_tensor(x) for x in side] for side in (ours, theirs)]
    lowest = [float(scores.min()) for _, scores, _ in both if len(scores)]
    floor = max(lowest) + SCORE_TOLERANCE if len(lowest) == 2 else -1.
    # so that scores of different labels are never near
    rows = [
        _rows(boxes, (scores.double() + 10 * labels)[:, None])
        for boxes, scores, labels in both
    ]
    high = [x[scores > floor] for x, (_, scores, _) in zip(rows, both)]
    error = _to_nearest(high[0], rows[1]), _to_nearest(high[1], rows[0])
    return _summary(torch.cat(error))


def compare(deployment: Deployment, files: Sequence[str],
            images: Sequence[Any]) -> List[Dict[str, Any]]:
    """Compare exported files in ONNX Runtime with PyTorch on real images.

    A classifier's scores, and a detector's boxes after non-maximum
    suppression, are compared with the untouched PyTorch model; boxes and
    scores before it with the rewritten model in PyTorch.

    Returns:
        list[dict]: For each image the largest and mean differences, and
        ``agrees``.

    Raises:
        RuntimeError: If the files need custom operators.
    """
    run: Any = [open_onnx(path) for path in files]
    compare_one: Callable = _compare_before_nms
    if deployment.partition is None:
        compare_one = _compare_scores
        if deployment.deploy_cfg.codebase_config.task == 'ObjectDetection':
            compare_one = _compare_boxes
            run = deployment.task.build_backend_model(list(files))
    return [
        compare_one(deployment, run, *deployment.create_input(image))
        for image in images
    ]


def evaluate_onnx(deployment: Deployment, files: List[str],
                  work_dir: str) -> Dict[str, float]:
    """Metrics of exported files in ONNX Runtime, by MMDeploy's evaluator, on
    the test set of the model config; ``work_dir`` gets the log."""
    task = deployment.task
    model = task.build_backend_model(files, task.update_data_preprocessor)
    loader = copy.deepcopy(deployment.model_cfg.test_dataloader)
    loader.batch_size = 1  # what a graph of fixed shapes takes
    runner = task.build_test_runner(model, work_dir, dataloader=loader)
    return {k: float(v) for k, v in runner.test().items()}
