# Copyright (c) mmbasis authors. All rights reserved.
"""Does the exported graph compute what the PyTorch model computes?

What is compared are the raw outputs of the heads: logits, box predictions
before decoding, all candidates. Softmax and thresholds would hide differences.
Behind them a classifier's scores and a detector's boxes are compared, too.
"""
import copy
import math
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .export import Deployment
from .graphs import flat_tensors, map_tensors
from .runs import Graph, Reference, run_pytorch

#: largest error, relative to the norm and to the range of what is compared
TOLERANCE = 1e-3
#: largest difference of box corners after decoding, in pixels
BOX_TOLERANCE = .5
#: share of a two-stage detector's boxes that may have no partner: MMDeploy
#: suppresses the proposals of all levels together, MMDetection level by level
MAX_UNMATCHED_TWO_STAGE = .1
NO_BOX = ('no box was compared: the model detects nothing above its score '
          'threshold. Take images with objects, or lower the threshold '
          '(test_cfg.score_thr)')


# ---------------------------------------------------------- how far apart
def difference(ours: Tensor, theirs: Tensor) -> Dict[str, float]:
    """How far a tensor is from another one.

    Returns:
        dict: ``values`` compared; ``relative``, the norm of the difference by
        that of ``theirs``; ``largest`` difference by the range of ``theirs``.
        Infinite for other shapes.
    """
    if ours.shape != theirs.shape:
        return dict(values=0, relative=math.inf, largest=math.inf)
    if not ours.numel():
        return dict(values=0, relative=0., largest=0.)
    error, theirs = (ours.double() - theirs.double()).abs(), theirs.double()
    norm = float(theirs.norm()) or 1.
    span = float(theirs.max() - theirs.min()) or float(theirs.abs().max())
    return dict(values=ours.numel(), relative=float(error.norm()) / norm,
                largest=float(error.max()) / (span or 1.))


def is_close(found: Dict[str, float]) -> bool:
    """Whether a :func:`difference` is within the tolerance."""
    # written so that NaN is not
    return found['relative'] <= TOLERANCE and found['largest'] <= TOLERANCE


def _worst(differences: Sequence[Dict[str, float]]) -> Dict[str, float]:
    """All differences as one; NaN is the worst."""
    def worst(key):
        values = [x[key] for x in differences]
        return math.nan if any(map(math.isnan, values)) else max(values)
    return dict(values=sum(x['values'] for x in differences),
                relative=worst('relative'), largest=worst('largest'))


def compare_raw(graph: Graph, taps: Dict[str, Tensor],
                reference: Reference) -> Dict[str, Dict[str, float]]:
    """Compare the raw outputs of each head. Heads that see regions are run on
    the regions that the graph found.

    Raises:
        RuntimeError: If the graph has none.
    """
    found: Dict[str, List[Dict[str, float]]] = {}
    expected = dict(reference.tensors)
    for call, (module, args) in reference.calls.items():
        expected.update(_on_regions(call, module, args, taps))
    for name, ours in taps.items():
        head, _, index = name.partition(':')
        theirs = expected.get(name)
        if index and theirs is not None:
            found.setdefault(head.partition('[')[0], []).append(
                difference(ours, theirs))
    if not any(x['values'] for xs in found.values() for x in xs):
        raise RuntimeError(
            f'{graph.path} has no raw output to compare: its heads are '
            f'{sorted(taps) or "not marked"}, those of the model '
            f'{sorted(expected)}. Export it with mmbasis (tools/deploy.py)')
    return {name: _worst(xs) for name, xs in found.items()}


