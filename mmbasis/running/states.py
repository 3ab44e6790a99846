# Copyright (c) mmbasis authors. All rights reserved.
"""What running a model may change, and how it is put back."""
import random
from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, List, Tuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
from mmengine.model import BaseAveragedModel
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd


def kept_random() -> ExitStack:
    """The random numbers of Python, NumPy and PyTorch: closing it puts their
    generators back into the states that they have now."""
    stack = ExitStack()
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():
        stack.callback(
            torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    return stack


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states of Python,
    NumPy and PyTorch are as before afterwards."""
    with torch.no_grad(), kept_random() as stack:
        for module in model.modules():
            stack.callback(setattr, module, 'training', module.training)
        # for those that do more in train() than to set a flag (LeViT)
        stack.callback(model.train, model.training)
        model.eval()
        yield


def train_deterministically(model: nn.Module) -> None:
    """Put a model in training mode, except what then changes with the batch
    or by chance: normalisations, dropout, stochastic depth. Some heads return
    other things in evaluation mode (VFNet), or other units (FCOS)."""
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, _DropoutNd, nn.MultiheadAttention
                               )) or type(module).__name__.startswith('Drop'):
            module.eval()


@contextmanager
def requiring_gradients(model: nn.Module, value: bool) -> Iterator[None]:
    """All parameters of a model require gradients meanwhile, or none."""
    with ExitStack() as stack:
        for x in model.parameters():
            if x.is_floating_point():
                stack.callback(setattr, x, 'requires_grad', x.requires_grad)
                x.requires_grad = value
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients of weights are computed. Afterwards buffers, attributes of
    modules, and entries of those that are dictionaries or lists are as before;
    moving averages stand still."""
    # Gradients of the inputs alone would not do in models that checkpoint
    # activations. Heads may keep outputs, with graphs that cannot be copied
    # (CondInst), or hang modules elsewhere (DDQ).
    with Unchanged(model).during(parameters=False), requiring_gradients(
            model, False), ExitStack() as stack:
        for module in model.modules():
            for value in (vars(module), *vars(module).values()):
                if isinstance(value, dict):
                    stack.enter_context(patch.dict(value))
                elif isinstance(value, list):
                    stack.callback(value.__setitem__, slice(None), value[:])
        yield


class Unchanged:
    """Forward passes that leave no trace in a model: afterwards queues,
    counters and parameters have their values back; averaged copies (momentum
    encoders) stand still. Statistics of normalisations may change, as
    recalibration wants. One object serves passes that overlap."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._passes = 0
        self._values: List[Tuple[dict, str, Any, Tensor]] = []
        self._averages = ExitStack()

    @contextmanager
    def during(self, parameters: bool = True) -> Iterator[None]:
        """The context of a pass, with or without values of parameters."""
        # who traces a model takes care of its state outside
        if self._passes == 0 and not torch.jit.is_tracing():
            self._remember(parameters)
        self._passes += 1
        try:
            yield
        finally:
            self._passes -= 1
            for table, key, tensor, value in self._values:
                table[key] = tensor
                if not torch.equal(tensor, value):
                    # past autograd, whose graph may still be needed
                    tensor.data.copy_(value)
            if self._passes == 0:
                self._values.clear()
                self._averages.close()

    def _remember(self, parameters: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, BaseAveragedModel):
                self._averages.enter_context(patch.object(
                    module, 'update_parameters', lambda *_, **__: None))
            tables: List[dict] = [module._parameters] * parameters
            if not isinstance(module, _NormBase):
                tables.append(module._buffers)
            self._values += [(table, key, x, x.detach().clone())
                             for table in tables for key, x in table.items()
                             if x is not None]
