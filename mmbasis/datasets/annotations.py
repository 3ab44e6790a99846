# Copyright (c) mmbasis authors. All rights reserved.
"""Annotations in the coordinates of the image that the network sees.

Pipelines of testing load annotations late, in the coordinates of the file,
where evaluators want them, or never. A training loss needs them in those of
the transformed image: loaded right after the image. What a transform does
decides here, not its name: each is tried on one sample.
"""
from __future__ import annotations

import copy
import random
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
from mmengine.dataset import Compose

from ..quirks import with_boxes

Transform = Callable[[Any], Any]


def annotate(testing: list[Transform], training: list[Transform],
             raw: dict) -> None:
    """Let transforms of testing carry annotations.

    The loaders of training come right after the transform that reads the
    image; those of testing are dropped where training loads the same keys.

    Args:
        testing (list): Transforms of testing, which may hold others
            (``Compose``, ``TransformBroadcaster``, ``TestTimeAug``). Changed
            in place.
        training (list): Transforms of training, not changed.
        raw (dict): A sample before any transform.

    Raises:
        RuntimeError: If a transform cannot take the sample.
        ValueError: If a transform moves the image but not the annotations.
    """
    with ExitStack() as stack:  # leaves random numbers as they were
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        _, wanted = _roles(copy.deepcopy(training), raw)
        reader, own = _roles(testing, raw)
        known = set().union(*wanted.values())
        loaders = [*wanted, *(x for x in own if not own[x] & known)]
        home, place = testing, 0
        for steps in _lists(testing):
            steps[:] = [x for x in steps if x is reader or x not in own]
            if reader in steps:
                home, place = steps, steps.index(reader) + 1
        home[place:place] = loaders
        for steps in _lists(testing):
            steps[:] = map(with_boxes, steps)
        _share_meta_keys(testing, training)
        sample = _verified(testing, raw, [reader, *loaders])
    if single(sample) is not sample:
        testing.append(single)


def single(sample: Any) -> Any:
    """A sample, or the first that test-time augmentation makes of one: those
    hold a list for each key."""
    if isinstance(sample, dict) and sample and all(
            isinstance(value, list) for value in sample.values()):
        return {key: values[0] for key, values in sample.items()}
    return sample


def _lists(steps: list[Transform]) -> list[list[Transform]]:
    """A list of transforms and all lists inside it."""
    found = [steps]
    for step in steps:
        for name in ('transforms', 'subroutines'):
            inner = getattr(step, name, None)
            inner = getattr(inner, 'transforms', inner)  # Compose
            if isinstance(inner, list) and all(callable(x) for x in inner):
                found += _lists(inner)
    return found


def _run(steps: list[Transform], raw: dict,
         watch: Callable[[Transform, Any], Any]) -> Any:
    """Transform a copy of a sample, with ``watch`` in place of each call of a
    transform that holds no others."""
    watched = {
        id(step): partial(watch, step)
        for inner in _lists(steps) for step in inner
        if len(_lists([step])) == 1
    }
    return Compose(copy.deepcopy(steps, watched))(copy.deepcopy(raw))


def _roles(
        steps: list[Transform],
        raw: dict) -> tuple[Transform | None, dict[Transform, set[str]]]:
    """The transform that adds the image to a sample, and which annotations
    others load: not those that they derive, as each sees none."""
    readers: list[Transform] = []
    loaders: dict[Transform, set[str]] = {}

    def watch(step: Transform, sample: Any) -> Any:
        # such as transforms that mix images; what really fails fails again
        # when the annotations are verified
        with suppress(Exception):
            sample, before = step(copy.copy(sample)), set(sample)
            added = set(sample) - before
            if 'img' in added:
                readers.append(step)
            keys = {x for x in added if x.startswith(('gt_', 'proposals'))}
            if keys:
                loaders.setdefault(step, set()).update(keys)
                return {k: v for k, v in sample.items() if k not in keys}
        return sample

    _run(steps, raw, watch)
    return next(iter(readers), None), loaders


