# Copyright (c) mmbasis authors. All rights reserved.
"""Training images with the transforms of testing."""
from __future__ import annotations

import copy
from functools import partial
from typing import Any, Callable, Sequence

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, DefaultSampler
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.runner import Runner
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .annotations import Transform, annotate


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
