# Copyright (c) mmbasis authors. All rights reserved.
"""Training images with the transforms of testing, and annotations in the
coordinates of the image that the network sees.

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
from mmengine.config import Config
from mmengine.dataset import Compose, DefaultSampler
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.runner import Runner
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..quirks import with_boxes

Transform = Callable[[Any], Any]


def calibration_dataloader(source: Config | Runner,
                           seed: int | None) -> DataLoader:
    """A data loader for calibration: training images in an order of its own,
    with the transforms of testing and with annotations.

    Statistics of randomly cropped or mixed images cost accuracy. Wrappers of
    datasets stay, but have no transforms of their own (which mix images). A
    dataset without a ``pipeline`` is used as it is.

    Args:
        source (Config | Runner): With a ``train_dataloader`` (config or
            built), and the transforms in ``test_dataloader`` or
            ``val_dataloader``, else those of training.
        seed (int, optional): Of the order.

    Returns:
        DataLoader: In a distributed run, of this process' share. Images of
        different sizes are padded where they would be stacked.

    Raises:
        KeyError: If there is no ``train_dataloader``.
        RuntimeError: If a transform of testing cannot take a training image.
        ValueError: If a transform moves images but not their annotations.
    """
    training = _loader(source, 'train')
    if training is None:
        raise KeyError('calibration needs the training images, but there is '
                       'no train_dataloader')
    loader = _shuffled(training, seed)
    for split in ('test', 'val'):
        transforms = _transforms(_loader(source, split))
        if transforms is not None:
            _see_as_in_testing(loader.dataset, transforms)
            break
    loader.collate_fn = partial(_collate_padded, loader.collate_fn)
    return loader


def _loader(source: Config | Runner, split: str) -> Any:
    """The data loader of a split: a config, built, or None."""
    if isinstance(source, Config):
        return source.get(f'{split}_dataloader')
    loader = getattr(source, f'_{split}_dataloader', None)
    loop = getattr(source, f'_{split}_loop', None)
    return loader or getattr(loop, 'dataloader', None)


def _shuffled(loader: Any, seed: int | None) -> DataLoader:
    """A shuffled loader of the same data, which can be changed apart."""
    if not isinstance(loader, DataLoader):
        config = copy.deepcopy(loader)
        config['sampler'] = dict(type='DefaultSampler', shuffle=True)
        config['persistent_workers'] = False
        return Runner.build_dataloader(config, seed=seed)
    dataset, sampler = loader.dataset, None
    leaves, _ = _with_transforms(dataset)
    if leaves:  # copies what wraps the datasets, and shares what these hold
        held = {id(x): x for leaf in leaves for x in vars(leaf).values()}
        dataset = copy.deepcopy(dataset, held)
    if not isinstance(dataset, IterableDataset):
        sampler = DefaultSampler(dataset, shuffle=True, seed=seed)
    return DataLoader(
        dataset,
        batch_size=loader.batch_size
        or getattr(loader.batch_sampler, 'batch_size', 1),
        sampler=sampler,
        **{
            key: getattr(loader, key)
            for key in ('num_workers', 'collate_fn', 'pin_memory', 'drop_last',
                        'worker_init_fn')
        })


def _with_transforms(dataset: Any) -> tuple[list[Any], list[Any]]:
    """Datasets that have transforms, or their configs: the innermost, and
    those around them."""
    is_config = isinstance(dataset, dict)
    content = dataset if is_config else vars(dataset)
    leaves: list[Any] = []
    around: list[Any] = []
    for key, value in content.items():
        for part in value if isinstance(value, (list, tuple)) else [value]:
            is_part = isinstance(part, dict) if is_config else isinstance(
                part, Dataset) or hasattr(part, 'full_init')
            if is_part and key != 'pipeline':
                inner, between = _with_transforms(part)
                leaves += inner
                around += between
    if content.get('pipeline', getattr(dataset, 'pipeline', None)) is not None:
        (around if leaves else leaves).append(dataset)
    return leaves, around


def _steps(pipeline: Any) -> list[Transform]:
    """The transforms of a pipeline."""
    if isinstance(pipeline, (list, tuple)):
        return list(pipeline)
    return list(getattr(pipeline, 'transforms', [pipeline]))


def _set_steps(dataset: Any, steps: list[Transform]) -> None:
    """Give a dataset other transforms, in the form that it has them in."""
    is_list = isinstance(dataset.pipeline, (list, tuple))
    dataset.pipeline = steps if is_list else Compose(steps)


def _transforms(loader: Any) -> list[Transform] | None:
    """The built transforms of a loader; of the first dataset where it has
    several."""
    if loader is None:
        return None
    is_built = isinstance(loader, DataLoader)
    dataset = loader.dataset if is_built else loader['dataset']
    leaves, _ = _with_transforms(dataset)
    if isinstance(dataset, dict) and not leaves:  # its class may bring them
        leaves, _ = _with_transforms(DATASETS.build(copy.deepcopy(dataset)))
    if not leaves:
        return None
    if isinstance(leaves[0], dict):
        with TRANSFORMS.switch_scope_and_registry(leaves[0].get('_scope_')):
            return Compose(copy.deepcopy(leaves[0]['pipeline'])).transforms
    return _steps(leaves[0].pipeline)


def _see_as_in_testing(dataset: Any, testing: list[Transform]) -> None:
    """Give training datasets the transforms of testing, in place, and those
    around them none."""
    leaves, around = _with_transforms(dataset)
    for wrapper in around:
        _set_steps(wrapper, [])
    for leaf in leaves:
        training, steps = _steps(leaf.pipeline), copy.deepcopy(testing)
        _set_steps(leaf, [])
        samples = (leaf[i] for i in range(min(16, len(leaf))))
        # with annotations, if one of the first has them
        raw = next((x for x in samples if not isinstance(x, dict)
                    or x.get('instances', True)), leaf[0])
        if isinstance(raw, dict):
            annotate(steps, training, raw)
        _set_steps(leaf, steps)


def _collate_padded(collate: Callable, samples: Sequence[Any]) -> Any:
    """Collate, with images of different sizes padded where that cannot stack
    them: at the right and below, with their mean colour, which is next to
    nothing for the network."""

    def pad(value: Any) -> Any:
        if not _is_image(value):
            return value
        mean = value.double().mean((-2, -1), keepdim=True).to(value.dtype)
        canvas = mean.expand(*mean.shape[:-2], *size).clone()
        canvas[..., :value.shape[-2], :value.shape[-1]] = value
        return canvas

    try:
        return collate(samples)
    except RuntimeError:
        images = filter(_is_image, tree_flatten(samples)[0])
        size = [max(x) for x in zip(*(x.shape[-2:] for x in images))]
        return collate(tree_map(pad, samples))


def _is_image(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() >= 3


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
