# Copyright (c) mmbasis authors. All rights reserved.
"""The contract between mmbasis and a model that it runs."""
from typing import Any, List, Optional, Type, Union

import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import is_model_wrapper
from torch import Tensor

from ..registry import ADAPTERS
from .batch import Batch, bind, count, leaf, tensors


class UnknownLossError(ValueError):
    """The model has no loss that is known here."""


class CannotRunError(RuntimeError):
    """No known way to run a model works."""


class Adapter:
    """How a model is run. This class calls it like any module.

    For a model that is run in another way, write a subclass in your package::

        @ADAPTERS.register_module()
        class MyAdapter(Adapter):

            @classmethod
            def handles(cls, model):
                return isinstance(model, MyModel)

            def bind(self, data):
                return Batch(data, kwargs=data).map(self.move)

            def predict(self, data):
                return self.model.infer(self.prepare(data).kwargs['image'])

            def loss(self, data):
                return self.model.compute_loss(**self.prepare(data).kwargs)

    Only :meth:`handles` and what differs need to be written. ``data`` is a
    batch as the dataloader yields it, or what :meth:`prepare` returned.
    No method sets modes or gradients: that is up to the caller, see
    :func:`~mmbasis.running.evaluation`.

    Args:
        model (nn.Module): The bare model, without a distributed wrapper.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @classmethod
    def handles(cls, model: nn.Module) -> bool:
        """Whether a model is run in this way."""
        raise NotImplementedError(f'{cls.__name__} must define handles()')

    def twin(self, model: nn.Module) -> 'Adapter':
        """An adapter of a copy of the model, which is run in the same way."""
        return type(self)(model)

    def prepare(self, data: Any, gradients: bool = False) -> Any:
        """A batch as the model takes it: on its device and, where it is of
        floating point, in its precision. Prepared data is not changed.

        Args:
            data (Any): The batch.
            gradients (bool): Make floating-point inputs detached leaves that
                require grad. Defaults to False.
        """
        batch = data if isinstance(data, Batch) else self.bind(data)
        return batch.map(leaf) if gradients else batch

    def bind(self, data: Any) -> Batch:
        """What :meth:`prepare` does with a batch that is not prepared yet."""
        return bind(self.model, data).map(self.move)

    def move(self, x: Tensor) -> Tensor:
        """Move a tensor to the model's device and precision."""
        weight = next((p for p in self.model.parameters()
                       if p.is_floating_point()), None)
        if weight is None:
            return x
        return x.to(weight if x.is_floating_point() else weight.device)

    def call(self, data: Any, **kwargs: Any) -> Any:
        """Call the model with a batch and further arguments."""
        # in-place layers may not change a leaf
        batch = self.prepare(data).map(
            lambda x: x + 0 if x.requires_grad and x.is_leaf else x)
        return self.model(*batch.args, **batch.kwargs, **kwargs)

    def predict(self, data: Any) -> Any:
        """Run the model as in testing, through every layer that is used
        then."""
        return self.call(data)

    def outputs(self, data: Any) -> List[Tensor]:
        """The floating-point outputs before any post-processing, in a fixed
        order: a classifier's logits, a detector's maps; those of the
        predictions where there is nothing else."""
        return [x for x in tensors(self.raw(data)) if x.is_floating_point()]

    def raw(self, data: Any) -> Any:
        """What :meth:`outputs` are taken from."""
        return self.predict(data)

    def logits(self, data: Any) -> Optional[Tensor]:
        """A classifier's logits with their graph, shape ``(N, classes)``;
        None of another model."""
        return as_logits(self.raw(data))

    def loss(self, data: Any) -> Tensor:
        """The training loss of a batch, a scalar, averaged over images as the
        model defines it.

        For a plain module it is the ``loss`` among its outputs, or the cross-
        entropy of a classifier and the labels of the batch.

        Raises:
            UnknownLossError: If there is none.
        """
        batch = self.prepare(data)
        outputs = self.raw(batch)
        loss = _entry(outputs, 'loss')
        if isinstance(loss, Tensor) and loss.dim() == 0:
            return loss
        logits = as_logits(outputs)
        for target in tensors(getattr(batch, 'rest', [])):
            if logits is not None and target.shape == logits.shape[:1] and (
                    not target.is_floating_point()):
                return F.cross_entropy(logits, target.to(logits.device).long())
        raise UnknownLossError(
            f'{type(self.model).__name__}: the training loss is known of an '
            'MMEngine model, of one that returns it, and of a plain '
            'classifier, which returns one tensor of shape (images, classes): '
            'set loss_aware=False, or register an adapter with a loss() in '
            'mmbasis.registry.ADAPTERS')

    def count_images(self, data: Any) -> int:
        """Number of images in a batch."""
        return count(data.raw if isinstance(data, Batch) else data)


class ModuleAdapter(Adapter):
    """Runs any module by calling it; see :func:`~mmbasis.running.batch.bind`
    for what is passed of a batch."""

    @classmethod
    def handles(cls, model: nn.Module) -> bool:
        return True


def as_logits(outputs: Any) -> Optional[Tensor]:
    """The logits among a classifier's outputs; None of other outputs."""
    if isinstance(outputs, (tuple, list)) and len(outputs) == 1:
        outputs = outputs[0]
    found = _entry(outputs, 'logits')
    outputs = outputs if found is None else found
    if isinstance(outputs, Tensor) and outputs.dim() == 2 and (
            outputs.is_floating_point()):
        return outputs
    return None


def _entry(outputs: Any, key: str) -> Any:
    if isinstance(outputs, dict):
        return outputs.get(key)
    return None if isinstance(outputs, Tensor) else getattr(
        outputs, key, None)


def adapter_of(model: Union[nn.Module, Adapter]) -> Adapter:
    """How a model is run.

    The class in :data:`~mmbasis.registry.ADAPTERS` that was registered last
    and handles the model; those of mmbasis come last.

    Args:
        model (nn.Module | Adapter): A model, with or without a distributed
            wrapper, or an adapter, which is returned.
    """
    if isinstance(model, Adapter):
        return model
    while is_model_wrapper(model):
        model = model.get_submodule('module')
    users: List[Type[Adapter]] = []
    ours: List[Type[Adapter]] = []
    for cls in ADAPTERS.module_dict.values():
        own = cls.__module__.startswith(f'{__package__}.')
        (ours if own else users).append(cls)
    for cls in users[::-1] + ours:
        if cls.handles(model):
            return cls(model)
    raise CannotRunError(f'no adapter handles {type(model).__name__}')
