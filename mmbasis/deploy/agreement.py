# Copyright (c) mmbasis authors. All rights reserved.
"""Is a graph of lower precision still the network that it was?

An output is judged by its error, relative to how much the output varies: a
large constant in it would hide everything else. What a graph chose before,
candidates and detections, may have changed places where scores are nearly
equal; there the best ones must have a partner.
"""
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Sequence, Set, Tuple

import numpy as np


@dataclass(frozen=True)
class Limits:
    """What a precision may change.

    Args:
        error (float): Of an output, by its variation; of a score, by the range
            of scores; of a box, by its longer side.
        rounding (float): Of a value, by its size: added to the error.
        unmatched (float): Share of the best candidates without a partner.
    """
    error: float
    rounding: float
    unmatched: float


#: by precision, the lowest last
LIMITS = dict(fp16=Limits(.03, 2**-10, .05), int8=Limits(.3, 2**-7, .3))
PRECISIONS = tuple(LIMITS)
#: candidates that count: a detector returns about as many
BEST = 100
#: pixels that a box may always move
PIXELS = .5
#: operators that choose among what they read, in names of any domain
_CHOICES = 'NMS', 'NonMaxSuppression', 'RoiAlign', 'TopK'

Runs = Sequence[Mapping[str, np.ndarray]]


def chosen_tensors(graph: Any) -> Set[str]:
    """The tensors of an ONNX graph whose rows it chose itself, so that they
    may stand in another order in another precision."""
    found: Set[str] = set()
    for node in graph.node:  # they are in order
        if (any(x in node.op_type for x in _CHOICES)
                or not found.isdisjoint(node.input)):
            found.update(node.output)
    return found


def judge(ours: Runs, theirs: Runs, chosen: Set[str],
          precision: str) -> Dict[str, Dict[str, Any]]:
    """Compare the tensors of two graphs by name.

    Args:
        ours (Sequence[Mapping[str, ndarray]]): Of the lower precision, for
            each image.
        theirs (Sequence[Mapping[str, ndarray]]): Of fp32.
        chosen (set[str]): Those whose rows may have changed places.
        precision (str): Of :data:`PRECISIONS`.

    Returns:
        dict[str, dict]: By tensor whether it ``agrees``, the ``limit`` and,
        where it does not agree, a ``reason``. Others than chosen ones have the
        ``relative`` error, which the limit is for, and the ``largest`` one;
        chosen boxes the number ``compared`` and the share ``unmatched``. What
        has no boxes beside it and was chosen is not judged.
    """
    limits = LIMITS[precision]
    found = {}
    for name in theirs[0]:
        if name not in chosen and np.issubdtype(
                theirs[0][name].dtype, np.floating):
            pairs = [(x[name], y[name]) for x, y in zip(ours, theirs)]
            found[name] = _judge_values(pairs, limits)
    boxes = [(_detections(x, chosen), _detections(y, chosen))
             for x, y in zip(ours, theirs)]
    for name in boxes[0][1]:
        found[name] = _judge_boxes(
            [(x[name], y[name]) for x, y in boxes], limits)
    return found


def _judge_values(pairs: Sequence[Tuple[np.ndarray, np.ndarray]],
                  limits: Limits) -> Dict[str, Any]:
    """The verdict on values that stand in a fixed order."""
    if any(x.shape != y.shape for x, y in pairs):
        shapes = [(x.shape, y.shape) for x, y in pairs]
        return dict(agrees=False, relative=math.inf, largest=math.inf,
                    limit=limits.error, reason=f'other shapes: {shapes}')
    ours, theirs = (
        np.concatenate([_comparable(x[i], pairs[0][1]).ravel()
                        for x in pairs]) for i in (0, 1))
    varying = np.concatenate([
        _centred(_comparable(y, pairs[0][1])).ravel() for _, y in pairs])
    size = np.linalg.norm(theirs)
    scale = np.linalg.norm(varying) or size or 1.
    relative = float(np.linalg.norm(ours - theirs) / scale)
    limit = float(limits.error + limits.rounding * size / scale)
    found: Dict[str, Any] = dict(
        relative=relative, limit=limit, agrees=relative <= limit,
        largest=float(np.abs(ours - theirs).max(initial=0.)))
    if not found['agrees']:
        found['reason'] = (f'its error is {relative:.2g} of its variation, '
                           f'and may be {limit:.2g}')
    return found


