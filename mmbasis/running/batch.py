# Copyright (c) mmbasis authors. All rights reserved.
"""Batches as the arguments of a model, and tensors in nested values."""
import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch.nn as nn
from mmengine.structures import BaseDataElement
from torch import Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested outputs, in a fixed order.

    Args:
        value (Any): A tensor, or a mapping, list, tuple or dataclass of such
            values. Data samples and whatever else are skipped.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of nested inputs with a function applied to each tensor, in the
    order of :func:`tensors`; what is not nested inputs is passed through."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function) for item in value]
        if hasattr(value, '_fields'):
            return type(value)(*items)
        return tuple(items) if isinstance(value, tuple) else items
    return value


@dataclasses.dataclass
class Batch:
    """A batch, prepared to be passed to a model's ``forward``.

    Args:
        raw (Any): What the dataloader yielded.
        args (tuple): Positional arguments.
        kwargs (dict): Arguments by keyword.
        rest (list): Entries that ``forward`` does not take: targets.
    """
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


def leaf(x: Tensor) -> Tensor:
    """A detached copy that requires grad, of a floating-point tensor."""
    if not x.is_floating_point():
        return x
    return x.detach().clone().requires_grad_()


def count(data: Any) -> int:
    """Number of images in a batch.

    Data samples say it. Otherwise it is the length of the inputs; of a list
    of batched tensors (views of the same images), that of the first.
    """
    if isinstance(data, Mapping):
        samples = data.get('data_samples')
        if isinstance(samples, (tuple, list)) and samples and isinstance(
                samples[0], BaseDataElement):
            return len(samples)
        inputs = data.get('inputs', next(iter(data.values())))
        if isinstance(inputs, (tuple, list)) and isinstance(
                inputs[0], Tensor) and inputs[0].dim() == 4:
            inputs = inputs[0]
        return count(inputs) if isinstance(inputs, Mapping) else len(inputs)
    return len(data[0] if isinstance(data, (tuple, list)) else data)


def parameters_of(model: nn.Module) -> Optional[List[inspect.Parameter]]:
    """The parameters of ``forward``; None where Python cannot tell."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


def bind(model: nn.Module, data: Any) -> Batch:
    """Make a batch the arguments of a plain module.

    Of a tuple or list as many entries are passed as ``forward`` requires;
    it is passed whole to a model whose only argument is annotated as a list,
    tuple or sequence. Of a dict the entries that ``forward`` names are
    passed; it is passed whole to a model that requires one argument of
    another name, or that names none. Anything else is the only argument.

    Raises:
        TypeError: If ``forward`` requires what the batch does not have.
    """
    known = parameters_of(model) or []
    named = [
        x for x in known
        if x.kind not in (inspect.Parameter.VAR_POSITIONAL,
                          inspect.Parameter.VAR_KEYWORD)
    ]
    required = [x.name for x in named if x.default is inspect.Parameter.empty]
    if isinstance(data, Mapping):
        return _bind_mapping(model, data, known, named, required)
    if not isinstance(data, (tuple, list)):
        return Batch(data, (data, ))
    if len(required) == 1 and _takes_sequence(named[0]) and all(
            isinstance(x, Tensor) for x in data):
        return Batch(data, (data, ))
    if len(required) > len(data):
        raise TypeError(
            f'{type(model).__name__}.forward requires '
            f'{", ".join(required)}, but a batch has {len(data)} entries')
    taken = max(len(required), 1)
    return Batch(data, tuple(data[:taken]), rest=list(data[taken:]))


def _bind_mapping(model: nn.Module, data: Any, known: List[inspect.Parameter],
                  named: List[inspect.Parameter],
                  required: List[str]) -> Batch:
    missing = [name for name in required if name not in data]
    keywords = not known or known[-1].kind is inspect.Parameter.VAR_KEYWORD
    if missing and len(required) == 1 or not (named or keywords):
        return Batch(data, (data, ))
    if missing:
        raise TypeError(
            f'{type(model).__name__}.forward requires {", ".join(required)}, '
            f'but a batch has {", ".join(map(str, data))}')
    names = set(data) if keywords else {x.name for x in named}
    return Batch(
        data,
        kwargs={k: v for k, v in data.items() if k in names},
        rest=[v for k, v in data.items() if k not in names])


def _takes_sequence(parameter: inspect.Parameter) -> bool:
    note = parameter.annotation
    text = note if isinstance(note, str) else getattr(note, '__name__',
                                                      str(note))
    return re.match(r'(typing\.)?(list|tuple|sequence)\b', text,
                    re.IGNORECASE) is not None
