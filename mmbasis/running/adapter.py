# Copyright (c) mmbasis authors. All rights reserved.
"""The contract between mmbasis and a model that it runs: batches as arguments
of the model, and tensors in what it returns."""
import dataclasses
import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from mmengine.model import is_model_wrapper
from mmengine.structures import BaseDataElement
from torch import Tensor
from torch.utils._pytree import tree_map

from ..registry import ADAPTERS

#: Labels are drawn from softened predictions: on its training images a
#: network is so sure of itself that its gradients all but vanish.
TEMPERATURE = 2.
#: annotations of sequences, perhaps in quotes, or with a module's name
SEQUENCE = re.compile(r"'?([\w.]+\.)?(list|tuple|sequence)\b", re.IGNORECASE)
#: arguments that a model takes in training alone, as torchvision's detectors
TARGETS = re.compile(
    r'(\w+_)?(targets?|labels?|annotations?|ground_?truths?)|gt\w*')
#: what masks of classes hold where there is none to tell
IGNORED = 255


class UnknownLossError(ValueError):
    """The model has no loss that is known here."""


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested mappings, lists, tuples and dataclasses, in a
    fixed order. Data samples and whatever else are skipped."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = tuple(getattr(value, x.name)
                      for x in dataclasses.fields(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


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
        args, kwargs = tree_map(
            lambda x: function(x) if isinstance(x, Tensor) else x,
            (self.args, self.kwargs))
        return dataclasses.replace(self, args=args, kwargs=kwargs)


@ADAPTERS.register_module()
class Adapter:
    """How a bare model is run: this class calls it like any module.

    For a model that is run in another way, register a subclass that says what
    it :meth:`handles` and what differs; CONTRIBUTING.md shows one. ``data`` is
    a batch as the dataloader yields it, or what :meth:`prepare` returned. The
    caller sets modes and gradients, see :func:`~mmbasis.running.evaluation`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        #: what was found out about how to run it, by purpose
        self.ways: Dict[str, str] = {}

    @classmethod
    def handles(cls, model: nn.Module) -> bool:
        """Whether a model is run in this way; a subclass must define it."""
        return cls is Adapter

    def twin(self, model: nn.Module) -> 'Adapter':
        """An adapter of a copy of the model, which is run in the same way."""
        twin = type(self)(model)
        twin.ways.update(self.ways)
        return twin

    @property
    def weight(self) -> Tensor:
        """A weight, for device and precision of the model."""
        weights = filter(Tensor.is_floating_point, self.model.parameters())
        return next(weights, torch.empty(0))

    def prepare(self, data: Any, gradients: bool = False) -> Any:
        """A batch as the model takes it, see :meth:`move`; prepared data stays
        as it is. With ``gradients``, inputs of floating point are detached
        leaves that require grad."""
        batch = data if isinstance(data, Batch) else self.bind(data)
        return batch if not gradients else batch.map(
            lambda x: x.detach().clone().requires_grad_(x.is_floating_point()))

    def bind(self, data: Any) -> Batch:
        """Turn a batch of the dataloader into the arguments of ``forward``: of
        a tuple or list as many entries as that requires, of a dict those that
        it names; a TypeError says what lacks. Others pass whole, as a list for
        a sequence does, and a dict for one argument of another name."""
        known = parameters_of(self.model)
        named = [x for x in known if not x.kind.name.startswith('VAR_')]
        required = [x.name for x in named if x.default is x.empty]
        whole = True
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
        if whole:
            batch = Batch(data, (data, ))
        elif lacks:
            raise TypeError(f'{type(self.model).__name__}.forward requires '
                            f'{", ".join(required)}, but a batch has {found}')
        return batch.map(self.move)

    def move(self, x: Tensor) -> Tensor:
        """Move a tensor to the model's device and precision."""
        weight = self.weight
        return x.to(weight if x.is_floating_point() else weight.device)

    def call(self, data: Any, **kwargs: Any) -> Any:
        """Call the model with a batch and further arguments."""
        # in-place layers may not change a leaf
        batch = self.prepare(data).map(
            lambda x: x + 0 if x.requires_grad and x.is_leaf else x)
        return self.model(*batch.args, **batch.kwargs, **kwargs)

    def predict(self, data: Any) -> Any:
        """Run the model as in testing, through all layers used then."""
        return self.call(data)

    def outputs(self, data: Any) -> List[Tensor]:
        """The floating-point outputs in a fixed order, if possible before
        any post-processing: a classifier's logits, a detector's maps."""
        return [x for x in tensors(self.raw(data)) if x.is_floating_point()]

    def raw(self, data: Any) -> Any:
        """What :meth:`outputs` are taken from."""
        return self.predict(data)

    def logits(self, data: Any) -> Optional[Tensor]:
        """A classifier's logits with their graph, shape ``(N, classes)``;
        None of another model."""
        return _logits(self.raw(data))

    def loss(self, data: Any) -> Tensor:
        """The training loss of a batch, a scalar, averaged over images as the
        model defines it: what it returns as ``loss``, the sum of losses that
        it returns by name, or the cross-entropy of images or, in masks of
        classes, of pixels. In training mode a batch's further entries go to
        arguments that are named after :data:`TARGETS`. Raises an
        :class:`UnknownLossError` if there is none."""
        batch = self.prepare(data)
        outputs = self._train(batch) if self.model.training else (
            self.raw(batch))
        found = _entry(outputs, 'loss')
        losses = [found]
        if isinstance(outputs, Mapping) and found is None and (
                self.model.training):
            losses = list(outputs.values())
        if losses and all(isinstance(x, Tensor) and x.dim() == 0
                          for x in losses):
            return sum(losses[1:], losses[0])
        scores = _logits(outputs)
        if scores is None:
            scores = next(tensors(outputs), torch.empty(0))
        for target in tensors(getattr(batch, 'rest', [])):
            if (scores.dim() > 1 and not target.is_floating_point()
                    and target.shape == scores.shape[:1] + scores.shape[2:]):
                return F.cross_entropy(
                    scores, target.to(scores.device).long(),
                    ignore_index=IGNORED if scores.dim() > 2 else -100)
        raise UnknownLossError(
            f'{type(self.model).__name__} is no MMEngine model, returns no '
            'loss, and no scores of shape (images, classes, …) with labels of '
            'shape (images, …) behind the inputs of a batch: set '
            'loss_aware=False, or register an adapter with a loss() in '
            'mmbasis.registry.ADAPTERS')

    def _train(self, batch: Any) -> Any:
        """What :meth:`loss` is taken from in training mode."""
        if not isinstance(batch, Batch):  # an adapter may have its own
            return self.raw(batch)
        free = [x for x in parameters_of(self.model)
                if x.kind.name == 'POSITIONAL_OR_KEYWORD']
        lacks = [x.name for x in free[len(batch.args):]
                 if TARGETS.fullmatch(x.name) and x.name not in batch.kwargs]
        # what a dict has beside is of another name
        if isinstance(batch.raw, (tuple, list)):
            given = tree_map(lambda x: self.move(x) if isinstance(
                x, Tensor) else x, dict(zip(lacks, batch.rest)))
            batch = dataclasses.replace(
                batch, kwargs={**batch.kwargs, **given})
            lacks = lacks[len(given):]
        try:
            return self.raw(batch)
        except Exception as error:
            if not lacks:
                raise
            raise UnknownLossError(
                f'{type(self.model).__name__} cannot be trained without '
                f'{", ".join(lacks)} ({error}): let the batches be (inputs, '
                'targets), or set loss_aware=False') from error

    def count_images(self, data: Any) -> int:
        """Number of images in a batch: of its data samples, else of its
        inputs, which may be a list of batched tensors (views of them)."""
        data = data.raw if isinstance(data, Batch) else data
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
        nested = isinstance(inputs, Mapping)
        return self.count_images(inputs) if nested else len(inputs)


def parameters_of(model: nn.Module) -> List[inspect.Parameter]:
    """The parameters of ``forward``; none where Python cannot tell."""
    with suppress(TypeError, ValueError):
        return list(inspect.signature(model.forward).parameters.values())
    return []


def _logits(outputs: Any) -> Optional[Tensor]:
    """The logits among a classifier's outputs; None of other outputs."""
    if isinstance(outputs, (tuple, list)) and len(outputs) == 1:
        outputs = outputs[0]
    x = _entry(outputs, 'logits', outputs)
    found = isinstance(x, Tensor) and x.dim() == 2 and x.is_floating_point()
    return x if found else None


def _entry(outputs: Any, key: str, default: Any = None) -> Any:
    if isinstance(outputs, dict):
        return outputs.get(key, default)
    return getattr(outputs, key, default)


def adapter_of(model: Union[nn.Module, Adapter]) -> Adapter:
    """The adapter of a model without its distributed wrapper, if any: of the
    class that was registered last and handles it. Adapters stay."""
    if isinstance(model, Adapter):
        return model
    while is_model_wrapper(model):
        model = model.get_submodule('module')
    return next(cls for cls in reversed(ADAPTERS.module_dict.values())
                if cls.handles(model))(model)


def fisher_loss(adapter: Adapter, data: Any, batch_index: int,
                classifies: bool) -> Tensor:
    """The loss of a batch, summed over its images, whose gradients say what
    outputs of layers are worth: that of training, or, if the model
    ``classifies``, of labels drawn from its logits (seed ``batch_index``), so
    that the gradients' second moment is the Fisher information. Raises an
    :class:`UnknownLossError` if there is no loss."""
    logits = adapter.logits(data) if classifies else None
    if logits is None:
        return adapter.loss(data) * adapter.count_images(data)
    labels = sampled_labels(logits, batch_index)
    return F.cross_entropy(logits, labels, reduction='sum')


def sampled_labels(logits: Tensor, batch: int) -> Tensor:
    """Draw labels from logits of shape ``(N, classes)``, seeded by the batch
    and the same for an image however images are spread over processes."""
    rank, world = get_rank(), get_world_size()
    generator = torch.Generator().manual_seed(batch)
    uniform = torch.rand(len(logits) * world, 1, generator=generator)
    cumulative = (logits.detach() / TEMPERATURE).softmax(-1).cumsum(-1)
    labels = (cumulative < uniform[rank::world].to(cumulative)).sum(-1)
    return labels.clamp_max(logits.shape[-1] - 1)