@torch.no_grad()
def _on_regions(call: str, module: Any, args: tuple,
                taps: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Outputs of a head by name on what it saw in the graph; none where the
    graph shows only a part of that."""
    count = len([*flat_tensors(args)])
    names = [f'{call}<{i}' for i in range(count)]
    if not taps.keys() >= {*names}:
        return {}
    values = iter([taps[x] for x in names])
    outputs = module(*map_tensors(args, lambda _: next(values)))
    return {f'{call}:{i}': x for i, x in enumerate(flat_tensors(outputs))}


# ------------------------------------------------------- boxes after decoding
def _rows(boxes: Tensor, scores: Tensor, tolerance: float) -> Tensor:
    """Boxes ``(N, 4)`` and scores ``(N, )`` in units of the tolerances."""
    both = (boxes / BOX_TOLERANCE, scores[:, None] / tolerance)
    return torch.cat(both, 1).double()


def _to_nearest(rows: Tensor, others: Tensor) -> Tensor:
    """Differences of rows from the nearest of others; infinite without any."""
    if not len(others):
        return torch.full_like(rows, torch.inf)
    nearest = torch.cdist(rows, others, p=torch.inf).argmin(1)
    return (rows - others[nearest]).abs()


def _summary(error: Tensor, tolerance: float) -> Dict[str, Any]:
    found = error[error.amax(1) <= 1]
    pixels, scores = found[:, :4] * BOX_TOLERANCE, found[:, 4] * tolerance
    return dict(
        compared=len(error),
        unmatched=len(error) - len(found),
        pixels=float(pixels.max()) if len(found) else 0.,
        scores=float(scores.max()) if len(found) else 0.)


def score_tolerance(*scores: Tensor) -> float:
    """Largest difference of scores: relative to their range, because those of
    an untrained model lie in a narrow one."""
    found = torch.cat([x.flatten() for x in scores]).double()
    if not found.numel():
        return TOLERANCE
    return TOLERANCE * float(found.max() - found.min() or found.max() or 1.)


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
        same label within the tolerances), and the largest difference of
        coordinates (``pixels``) and of ``scores`` among partners.
    """
    both = [[torch.as_tensor(x) for x in side] for side in (ours, theirs)]
    tolerance = score_tolerance(*(scores for _, scores, _ in both))
    lowest = [float(scores.min()) for _, scores, _ in both if len(scores)]
    floor = max(lowest) + tolerance if len(lowest) == 2 else -1.
    # so that scores of different labels are never near
    rows = [_rows(boxes, scores.double() + 10 * labels, tolerance)
            for boxes, scores, labels in both]
    high = [x[scores > floor] for x, (_, scores, _) in zip(rows, both)]
    error = _to_nearest(high[0], rows[1]), _to_nearest(high[1], rows[0])
    return _summary(torch.cat(error), tolerance)


def find_candidates(boxes: Tensor, scores: Tensor,
                    detections: Sequence[Tensor]) -> Dict[str, Any]:
    """Look for the detections of a model among the candidates that enter
    suppression.

    Args:
        boxes (Tensor): ``(K, 4)`` in pixels.
        scores (Tensor): ``(K, C)``.
        detections (Sequence[Tensor]): Boxes ``(N, 4)``, scores and labels
            ``(N, )``.

    Returns:
        dict: See :func:`match_boxes`.
    """
    tolerance = score_tolerance(detections[1])
    errors = [torch.zeros(0, 5, dtype=torch.double)]
    for box, score, label in zip(*detections):
        ours = _rows(boxes, scores[:, int(label)], tolerance)
        theirs = _rows(box[None], score[None], tolerance)
        errors.append(_to_nearest(theirs, ours))
    return _summary(torch.cat(errors), tolerance)


def _instances(sample: Any) -> Sequence[Tensor]:
    found = sample.pred_instances
    return _clip(found.bboxes, found.scores, found.labels, sample.ori_shape)


def _clip(boxes: Tensor, scores: Tensor, labels: Tensor,
          size: Sequence[int]) -> Sequence[Tensor]:
    """Detections, clipped to the image; those wholly outside are dropped,
    which MMDeploy leaves to its user."""
    corner = boxes.new_tensor([size[1], size[0]] * 2)
    boxes = boxes.clamp(min=0).minimum(corner)
    inside = (boxes[:, 2:] > boxes[:, :2]).all(1)
    return boxes[inside], scores[inside], labels[inside]


# ------------------------------------------------------------------- compare
def compare(deployment: Deployment, files: Sequence[str],
            images: Sequence[Any]) -> List[Dict[str, Any]]:
    """Compare exported files in ONNX Runtime with the untouched PyTorch model
    on real images; graphs with free axes also with two images at once and at
    another size.

    Returns:
        list[dict]: For each image the differences of the raw outputs of each
        head, see :func:`difference`, of ``scores`` or ``boxes``, and
        ``agrees``; ``reason`` where nothing was to be compared, ``skipped``
        where a graph runs up to its raw outputs only.

    Raises:
        RuntimeError: If the files need custom operators, or have no raw
            outputs.
    """
    graphs = [Graph(path) for path in files]
    results = [_compare_one(deployment, graphs, x) for x in images]
    boxes = [x['boxes']['compared'] for x in results if 'boxes' in x]
    if boxes and not any(boxes):
        results = [dict(x, agrees=False, reason=NO_BOX) for x in results]
    return results


def _compare_one(deployment: Deployment, graphs: Sequence[Graph],
                 image: Any) -> Dict[str, Any]:
    data, inputs = deployment.create_input(image)
    samples, model, graph = data['data_samples'], deployment.model, graphs[0]
    reference = run_pytorch(model, inputs, samples)
    taps, outputs = graph.run(inputs)
    parts: Dict[str, Dict[str, Any]] = {}
    parts.update(compare_raw(graph, taps, reference))
    parts.update(_compare_others(graph, model, inputs, samples))
    for other in graphs[1:]:
        parts.update(_compare_regions(other, reference))
    result: Dict[str, Any] = dict(parts)
    agrees = all(map(is_close, parts.values()))
    if graph.skipped is not None:
        return dict(result, skipped=graph.skipped, agrees=agrees)
    if hasattr(reference.predictions[0], 'pred_score'):
        result.update(_compare_scores(outputs[0], reference))
    else:
        result.update(_compare_boxes(deployment, outputs, reference))
    return dict(result, agrees=agrees and result.pop('agree'))


def _compare_others(graph: Graph, model: Any, inputs: Tensor,
                    samples: list) -> Dict[str, Dict[str, float]]:
    """Raw outputs for the inputs that only free axes take."""
    found = {}
    for what, x in _other_inputs(graph.input.shape, inputs):
        try:
            reference = run_pytorch(model, x, samples)
        except (AssertionError, RuntimeError, ValueError):
            continue  # it is the model that takes one size only
        try:
            parts = compare_raw(graph, graph.run(x)[0], reference)
        except Exception:  # errors of ONNX Runtime have no common class
            parts = {'graph': difference(x[:0], x)}
        found.update({f'{k}, {what}': v for k, v in parts.items()})
    return found


def _other_inputs(axes: Sequence[Any],
                  inputs: Tensor) -> Iterator[Tuple[str, Tensor]]:
    """What axes of a graph that are no numbers allow, besides the input."""
    batch, _, height, width = [not isinstance(x, int) for x in axes]
    if batch:
        yield 'two images', torch.cat([inputs, inputs.flip(-1)])
    if height and width:
        size = [x + more for x, more in zip(inputs.shape[2:], (64, 32))]
        yield 'another size', F.interpolate(inputs, size)


def _compare_regions(graph: Graph,
                     reference: Reference) -> Dict[str, Dict[str, float]]:
    """The second graph of a two-stage detector: the heads of the regions."""
    call = 'roi_head.bbox_head[0]'
    _, outputs = graph.run(reference.tensors[f'{call}<0'])
    return {
        f'{call.partition("[")[0]}, regions {name}': difference(
            ours, reference.tensors[f'{call}:{index}'])
        for index, (name, ours) in enumerate(zip(graph.outputs, outputs))}


def _compare_scores(ours: Tensor, reference: Reference) -> Dict[str, Any]:
    theirs = torch.stack([x.pred_score for x in reference.predictions])
    scores = difference(ours, theirs)
    top1 = torch.equal(ours.argmax(1), theirs.argmax(1))
    return dict(scores=scores, top1=top1, agree=top1 and is_close(scores))


def _compare_boxes(deployment: Deployment, outputs: Sequence[Tensor],
                   reference: Reference) -> Dict[str, Any]:
    sample, allowed = reference.predictions[0], 0.
    theirs = _instances(sample)
    if deployment.partition == 'two_stage':
        boxes = _proposals(outputs[-2], outputs[-1], reference)
    elif deployment.partition is not None:
        boxes = find_candidates(outputs[0][0], outputs[1][0], theirs)
    else:
        boxes = match_boxes(
            _clip(outputs[0][0, :, :4], outputs[0][0, :, 4], outputs[1][0],
                  sample.ori_shape), theirs)
    if hasattr(deployment.model, 'rpn_head'):
        allowed = max(4, MAX_UNMATCHED_TWO_STAGE * boxes['compared'])
    return dict(boxes=boxes, agree=boxes['unmatched'] <= allowed)


def _proposals(boxes: Tensor, scores: Tensor,
               reference: Reference) -> Dict[str, Any]:
    """Look for the regions of the model among a graph's candidates."""
    name, *_ = [k for k in reference.calls if 'bbox_roi_extractor' in k]
    *_, regions = flat_tensors(reference.calls[name][1])
    theirs = regions[:, 1:], regions.new_zeros(len(regions))
    error = _to_nearest(_rows(*theirs, 1.),
                        _rows(boxes[0], scores.new_zeros(len(boxes[0])), 1.))
    return _summary(error, 1.)


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
