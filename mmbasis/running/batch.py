# Copyright (c) mmbasis authors. All rights reserved.
"""Batches as the arguments of a model, and tensors in nested values."""
import dataclasses
import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

import torch.nn as nn
from mmengine.structures import BaseDataElement
from torch import Tensor

#: annotations of sequences, perhaps in quotes, or with a module's name
SEQUENCE = re.compile(r"'?([\w.]+\.)?(list|tuple|sequence)\b", re.IGNORECASE)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, lists, tuples and dataclasses, in a
    fixed order. Data samples and whatever else are skipped."""
    items: Iterable[Any] = ()
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        items = value.values()
    elif isinstance(value, (tuple, list)):
        items = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = (getattr(value, x.name) for x in dataclasses.fields(value))
    for item in items:
        yield from tensors(item)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Copy nested inputs with a function applied to each tensor, in the order
    of :func:`tensors`."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function) for item in value]
        make = getattr(value, '_make', type(value))  # of named tuples
        return make(items)
    return value


@dataclasses.dataclass
class Batch:
    """What the dataloader yielded (``raw``), prepared for a model's
    ``forward``: its arguments, and entries that it does not take: targets."""
    raw: Any
    args: Tuple[Any, ...] = ()
    kwargs: Dict[str, Any] = dataclasses.field(default_factory=dict)
    rest: List[Any] = dataclasses.field(default_factory=list)

    def map(self, function: Callable[[Tensor], Tensor]) -> 'Batch':
        """A copy with a function applied to each tensor of the arguments."""
        return dataclasses.replace(
            self,
            args=map_tensors(self.args, function),
            kwargs=map_tensors(self.kwargs, function))


def count(data: Any) -> int:
    """Number of images in a batch: of its data samples, else of its inputs,
    which may be a list of batched tensors (views of the same images)."""
    if not isinstance(data, Mapping):
        return len(data[0] if isinstance(data, (tuple, list)) else data)
    samples = data.get('data_samples')
    if isinstance(samples, (tuple, list)) and samples and isinstance(
            samples[0], BaseDataElement):
        return len(samples)
    inputs = data.get('inputs', next(iter(data.values())))
    if isinstance(inputs, (tuple, list)) and isinstance(
            inputs[0], Tensor) and inputs[0].dim() == 4:
        inputs = inputs[0]
    return count(inputs) if isinstance(inputs, Mapping) else len(inputs)


def parameters_of(model: nn.Module) -> List[inspect.Parameter]:
    """The parameters of ``forward``; none where Python cannot tell."""
    with suppress(TypeError, ValueError):
        return list(inspect.signature(model.forward).parameters.values())
    return []


def bind(model: nn.Module, data: Any) -> Batch:
    """Make a batch the arguments of a plain module.

    Of a tuple or list it takes as many entries as ``forward`` requires, of a
    dict those that ``forward`` names; a :class:`TypeError` says what lacks. It
    passes whole what is neither, a list to a model whose only argument is
    annotated as a sequence, and a dict to a model that requires one argument
    of another name, or that names none.
    """
    known = parameters_of(model)
    named = [x for x in known if not x.kind.name.startswith('VAR_')]
    required = [x.name for x in named if x.default is x.empty]
    if isinstance(data, Mapping):
        lacks = not data.keys() >= set(required)
        keywords = not known or known[-1].kind.name == 'VAR_KEYWORD'
        whole = lacks and len(required) == 1 or not (named or keywords)
        names = data.keys() if keywords else {x.name for x in named}
        batch = Batch(data, (), {k: data[k] for k in data if k in names},
                      [data[k] for k in data if k not in names])
        found = ', '.join(map(str, data))
    elif isinstance(data, (tuple, list)):
        lacks = len(required) > len(data)
        whole = len(required) == 1 and all(
            isinstance(x, Tensor) for x in data) and bool(SEQUENCE.match(
                inspect.formatannotation(named[0].annotation)))
        taken = max(len(required), 1)
        batch = Batch(data, tuple(data[:taken]), rest=list(data[taken:]))
        found = f'{len(data)} entries'
    else:
        whole = True
    if whole:
        return Batch(data, (data, ))
    if lacks:
        raise TypeError(
            f'{type(model).__name__}.forward requires {", ".join(required)}, '
            f'but a batch has {found}')
    return batch
