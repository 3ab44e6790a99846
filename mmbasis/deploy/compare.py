# Copyright (c) mmbasis authors. All rights reserved.
"""Does the exported graph compute what the PyTorch model computes?"""
import copy
import os
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

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


def missing_operators(path: str) -> List[str]:
    """Operators of an ONNX file that are in no standard domain.

    Args:
        path (str): The file.

    Returns:
        list[str]: As ``'domain::Name'``; they need a plugin.
    """
    import onnx
    nodes = onnx.load(path, load_external_data=False).graph.node
    return sorted({
        f'{n.domain}::{n.op_type}'
        for n in nodes if n.domain not in ('', 'ai.onnx')
    })


def open_onnx(path: str) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        RuntimeError: If the file needs operators that ONNX Runtime lacks; it
            names them.
    """
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    missing = missing_operators(path)
    if missing:
        from mmdeploy.backend.onnxruntime.init_plugins import get_ops_path
        if os.path.isfile(get_ops_path()):
            options.register_custom_ops_library(get_ops_path())
    try:
        return onnxruntime.InferenceSession(
            path, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # its errors have no common class
        if not missing:
            raise
        raise RuntimeError(
            f'{path} needs the custom operators {", ".join(missing)}, which '
            "neither ONNX Runtime nor MMDeploy's library for it has: "
            f'{error}') from error


def run_onnx(session: Any, *inputs: Tensor) -> Dict[str, np.ndarray]:
    """Outputs of a session by name."""
    names = [x.name for x in session.get_inputs()]
    feeds = {name: x.numpy() for name, x in zip(names, inputs)}
    outputs = session.run(None, feeds)
    return dict(zip([x.name for x in session.get_outputs()], outputs))


@contextmanager
def _recorded_marks() -> Iterator[Dict[str, Tensor]]:
    """Collect the tensors that MMDeploy marks as places to cut the graph, as
    ``'function[call]:input.name'``."""
    from mmdeploy.core.optimizers import function_marker
    found: Dict[str, Tensor] = {}

    class Recorder:

        @staticmethod
        def apply(x, dtype, shape, func, func_id, io, name, *_):
            found[f'{func}[{func_id}]:{io}.{name}'] = x
            return x

    original = function_marker.Mark
    function_marker.reset_mark_function_count()
    function_marker.Mark = Recorder
    try:
        yield found
    finally:
        function_marker.Mark = original


def _before_nms(deployment: Deployment, data: dict,
                inputs: Tensor) -> Dict[str, Tensor]:
    """Run the rewritten model in PyTorch; what passes the marks."""
    from mmdeploy.core import RewriterContext, patch_model
    from mmdeploy.utils import IR
    cfg = copy.deepcopy(deployment.deploy_cfg)
    cfg.ir_config = cfg.onnx_config
    backend = deployment.backend
    model = patch_model(
        repair(
            deployment.task.build_pytorch_model(deployment.checkpoint)),
        cfg=cfg,
        backend=backend,
        ir=IR.ONNX)
    with torch.no_grad(), RewriterContext(
            cfg, backend, IR.ONNX, opset=cfg.onnx_config.opset_version
    ), _recorded_marks() as marks:
        model(inputs, data_samples=data['data_samples'], mode='predict')
    return marks


def _difference(ours: np.ndarray, theirs: Tensor) -> Dict[str, float]:
    error = np.abs(ours.astype(np.float64) - theirs.double().numpy())
    return dict(
        largest=float(error.max(initial=0)),
        mean=float(error.mean()) if error.size else 0.)


def _candidates(boxes: Tensor, scores: Tensor) -> Tensor:
    """Rows of one image in units of the tolerances, ``(boxes, 4 + C)``."""
    return torch.cat([boxes[0] / BOX_TOLERANCE, scores[0] / SCORE_TOLERANCE],
                     1).double()


def match_candidates(ours: Tensor, theirs: Tensor) -> Dict[str, Any]:
    """Compare candidates in any order.

    Candidates of nearly equal score may swap places where the best of a level
    are picked, and the last one picked may be another.

    Args:
        ours (Tensor): ``(N, 4 + C)``, in units of the tolerances.
        theirs (Tensor): The same.

    Returns:
        dict: ``compared``, ``unmatched``, the largest and mean difference of
        ``boxes`` (pixels) and ``scores`` among those that match.
    """
    error = (ours - theirs).abs()
    wrong = error.amax(1) > 1
    if wrong.any():
        # each row that differs looks for its partner among all
        nearest = torch.cdist(theirs[wrong], ours, p=float('inf')).argmin(1)
        error[wrong] = (ours[nearest] - theirs[wrong]).abs()
    wrong = error.amax(1) > 1
    error = error[~wrong]
    result: Dict[str, Any] = dict(
        compared=len(theirs), unmatched=int(wrong.sum()))
    for name, part, unit in (('boxes', error[:, :4], BOX_TOLERANCE),
                             ('scores', error[:, 4:], SCORE_TOLERANCE)):
        result[name] = dict(
            largest=float(part.max()) * unit if len(part) else 0.,
            mean=float(part.mean()) * unit if len(part) else 0.)
    return result


def _compare_before_nms(deployment: Deployment, sessions: Sequence[Any],
                        image: Any) -> Dict[str, Any]:
    data, inputs = deployment.create_input(image)
    marks = _before_nms(deployment, data, inputs)
    outputs = run_onnx(sessions[0], inputs)
    names = ('boxes', 'scores')
    result = match_candidates(
        _candidates(*(torch.from_numpy(outputs[x]) for x in names)),
        _candidates(*(marks[f'multiclass_nms[0]:input.{x}'] for x in names)))
    agrees = result['unmatched'] <= MAX_SWAPPED * result['compared']
    if len(sessions) > 1:
        regions = marks['bbox_head_forward[0]:input.bbox_feats']
        outputs = run_onnx(sessions[1], regions)
        for name in ('cls_score', 'bbox_pred'):
            theirs = marks[f'bbox_head_forward[0]:output.{name}']
            result[name] = _difference(outputs[name], theirs)
            agrees &= result[name]['largest'] <= SCORE_TOLERANCE
    return dict(result, agrees=bool(agrees))


def _compare_scores(deployment: Deployment, session: Any,
                    image: Any) -> Dict[str, Any]:
    data, inputs = deployment.create_input(image)
    with torch.no_grad():
        samples = deployment.model(
            inputs, copy.deepcopy(data['data_samples']), mode='predict')
    theirs = torch.stack([sample.pred_score for sample in samples])
    ours = next(iter(run_onnx(session, inputs).values()))
    result: Dict[str, Any] = dict(scores=_difference(ours, theirs))
    result['top1'] = bool((ours.argmax(1) == theirs.argmax(1).numpy()).all())
    result['agrees'] = (
        result['top1'] and result['scores']['largest'] <= SCORE_TOLERANCE)
    return result


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
        of corners (``boxes``, pixels) and of ``scores`` among partners.
    """
    floors = [x[1].min() for x in (ours, theirs) if len(x[1])]
    floor = max(floors) + SCORE_TOLERANCE if len(floors) == 2 else -1.
    gaps = [
        *_partner_gaps(ours, theirs, floor),
        *_partner_gaps(theirs, ours, floor)
    ]
    found = [gap for gap in gaps if gap is not None]
    result: Dict[str, Any] = dict(
        compared=len(gaps), unmatched=len(gaps) - len(found))
    for column, key in enumerate(('boxes', 'scores')):
        values = [gap[column] for gap in found]
        result[key] = dict(
            largest=max(values, default=0.),
            mean=sum(values) / max(len(values), 1))
    return result