def _share_meta_keys(testing: list[Transform],
                     training: list[Transform]) -> None:
    """Keep the meta information that training keeps: the loss may ask for
    it."""
    ours, theirs = ([
        step for steps in _lists(part) for step in steps
        if hasattr(step, 'meta_keys')
    ] for part in (testing, training))
    kept = {type(step): step.meta_keys for step in theirs}
    for step in ours:
        step.meta_keys = tuple(
            dict.fromkeys((*step.meta_keys, *kept.get(type(step), ()))))


def _verified(steps: list[Transform], raw: dict,
              sources: list[Transform | None]) -> Any:
    """The transformed sample, whose annotations followed the image once they
    were loaded."""

    def watch(step: Transform, sample: Any) -> Any:
        name = getattr(step, '__name__', type(step).__name__)
        try:
            sample = step(sample)
        except Exception as error:
            raise RuntimeError(
                'a training image with the transforms of testing: '
                f'{name} fails with {type(error).__name__}: {error}'
            ) from error
        image = sample.get('img') if isinstance(sample, dict) else None
        if not isinstance(image, np.ndarray) or image.ndim != 3:
            return sample
        if step in sources:
            return _marked(sample)
        # boxes were rounded to whole pixels, which may be larger now
        tolerance = 2 * max(1, max(image.shape) / sample.get('size', 1e9))
        for key, place, shown in _places(sample):
            if np.abs(np.subtract(place, shown)).max() > tolerance:
                raise ValueError(
                    f'after {name}, {key} are at {list(place)}, but the image '
                    f'shows them at {list(shown)} (left, top, right, bottom): '
                    'calibration needs them in the coordinates of the image '
                    'that the network sees')
        return sample

    return _run(steps, raw, watch)


def _boxes(sample: dict) -> np.ndarray:
    """Boxes as x1, y1, x2, y2, ``(N, 4)``; none if they are of another
    kind."""
    boxes = sample.get('gt_bboxes')
    boxes = np.array(getattr(boxes, 'tensor', boxes), dtype=np.float64)
    return boxes if boxes.shape[1:] == (4, ) else np.zeros((0, 4))


def _marked(sample: dict) -> dict:
    """The sample with a green image and its largest box in magenta: neither
    padding in grey nor an order of colours changes which is which."""
    boxes = _boxes(sample)
    if not len(boxes) or sample['img'].shape[2] != 3:
        return sample
    index = (boxes[:, 2:] - boxes[:, :2]).prod(1).argmax()
    x1, y1, x2, y2 = boxes[index].round().astype(int).clip(0)
    image = np.zeros_like(sample['img'])
    image[..., 1] = 255
    image[y1:y2, x1:x2] = (255, 0, 255)
    return dict(
        sample,
        img=image,
        marked=(index, len(boxes)),
        size=max(image.shape))


def _places(sample: Any) -> Iterator[tuple[str, Sequence, Sequence]]:
    """Where annotations are, and where the image shows them."""
    image, masks = sample['img'], sample.get('gt_masks')
    seg_map = sample.get('gt_seg_map')
    whole = (0, 0, *image.shape[1::-1])
    if hasattr(masks, 'height'):
        yield 'gt_masks', (0, 0, masks.width, masks.height), whole
    if np.ndim(seg_map) == 2:
        yield 'gt_seg_map', (0, 0, *seg_map.shape[::-1]), whole
    index, count = sample.get('marked', (0, 0))
    boxes = _boxes(sample)
    # no transform has dropped boxes or colours
    if count and count == len(boxes) and image.shape[2] == 3:
        contrast = image[..., 0].astype(np.float64) - image[..., 1]
        y, x = (contrast > max(contrast.max() / 2, 0)).nonzero()
        if len(x):  # it is not cut off
            yield 'gt_bboxes', boxes[index].clip(0, whole[2:] * 2), (
                x.min(), y.min(), x.max() + 1, y.max() + 1)
