# Copyright (c) mmbasis authors. All rights reserved.
"""Training images with the transforms of testing."""
import copy
import re
from functools import partial
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Union,
)

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import Compose, DefaultSampler
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.runner import Runner
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .annotations import Transform, annotate

#: samples that are looked at to find one with annotations
TRIES = 16


def calibration_dataloader(source: Union[Config, Runner],
                           seed: Optional[int]) -> DataLoader:
    """A data loader for calibration: training images in an order of its own,
    with the transforms of testing and with annotations.

    What the network will see decides what it must keep: statistics of
    randomly cropped or mixed images cost accuracy. Wrappers of datasets stay,
    but transforms of their own (which mix images) do nothing. A dataset
    without a ``pipeline`` is used as it is.

    Args:
        source (Config | Runner): With a ``train_dataloader`` (config or
            built), and the transforms in ``test_dataloader`` or
            ``val_dataloader``; without those the transforms of training stay.
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
    loader.collate_fn = partial(collate_padded, loader.collate_fn)
    return loader


def _loader(source: Union[Config, Runner], split: str) -> Any:
    """The data loader of a split: a config, built, or None."""
    if isinstance(source, Config):
        return source.get(f'{split}_dataloader')
    loader = getattr(source, f'_{split}_dataloader', None)
    loop = getattr(source, f'_{split}_loop', None)
    return loader or getattr(loop, 'dataloader', None)


def _shuffled(loader: Any, seed: Optional[int]) -> DataLoader:
    """A shuffled loader of the same data, which can be changed apart."""
    if not isinstance(loader, DataLoader):
        config = copy.deepcopy(loader)
        config['sampler'] = dict(type='DefaultSampler', shuffle=True)
        config['persistent_workers'] = False
        return Runner.build_dataloader(config, seed=seed)
    dataset = _copied(loader.dataset)
    sampler = None
    if not isinstance(dataset, IterableDataset):
        sampler = DefaultSampler(dataset, shuffle=True, seed=seed)
    return DataLoader(
        dataset,
        batch_size=loader.batch_size
        or getattr(loader.batch_sampler, 'batch_size', 1),
        sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn)


def _parts(dataset: Any) -> Dict[str, list]:
    """Attributes of a wrapper that hold datasets, each as a list."""

    def is_dataset(value: Any) -> bool:
        return isinstance(value, Dataset) or (hasattr(value, '__getitem__')
                                              and hasattr(value, 'full_init'))

    parts = {}
    for name, value in vars(dataset).items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if values and all(is_dataset(x) for x in values):
            parts[name] = list(values)
    return parts


def _copied(dataset: Any) -> Any:
    """A dataset that shares all but its structure and transforms."""
    copied = copy.copy(dataset)
    for name, parts in _parts(dataset).items():
        new: Any = [_copied(x) for x in parts]
        old = getattr(dataset, name)
        setattr(copied, name,
                type(old)(new) if isinstance(old, (list, tuple)) else new[0])
    return copied


def _leaves(dataset: Any, wrappers: Optional[list] = None) -> List[Any]:
    """The innermost datasets that have transforms; those over them that have
    transforms as well are added to ``wrappers``."""
    found = [
        leaf for parts in _parts(dataset).values() for part in parts
        for leaf in _leaves(part, wrappers)
    ]
    if not hasattr(dataset, 'pipeline'):
        return found
    if found and wrappers is not None:
        wrappers.append(dataset)
    return found or [dataset]


def _steps(pipeline: Any) -> List[Transform]:
    """The transforms of a pipeline."""
    if isinstance(pipeline, (list, tuple)):
        return list(pipeline)
    return list(getattr(pipeline, 'transforms', [pipeline]))


def _set_steps(dataset: Any, steps: Sequence[Transform]) -> None:
    """Give a dataset other transforms, in the form that it has them in."""
    is_list = isinstance(dataset.pipeline, (list, tuple))
    dataset.pipeline = list(steps) if is_list else Compose(steps)


def _transforms(loader: Any) -> Optional[List[Transform]]:
    """The built transforms of a loader; of the first dataset where it has
    several."""
    if loader is None:
        return None
    dataset = (
        loader.dataset
        if isinstance(loader, DataLoader) else loader.get('dataset'))
    if isinstance(dataset, dict):
        steps = _first(list(_configured(dataset, None)))
        if steps is not None:
            return steps
        # its class may bring them
        dataset = DATASETS.build(copy.deepcopy(dataset))
    return _first([_steps(x.pipeline) for x in _leaves(dataset)])


def _first(pipelines: List[List[Transform]]) -> Optional[List[Transform]]:
    """The first of several pipelines."""
    if len({re.sub(' at 0x[0-9a-f]+', '', str(x)) for x in pipelines}) > 1:
        print_log(
            'The datasets for testing have different transforms: calibration '
            'uses those of the first', 'current')
    return pipelines[0] if pipelines else None


def _configured(dataset: dict,
                scope: Optional[str]) -> Iterator[List[Transform]]:
    """The transforms of the innermost datasets of a config, built."""
    scope = dataset.get('_scope_', scope)
    found = [
        steps for key, value in dataset.items() if key != 'pipeline'
        for part in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(part, dict) for steps in _configured(part, scope)
    ]
    if not found and dataset.get('pipeline') is not None:
        with TRANSFORMS.switch_scope_and_registry(scope):
            found = [_steps(Compose(copy.deepcopy(dataset['pipeline'])))]
    yield from found


def _see_as_in_testing(dataset: Any, testing: List[Transform]) -> None:
    """Give training datasets the transforms of testing, in place."""
    wrappers: List[Any] = []
    leaves = _leaves(dataset, wrappers)
    for wrapper in wrappers:
        _set_steps(wrapper, [])
    for leaf in leaves:
        training, steps = _steps(leaf.pipeline), copy.deepcopy(testing)
        raw = _raw_sample(leaf)
        if isinstance(raw, dict):
            steps = annotate(steps, training, raw)
        _set_steps(leaf, steps)


def _raw_sample(dataset: Any) -> Any:
    """A sample before any transform, with annotations if one is found."""
    pipeline = dataset.pipeline
    samples: List[Any] = []

    def keep(sample: Any) -> Any:
        samples.append(copy.deepcopy(sample))
        return sample

    _set_steps(dataset, [keep])
    try:
        for index in range(min(TRIES, len(dataset))):
            dataset[index]
            if not isinstance(samples[-1], dict) or samples[-1].get(
                    'instances', True):
                return samples[-1]
    finally:
        dataset.pipeline = pipeline
    return samples[0] if samples else None


def collate_padded(collate: Callable, samples: Sequence[Any]) -> Any:
    """Collate, with images of different sizes padded where that cannot stack
    them: at the right and below, with their mean colour, which is next to
    nothing for the network.

    Args:
        collate (Callable): Makes a batch of samples.
        samples (Sequence): Samples, with images ``(..., H, W)``.

    Returns:
        Any: The batch.
    """
    try:
        return collate(samples)
    except RuntimeError:
        flat = [tree_flatten(sample) for sample in samples]
        columns = [_padded(x) for x in zip(*(values for values, _ in flat))]
        return collate([
            tree_unflatten(list(row), spec)
            for row, (_, spec) in zip(zip(*columns), flat)
        ])


def _padded(values: Sequence[Any]) -> Sequence[Any]:
    """Images padded to the largest height and width; others as they are."""
    if not all(torch.is_tensor(x) and x.dim() >= 3 for x in values):
        return values
    height, width = (max(x.shape[d] for x in values) for d in (-2, -1))
    padded = []
    for image in values:
        border = (0, width - image.shape[-1], 0, height - image.shape[-2])
        mean = image.double().mean((-2, -1), keepdim=True).to(image.dtype)
        inside = F.pad(torch.ones_like(image), border).bool()
        padded.append(torch.where(inside, F.pad(image, border), mean))
    return padded