def _partner_gaps(first: Boxes, second: Boxes,
                  floor: float) -> List[Optional[Tuple[float, float]]]:
    """How far each detection of ``first`` whose score is above the floor is
    from its partner in ``second``, in corners and in score; None where it has
    no partner."""
    gaps: List[Optional[Tuple[float, float]]] = []
    for box, score, label in zip(*first):
        if score <= floor:
            continue
        corner = np.abs(second[0] - box).max(1, initial=0)
        score_gap = np.abs(second[1] - score)
        fits = ((second[2] == label) & (corner <= BOX_TOLERANCE)
                & (score_gap <= SCORE_TOLERANCE))
        if not fits.any():
            gaps.append(None)
            continue
        partner = np.where(fits, corner, np.inf).argmin()
        gaps.append((float(corner[partner]), float(score_gap[partner])))
    return gaps


def _compare_boxes(deployment: Deployment, backend_model: Any,
                   image: Any) -> Dict[str, Any]:
    data, inputs = deployment.create_input(image)
    with torch.no_grad():
        theirs = deployment.model(
            inputs, copy.deepcopy(data['data_samples']), mode='predict')
        ours = backend_model(
            inputs, copy.deepcopy(data['data_samples']), mode='predict')
    result = match_boxes(_instances(ours), _instances(theirs))
    allowed = max(4, MAX_UNMATCHED_TWO_STAGE * result['compared']) if hasattr(
        deployment.model, 'rpn_head') else 0
    result['agrees'] = result['unmatched'] <= allowed
    return result


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
    sessions = [open_onnx(path) for path in files]
    if deployment.partition is not None:
        return [
            _compare_before_nms(deployment, sessions, image)
            for image in images
        ]
    if not deployment.is_detector:
        return [
            _compare_scores(deployment, sessions[0], image) for image in images
        ]
    backend_model = deployment.task.build_backend_model(list(files))
    return [
        _compare_boxes(deployment, backend_model, image) for image in images
    ]
