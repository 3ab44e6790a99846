# Copyright (c) mmbasis authors. All rights reserved.
"""Training images with the transforms of testing."""
import copy
from functools import partial
from typing import Any, Callable, List, Optional, Sequence, Tuple, Union

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, DefaultSampler
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.runner import Runner
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .annotations import Transform, annotate


def calibration_dataloader(source: Union[Config, Runner],
                           seed: Optional[int]) -> DataLoader:
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
    # copies what wraps the datasets, and shares what these hold
    shared = {
        id(value): value
        for leaf in _leaves(loader.dataset) for value in vars(leaf).values()
    }
    dataset = loader.dataset
    if shared:
        dataset = copy.deepcopy(dataset, shared)
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


def _parts(dataset: Any) -> List[Any]:
    """The datasets that a wrapper holds."""
    values: List[Any] = []
    for value in vars(dataset).values():
        values += value if isinstance(value, (list, tuple)) else [value]
    return [
        x for x in values if isinstance(x, Dataset) or hasattr(x, 'full_init')
    ]


def _leaves(dataset: Any) -> List[Any]:
    """The innermost datasets that have transforms."""
    inner = [leaf for part in _parts(dataset) for leaf in _leaves(part)]
    if not inner and hasattr(dataset, 'pipeline'):
        return [dataset]
    return inner


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
        configs = _configured(dataset, None)
        if any(x != configs[0] for x in configs):
            print_log(
                'The datasets for testing have different transforms: '
                'calibration uses those of the first', 'current')
        for pipeline, scope in configs:
            with TRANSFORMS.switch_scope_and_registry(scope):
                return _steps(Compose(copy.deepcopy(pipeline)))
        # its class may bring them
        dataset = DATASETS.build(copy.deepcopy(dataset))
    return next((_steps(x.pipeline) for x in _leaves(dataset)), None)


def _configured(dataset: dict,
                scope: Optional[str]) -> List[Tuple[Any, Optional[str]]]:
    """The pipelines of the innermost datasets of a config, with scopes."""
    scope = dataset.get('_scope_', scope)
    found = [
        pipeline for key, value in dataset.items() if key != 'pipeline'
        for part in (value if isinstance(value, (list, tuple)) else [value])
        if isinstance(part, dict) for pipeline in _configured(part, scope)
    ]
    if not found and dataset.get('pipeline') is not None:
        return [(dataset['pipeline'], scope)]
    return found


def _see_as_in_testing(dataset: Any, testing: List[Transform]) -> None:
    """Give training datasets the transforms of testing, in place, and those
    around them none."""
    leaves = _leaves(dataset)
    if dataset not in leaves:
        for part in _parts(dataset):
            _see_as_in_testing(part, testing)
        if leaves and hasattr(dataset, 'pipeline'):
            _set_steps(dataset, [])
        return
    training, steps = _steps(dataset.pipeline), copy.deepcopy(testing)
    _set_steps(dataset, [])
    raw = _raw_sample(dataset)
    if isinstance(raw, dict):
        annotate(steps, training, raw)
    _set_steps(dataset, steps)


def _raw_sample(dataset: Any) -> Any:
    """A sample, with annotations if one of the first 16 has them."""
    sample = None
    for index in range(min(16, len(dataset))):
        sample = dataset[index]
        if not isinstance(sample, dict) or sample.get('instances', True):
            break
    return sample


def _collate_padded(collate: Callable, samples: Sequence[Any]) -> Any:
    """Collate, with images of different sizes padded where that cannot stack
    them: at the right and below, with their mean colour, which is next to
    nothing for the network."""
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
        mean = image.double().mean((-2, -1), keepdim=True).to(image.dtype)
        canvas = mean.expand(*mean.shape[:-2], height, width).clone()
        canvas[..., :image.shape[-2], :image.shape[-1]] = image
        padded.append(canvas)
    return padded
