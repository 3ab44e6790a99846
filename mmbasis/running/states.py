# Copyright (c) mmbasis authors. All rights reserved.
"""What running a model may change, and how it is put back."""
import copy
import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple

import numpy as np
import torch
import torch.nn as nn
from mmengine.model import BaseAveragedModel
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd


def cuda_devices(model: nn.Module) -> List[int]:
    """Indices of the CUDA devices that hold parameters of a model."""
    return sorted({p.device.index for p in model.parameters() if p.is_cuda})


def get_random(devices: List[int]) -> Tuple[Any, ...]:
    """States of the generators of Python, NumPy and PyTorch."""
    return (random.getstate(), np.random.get_state(), torch.get_rng_state(),
            [torch.cuda.get_rng_state(device) for device in devices])


def set_random(devices: List[int], states: Tuple[Any, ...]) -> None:
    """Put generators back into states of :func:`get_random`."""
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    for device, state in zip(devices, states[3]):
        torch.cuda.set_rng_state(state, device)


@contextmanager
def fixed_random(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """The same random numbers whenever it is entered; generators are as
    before afterwards."""
    devices = cuda_devices(model)
    before = get_random(devices)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random(devices, before)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states of Python,
    NumPy and PyTorch are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = cuda_devices(model)
    states = get_random(devices)
    with torch.no_grad():
        try:
            model.eval()
            yield
        finally:
            # for those that do more in train() than to set a flag (LeViT)
            model.train(modes[model])
            for module, mode in modes.items():
                module.training = mode
            set_random(devices, states)


def train_deterministically(model: nn.Module) -> None:
    """Put a model in training mode, except what then changes with the batch
    or by chance: normalisations, dropout, stochastic depth.

    A loss, and whatever is compared with a model's outputs in training, needs
    that mode: some heads return other things in evaluation mode (VFNet,
    RepPoints), or the same in other units (FCOS).

    Args:
        model (nn.Module): The model, changed in place.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, _DropoutNd, nn.MultiheadAttention
                               )) or type(module).__name__.startswith('Drop'):
            module.eval()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients of weights are computed, and attributes of modules are as
    before afterwards, as are the entries of those that are dictionaries or
    lists, and buffers; moving averages stand still.

    To ask for the gradients of the inputs alone would spare the weights, too,
    but not in models that checkpoint activations. Heads may keep outputs for
    their loss (CondInst), and a model with such graphs cannot be copied; or
    hang modules elsewhere (DDQ).
    """
    unchanged = Unchanged(model)
    unchanged.enter(parameters=False)
    parameters = [x for x in model.parameters() if x.requires_grad]
    own, before = vars(nn.Module()), []
    for module in model.modules():
        values = {k: v for k, v in vars(module).items() if k not in own}
        entries = [(x, copy.copy(x))
                   for x in [*values.values(), module._modules]
                   if isinstance(x, (dict, list))]
        before.append((module, values, entries))
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True
        for module, values, entries in before:
            for key in vars(module).keys() - own.keys() - values.keys():
                del vars(module)[key]
            vars(module).update(values)
            for value, old in entries:
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(
                    old)
        unchanged.leave()


class Unchanged:
    """Context in which forward passes leave no trace in a model: queues,
    counters and parameters have their values back on every exit, and averaged
    copies (momentum encoders) stand still.

    The statistics of normalisations are left alone: recalibration wants them
    to change. One object serves passes that overlap.

    Args:
        model (nn.Module): The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._depth = 0
        self._values: List[Tuple[Dict[str, Any], str, Any, Tensor]] = []
        self._averaged: List[nn.Module] = []

    def enter(self, parameters: bool) -> None:
        """Remember values, with or without those of parameters."""
        self._depth += 1
        if self._depth > 1:
            return
        self._values.clear()
        for module in self.model.modules():
            if isinstance(module, BaseAveragedModel) and (
                    'update_parameters' not in vars(module)):
                module.update_parameters = lambda *_, **__: None
                self._averaged.append(module)
            kept: List[Dict[str, Any]] = [module._parameters] * parameters
            if not isinstance(module, _NormBase):
                kept.append(module._buffers)
            self._values += [(table, key, x, x.detach().clone())
                             for table in kept for key, x in table.items()
                             if x is not None]

    def __enter__(self) -> None:
        self.enter(True)

    def __exit__(self, *_) -> None:
        self.leave()

    def leave(self) -> None:
        """Put values back."""
        self._depth -= 1
        for table, key, tensor, value in self._values:
            table[key] = tensor
            if not torch.equal(tensor, value):
                # past autograd, whose graph may still be needed
                tensor.data.copy_(value)
        if self._depth == 0:
            self._values.clear()
            for module in self._averaged:
                vars(module).pop('update_parameters', None)
            self._averaged.clear()