def _comparable(x: np.ndarray, example: np.ndarray) -> np.ndarray:
    """Logits, but for a constant, of what a softmax made; others as they
    are."""
    x = x.astype(np.float64)
    if example.ndim != 2 or example.min(initial=0.) < 0 or not np.allclose(
            example.sum(1), 1, atol=1e-3):
        return x
    return _centred(np.log(x.clip(1e-30)))


def _centred(x: np.ndarray) -> np.ndarray:
    """Without the mean; of rows where these are images."""
    return x - x.mean(1 if x.ndim == 2 else None, keepdims=True)


def _detections(run: Mapping[str, np.ndarray],
                chosen: Set[str]) -> Dict[str, Tuple[np.ndarray, ...]]:
    """Chosen boxes ``(K, 4)`` of the first image with scores ``(K, C)`` by the
    name of the boxes: candidates, whose scores are another output, or
    detections, which have a label."""
    named = {k: x for k, x in run.items() if k in chosen}
    found: Dict[str, Tuple[np.ndarray, ...]] = {}
    for name, boxes in named.items():
        if (boxes.ndim != 3 or boxes.shape[2] not in (4, 5)
                or name.endswith('scores')):
            continue
        for scores in named.values():
            if scores is boxes or scores.shape[:2] != boxes.shape[:2]:
                continue
            if boxes.shape[2] == 4 and scores.ndim == 3:
                found[name] = boxes[0], scores[0]
            elif boxes.shape[2] == 5 and scores.ndim == 2:
                labels = scores[0].astype(int)
                found[name] = boxes[0, :, :4], _by_class(
                    boxes[0, :, 4], labels)
    return found


def _by_class(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Scores ``(K, C)``, 0 but for the label; padding has the label -1."""
    table = np.zeros((len(scores), labels.max(initial=0) + 1))
    rows = np.arange(len(scores))[labels >= 0]
    table[rows, labels[rows]] = scores[rows]
    return table


def _judge_boxes(pairs: Sequence[Tuple[Any, Any]],
                 limits: Limits) -> Dict[str, Any]:
    """The verdict on boxes with scores, looked for in both directions."""
    compared = lost = 0
    for ours, theirs in pairs:
        for some, others in ((theirs, ours), (ours, theirs)):
            unmatched = _without_partner(some, others, limits)
            compared += len(unmatched)
            lost += int(unmatched.sum())
    share = lost / max(compared, 1)
    found: Dict[str, Any] = dict(
        compared=compared, unmatched=share, limit=limits.unmatched,
        agrees=compared > 0 and share <= limits.unmatched)
    if not compared:
        found['reason'] = 'no box was found: take images with objects'
    elif not found['agrees']:
        found['reason'] = (
            f'{share:.0%} of the best boxes have no partner, and '
            f'{limits.unmatched:.0%} may have none')
    return found


def _without_partner(some: Tuple[np.ndarray, np.ndarray],
                     others: Tuple[np.ndarray, np.ndarray],
                     limits: Limits) -> np.ndarray:
    """Of each of the best of some boxes whether no other one is near, with
    nearly its score. Those at the end of the list may be cut off in the other:
    only scores count that are clearly above the lowest one there."""
    (boxes, scores), (other_boxes, other_scores) = some, others
    best = scores.max(1, initial=0.)
    tolerance = limits.error * max(best.max(initial=0.) - best.min(
        initial=best.max(initial=0.)), 1e-12)
    lowest = (other_scores.max(1, initial=0.).min() if len(other_scores)
              else -np.inf)
    order: List[int] = [
        i for i in np.argsort(-best)[:BEST]
        if best[i] > max(lowest + tolerance, 0)]
    lost = np.ones(len(order), bool)
    for row, index in enumerate(order):
        label = int(scores[index].argmax())
        if label >= other_scores.shape[1] or not len(other_boxes):
            continue
        side = (boxes[index, 2:] - boxes[index, :2]).max()
        moved = np.abs(other_boxes - boxes[index]).max(1)
        changed = np.abs(other_scores[:, label] - best[index])
        lost[row] = not ((moved <= PIXELS + limits.error * side)
                         & (changed <= tolerance)).any()
    return lost
