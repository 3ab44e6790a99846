# Copyright (c) mmbasis authors. All rights reserved.
"""Annotations in the coordinates of the image that the network sees.

Pipelines of testing load annotations late, in the coordinates of the file,
where evaluators want them, or never. A training loss needs them in those of
the transformed image: loaded right after the image. What a transform does
decides here, not its name: each is tried on one sample.
"""
import copy
import random
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import torch

Transform = Callable[[Any], Any]


def annotate(testing: List[Transform], training: List[Transform],
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
    with _random_state():
        wanted = _Roles(copy.deepcopy(training), raw).loaders
        roles = _Roles(testing, raw)
        known = set().union(*wanted.values())
        loaders = list(wanted) + [
            step for step, keys in roles.loaders.items() if not keys & known
        ]
        home, place = testing, 0
        for steps in _lists(testing):
            steps[:] = [
                x for x in steps if x is roles.reader or x not in roles.loaders
            ]
            if roles.reader in steps:
                home, place = steps, steps.index(roles.reader) + 1
        home[place:place] = loaders
        _share_meta_keys(testing, training)
        sample = _verified(testing, raw)
        if single(sample) is not sample:
            testing.append(single)


def single(sample: Any) -> Any:
    """A sample, or the first that test-time augmentation makes of one: those
    hold a list for each key."""
    if isinstance(sample, dict) and sample and all(
            isinstance(value, list) for value in sample.values()):
        return {key: values[0] for key, values in sample.items()}
    return sample


@contextmanager
def _random_state() -> Iterator[None]:
    """Leave the generators of random numbers as they were."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _inner(step: Any) -> List[List[Transform]]:
    """Lists of the transforms that a transform holds."""
    found = []
    for name in ('transforms', 'subroutines'):
        value = getattr(step, name, None)
        value = getattr(value, 'transforms', value)  # Compose
        if isinstance(value, list) and all(callable(x) for x in value):
            found.append(value)
    return found


def _lists(steps: List[Transform]) -> List[List[Transform]]:
    """A list of transforms and all lists inside it."""
    return [steps] + [
        x for step in steps for inner in _inner(step) for x in _lists(inner)
    ]


@contextmanager
def _watched(steps: List[Transform],
             watch: Callable[[Transform, Any], Any]) -> Iterator[None]:
    """Let ``watch`` call the transforms that hold no others."""
    saved = [(inner, list(inner)) for inner in _lists(steps)]
    try:
        for inner, content in saved:
            inner[:] = [
                x if _inner(x) else partial(watch, x) for x in content
            ]
        yield
    finally:
        for inner, content in saved:
            inner[:] = content


def _is_annotation(key: Any) -> bool:
    return str(key).startswith(('gt_', 'proposals'))


class _Roles:
    """The transform that adds the image to a sample, and what the loaders of
    annotations add. Tries the transforms one after the other."""

    def __init__(self, steps: List[Transform], raw: dict) -> None:
        self.given = set(raw)
        self.reader: Optional[Transform] = None
        self.loaders: Dict[Transform, Set[str]] = {}
        results = copy.deepcopy(raw)
        with _watched(steps, self.watch):
            for step in steps:
                # such as transforms that mix images; what really fails fails
                # again when the annotations are verified
                with suppress(Exception):
                    results = step(results)

    def watch(self, step: Transform, results: Any) -> Any:
        """Note what a transform adds. Without the annotations of others, a
        loader still adds its own: what derives something from them does
        not."""
        if isinstance(results, dict):
            sample = {
                key: copy.deepcopy(value)
                for key, value in results.items()
                if key in self.given or not _is_annotation(key)
            }
            before = set(sample)
            with suppress(Exception):
                added = set(step(sample)) - before
                if 'img' in added and self.reader is None:
                    self.reader = step
                keys = set(filter(_is_annotation, added))
                if keys:
                    self.loaders.setdefault(step, set()).update(keys)
        return step(results)


def _share_meta_keys(testing: List[Transform],
                     training: List[Transform]) -> None:
    """Keep the meta information that training keeps: the loss may ask for
    it."""
    ours, theirs = (
        [x for steps in _lists(part) for x in steps if hasattr(x, 'meta_keys')]
        for part in (testing, training))
    for step in ours:
        for pack in theirs:
            if type(step) is type(pack):
                step.meta_keys = tuple(
                    dict.fromkeys((*step.meta_keys, *pack.meta_keys)))


class _Geometry:
    """Where the image and its annotations are, at one point of a pipeline."""

    def __init__(self, results: Any) -> None:
        if not isinstance(results, dict):
            results = {}
        image = results.get('img')
        self.image = image.copy() if isinstance(image, np.ndarray) else None
        self.size: Any = None if self.image is None else image.shape[:2]
        self.scale = results.get('scale_factor')
        self.points: Dict[str, np.ndarray] = {}
        for key in ('gt_bboxes', 'gt_keypoints'):
            points = _points(results.get(key))
            if points is not None:
                self.points[key] = points
        self.sizes: Dict[str, Tuple[int, ...]] = {}
        masks = results.get('gt_masks', ())
        if hasattr(masks, 'height') and len(masks):
            self.sizes['gt_masks'] = (masks.height, masks.width)
        if isinstance(results.get('gt_seg_map'), np.ndarray):
            self.sizes['gt_seg_map'] = results['gt_seg_map'].shape[:2]


def _points(value: Any) -> Optional[np.ndarray]:
    """Corners of boxes ``(2N, 2)`` or keypoints ``(N, 2)``; None if there are
    none, or boxes are of another kind than x1, y1, x2, y2."""
    value = getattr(value, 'tensor', value)  # MMDetection's boxes
    if not isinstance(value, (np.ndarray, torch.Tensor)) or not len(value):
        return None
    value = np.array(value, dtype=np.float64)
    if value.ndim == 3:
        return value[..., :2].reshape(-1, 2)
    return value.reshape(-1, 2) if value.shape[-1] == 4 else None


def _verified(steps: List[Transform], raw: dict) -> Any:
    """The transformed sample, whose annotations followed the image."""
    moved: List[str] = []

    def watch(step: Transform, results: Any) -> Any:
        name = getattr(step, '__name__', type(step).__name__)
        before = _Geometry(results)
        try:
            results = step(results)
        except Exception as error:
            raise RuntimeError(
                'a training image with the transforms of testing: '
                f'{name} fails with {type(error).__name__}: {error}'
            ) from error
        _compare(name, before, _Geometry(results), moved)
        return results

    results: Any = copy.deepcopy(raw)
    with _watched(steps, watch):
        for step in steps:
            results = step(results)
            if results is None:
                break
    return results


def _compare(name: str, before: _Geometry, after: _Geometry,
             moved: List[str]) -> None:
    """Check that annotations follow the image through a transform; ``moved``
    holds those that moved the image so far."""
    if after.image is None:
        return
    if before.image is None:
        moved.clear()  # the next frame of a video
        return
    new = {*after.points, *after.sizes} - {*before.points, *before.sizes}
    if new and moved:
        raise ValueError(
            f'{name} loads {sorted(new)} after {moved[-1]} has moved the '
            'image, so they are off: load annotations right after the image')
    if _is_moved(before.image, after.image):
        moved.append(name)
        for key in set(before.points) & set(after.points):
            _check_points(name, key, before, after)
    for key in set(before.sizes) & set(after.sizes):
        if before.sizes[key] == before.size and np.abs(
                np.subtract(after.sizes[key], after.size)).max() > 1:
            raise ValueError(f'after {name}, {key} is of size '
                             f'{after.sizes[key]}, but the image of '
                             f'{after.size}')


def _is_moved(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether a transform scales or flips an image. Padding or cropping at the
    right and below moves nothing."""
    if before.shape[:2] != after.shape[:2]:
        height, width = np.minimum(before.shape[:2], after.shape[:2])
        return not np.array_equal(before[:height, :width],
                                  after[:height, :width])
    return not np.array_equal(before, after) and any(
        np.array_equal(flipped, after)
        for flipped in (before[:, ::-1], before[::-1], before[::-1, ::-1]))


def _check_points(name: str, key: str, before: _Geometry,
                  after: _Geometry) -> None:
    """Points move with the image, and scale as much as the transform notes."""
    old, new = before.points[key], after.points[key]
    if old.shape != new.shape:
        return
    if np.allclose(old, new):
        raise ValueError(
            f'{name} moves the image ({before.size} to {after.size}, height '
            f'and width) but not {key}: calibration needs them in the '
            'coordinates of the image that the network sees')
    scale, size = after.scale, after.size[::-1]
    if np.shape(scale) != (2, ) or not np.allclose(
            np.multiply(before.size[::-1], scale), size, atol=1, rtol=0):
        return  # scaled by another transform, or cropped or padded as well
    if not np.allclose((old * scale).clip(0, size), new.clip(0, size), atol=1):
        raise ValueError(f'{name} scales the image by {scale}, but {key} go '
                         f'from {old.tolist()} to {new.tolist()}')
