# Copyright (c) mmbasis authors. All rights reserved.
"""Annotations in the coordinates of the image that the network sees.

Pipelines of testing load annotations late, in the coordinates of the file,
where evaluators want them, or never. A training loss needs them in those of
the transformed image: loaded right after the image. What a transform does
decides here, not its name: each is tried on one sample.
"""
import copy
import random
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Optional, Set, Tuple

import numpy as np
import torch

Transform = Callable[[Any], Any]

#: coordinates, in pairs of x and y, that must follow the image
COORDINATES = ('gt_bboxes', 'gt_keypoints')


def annotate(testing: List[Transform], training: List[Transform],
             raw: dict) -> List[Transform]:
    """Let transforms of testing carry annotations.

    The loaders of training come right after the transform that reads the
    image; those of testing are dropped where training loads the same keys.

    Args:
        testing (list): Transforms of testing, which may hold others
            (``Compose``, ``TransformBroadcaster``, ``TestTimeAug``). Changed
            in place.
        training (list): Transforms of training, not changed.
        raw (dict): A sample before any transform.

    Returns:
        list: The transforms.

    Raises:
        RuntimeError: If a transform cannot take the sample.
        ValueError: If a transform moves the image but not the annotations.
    """
    with _random_state():
        wanted = _Roles.of(copy.deepcopy(training), raw).loaders
        roles = _Roles.of(testing, raw)
        known = set().union(*wanted.values())
        loaders = list(wanted) + [
            step for step, keys in roles.loaders.items() if not keys & known
        ]
        _place(testing, roles, loaders)
        _share_meta_keys(testing, training)
        sample = _verify(testing, raw)
        if single(sample) is not sample:
            testing.append(single)
    return testing


def _place(testing: List[Transform], roles: '_Roles',
           loaders: List[Transform]) -> None:
    """Put loaders right after the image's reader, in place of others."""
    home, place = testing, 0
    for steps in list(_lists(testing)):
        steps[:] = [
            x for x in steps if x is roles.reader or x not in roles.loaders
        ]
        if roles.reader in steps:
            home, place = steps, steps.index(roles.reader) + 1
    home[place:place] = loaders


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
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _inner(step: Any) -> List[List[Transform]]:
    """Lists of the transforms that a transform holds."""
    found = []
    for name in ('transforms', 'subroutines'):
        value = getattr(step, name, None)
        value = getattr(value, 'transforms', value)  # Compose
        if isinstance(value, list) and all(callable(x) for x in value):
            found.append(value)
    return found


def _lists(steps: List[Transform]) -> Iterator[List[Transform]]:
    """A list of transforms and all lists inside it."""
    yield steps
    for step in steps:
        for inner in _inner(step):
            yield from _lists(inner)


@contextmanager
def _wrapped(steps: List[Transform],
             wrap: Callable[[Transform], Transform]) -> Iterator[None]:
    """Replace the transforms that hold no others, and put them back."""
    saved = [(inner, list(inner)) for inner in _lists(steps)]
    try:
        for inner, content in saved:
            inner[:] = [x if _inner(x) else wrap(x) for x in content]
        yield
    finally:
        for inner, content in saved:
            inner[:] = content


def _is_annotation(key: Any) -> bool:
    return str(key).startswith(('gt_', 'proposals'))


class _Roles:
    """What transforms add to a sample: the image, or annotations.

    Args:
        raw (dict): A sample before any transform.
    """

    def __init__(self, raw: dict) -> None:
        self.given = set(raw)
        self.reader: Optional[Transform] = None
        self.loaders: Dict[Transform, Set[str]] = {}

    @classmethod
    def of(cls, steps: List[Transform], raw: dict) -> '_Roles':
        """Try transforms on a sample, one after the other."""
        roles = cls(raw)
        results = copy.deepcopy(raw)
        with _wrapped(steps, roles.watch):
            for step in steps:
                try:
                    results = step(results)
                except Exception:
                    # such as transforms that mix images; what really fails
                    # fails again when the annotations are verified
                    continue
                if not isinstance(results, dict):
                    break
        return roles

    def watch(self, step: Transform) -> Transform:
        """A transform that notes what it adds."""

        def watched(results: Any) -> Any:
            if isinstance(results, dict):
                self.note(step, results)
            return step(results)

        return watched

    def note(self, step: Transform, results: dict) -> None:
        """Without the annotations of others, a loader still adds its own:
        what derives something from them does not."""
        sample = {
            key: copy.deepcopy(value)
            for key, value in results.items()
            if key in self.given or not _is_annotation(key)
        }
        before = set(sample)
        try:
            added = set(step(sample)) - before
        except Exception:
            return
        if 'img' in added and self.reader is None:
            self.reader = step
        keys = {key for key in added if _is_annotation(key)}
        if keys:
            self.loaders.setdefault(step, set()).update(keys)


def _share_meta_keys(testing: List[Transform],
                     training: List[Transform]) -> None:
    """Keep the meta information that training keeps: the loss may ask for
    it."""
    packs: List[Any] = [
        x for steps in _lists(training) for x in steps
        if hasattr(x, 'meta_keys')
    ]
    steps: List[Any] = [x for inner in _lists(testing) for x in inner]
    for step in steps:
        for pack in packs:
            if type(step) is type(pack):
                step.meta_keys = tuple(
                    dict.fromkeys((*step.meta_keys, *pack.meta_keys)))


class _Geometry:
    """Where the image and its annotations are, at one point of a pipeline."""

    def __init__(self, results: dict) -> None:
        image: Any = results.get('img')
        self.image = image.copy() if isinstance(image, np.ndarray) else None
        self.size: Any = None if self.image is None else image.shape[:2]
        self.scale: Any = results.get('scale_factor')
        points = {key: _points(results.get(key)) for key in COORDINATES}
        self.points = {k: v for k, v in points.items() if v is not None}
        self.sizes: Dict[str, Tuple[int, ...]] = {}
        masks: Any = results.get('gt_masks', ())
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


def _verify(steps: List[Transform], raw: dict) -> Any:
    """Run transforms on a sample and check that annotations follow the image.

    Returns:
        Any: The transformed sample.
    """
    moved: List[str] = []

    def wrap(step: Transform) -> Transform:
        name = getattr(step, '__name__', type(step).__name__)

        def checked(results: Any) -> Any:
            before = _Geometry(results) if isinstance(results, dict) else None
            try:
                results = step(results)
            except Exception as error:
                raise RuntimeError(
                    'a training image with the transforms of testing: '
                    f'{name} fails with {type(error).__name__}: {error}'
                ) from error
            if before is not None and isinstance(results, dict):
                _compare(name, before, _Geometry(results), moved)
            return results

        return checked

    results: Any = copy.deepcopy(raw)
    with _wrapped(steps, wrap):
        for step in steps:
            results = step(results)
            if results is None:
                break
    return results


def _compare(name: str, before: _Geometry, after: _Geometry,
             moved: List[str]) -> None:
    """Compare the geometry before and after a transform.

    ``moved`` holds the transforms that moved the image so far.

    Raises:
        ValueError: If annotations do not follow the image.
    """
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
    if np.shape(scale) != (2, ) or np.abs(
            np.multiply(before.size[::-1], scale) - size).max() > 1:
        return  # scaled by another transform, or cropped or padded as well
    if not np.allclose((old * scale).clip(0, size), new.clip(0, size), atol=1):
        raise ValueError(f'{name} scales the image by {scale}, but {key} go '
                         f'from {old.tolist()} to {new.tolist()}')
