# Copyright (c) mmbasis authors. All rights reserved.
"""Forward passes: what they may change of a model and how it is put back, and
those that stop at layers, and at the sums that layers go into."""
import random
import threading
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from queue import SimpleQueue
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple
from unittest.mock import patch

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseAveragedModel
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode

from ..layers import observe
from .adapter import Adapter, tensors

#: functions that add two tensors
SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__,
        Tensor.__iadd__)
#: the attribute that marks a tensor as the output of a layer
_BRANCH = '_mmbasis_branch'
_CURRENT = threading.local()


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


def requiring_gradients(model: nn.Module, value: bool) -> ExitStack:
    """All parameters require gradients until it is closed, or none."""
    stack = ExitStack()
    for x in filter(Tensor.is_floating_point, model.parameters()):
        stack.callback(setattr, x, 'requires_grad', x.requires_grad)
        x.requires_grad = value
    return stack


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients of weights are computed. Afterwards buffers, attributes of
    modules, and entries of those that are dictionaries or lists are as before;
    moving averages stand still."""
    # Gradients of the inputs alone would not do in models that checkpoint
    # activations. Heads may keep outputs, with graphs that cannot be copied
    # (CondInst), or hang modules elsewhere (DDQ).
    with Unchanged(model).during(parameters=False), requiring_gradients(
            model, False) as stack:
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
        self.model, self._passes = model, 0
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


class Sum(NamedTuple):
    """A sum that a layer's output is about to go into, as of a residual block:
    of ``other``, and ``branch``: the output times ``scale`` (of a batch
    normalisation, ``(P, )``, or one), plus a constant for each channel."""
    branch: Tensor
    other: Tensor
    scale: Tensor


class Pass:
    """The forward pass of one batch, which stops at layers.

    A hook of the layer calls :meth:`stop`, and the model goes on at
    :meth:`advance`: so all batches go through a model side by side, and once.
    The end of a ``with`` block ends it. Each pass is a thread, of which one
    runs at a time: PyTorch keeps the states of gradients, autocast, modes and
    warnings by thread. Passes that were made together draw the same random
    numbers.

    Args:
        adapter (Adapter): The model.
        data (Any): The batch.
        watch (SumWatch, optional): Sees the sums of this pass.
    """
    #: where the pass stands; None at its end
    name: Optional[str] = None
    #: what the layer takes or returns, and the sum, if it stands at one
    tensor: Any = None
    sum: Any = None

    def __init__(self, adapter: Adapter, data: Any,
                 watch: Optional['SumWatch'] = None) -> None:
        self.adapter, self.data, self.watch = adapter, data, watch
        #: inputs of layers that wait for their sums
        self.inputs: Dict[str, Tensor] = {}
        # whether to go on, and then an error, if any
        self._orders: SimpleQueue = SimpleQueue()
        self._reports: SimpleQueue = SimpleQueue()
        self._random = kept_random()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> 'Pass':
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._orders.put(False)
        self._thread.join()

    def advance(self) -> None:
        """Go on to the next layer, or to the end of the pass; raises what the
        model raises on the way."""
        # not kept for longer than needed
        self.name = self.tensor = self.sum = None
        with kept_random():
            self._random.close()
            self._orders.put(True)
            error = self._reports.get()
            self._random = kept_random()
        if error is not None:
            raise error

    def stop(self, name: str, tensor: Any, into: Optional[Sum] = None) -> None:
        """Hand control back; called in the middle of the pass."""
        self.name, self.tensor, self.sum = name, tensor, into
        self._reports.put(None)
        if not self._orders.get():
            raise SystemExit  # ends the thread

    def _run(self) -> None:
        _CURRENT.value = self
        report = None
        try:
            if not self._orders.get():
                return
            with torch.no_grad(), self.watch or nullcontext(), (
                    torch.cuda.device_of(self.adapter.weight)):  # by thread
                self.adapter.predict(self.data)
        except BaseException as error:
            report = error
        self._reports.put(report)


def current_pass() -> Optional[Pass]:
    """The pass that is running, None outside of any."""
    return getattr(_CURRENT, 'value', None)


class SumWatch(TorchFunctionMode):
    """Sees into which sums the outputs of layers go: where it computes
    ``x + norm(layer(z))``, the layer can make up for what is wrong with ``x``
    as well. :meth:`probe` finds these layers; later passes stop at the sum."""

    def __init__(self) -> None:
        super().__init__()
        #: layers whose output goes into a sum and nowhere else
        self.residual: Set[str] = set()
        #: layers that take one input (no offsets), as they ran
        self.order: List[str] = []

    def probe(self, adapter: Adapter, layers: Dict[str, nn.Module],
              data: Any) -> None:
        """Run a model on a batch to find which of its layers, given by name,
        are residual."""
        with self, ExitStack() as stack:
            for name, module in layers.items():
                hook = partial(self.follow, name)
                stack.callback(observe(module, hook).remove)
            adapter.predict(data)

    def follow(self, name: str, module: nn.Module, args: tuple, kwargs: dict,
               y: Any) -> None:
        """The hook of a layer in :meth:`probe`, or in a pass of one's own."""
        if name not in self.order and len(args) == 1:
            self.order.append(name)
            self.mark(name, y)

    @staticmethod
    def mark(name: str, y: Tensor) -> None:
        """Follow a layer's output."""
        setattr(y, _BRANCH, (name, y.new_ones(())))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        marked = [x for x in tensors((args, kwargs)) if hasattr(x, _BRANCH)]
        if marked and func in SUMS and _is_plain_sum(*args, **kwargs):
            self._at_sum(*args)
            marked = []
        result = func(*args, **kwargs)
        if marked and any(True for _ in tensors(result)):
            # a normalisation, or something else makes use of it
            (name, before), *_ = [vars(x).pop(_BRANCH, None) for x in marked]
            if func is F.batch_norm and marked[0] is args[0]:
                scale = _norm_scale(*args, **kwargs)
                if scale is not None:
                    setattr(result, _BRANCH, (name, before * scale))
        return result

    def _at_sum(self, left: Tensor, right: Tensor) -> None:
        """The layer that ran last takes the sum; both marks end here."""
        found = [(*vars(x).pop(_BRANCH), x, y)
                 for x, y in ((left, right), (right, left))
                 if hasattr(x, _BRANCH)]
        name, scale, branch, other = max(
            found, key=lambda entry: self.order.index(entry[0]))
        current = current_pass()
        if current is None:  # under probe()
            self.residual.add(name)
        else:
            current.stop(name, current.inputs.pop(name, branch),
                         Sum(branch, other, scale))


def _is_plain_sum(*args: Any, **kwargs: Any) -> bool:
    if kwargs or len(args) != 2:
        return False
    left, right = args
    return (isinstance(left, Tensor) and isinstance(right, Tensor)
            and left is not right
            and (left.shape, left.dtype) == (right.shape, right.dtype))


def _norm_scale(input, running_mean, running_var, weight=None, bias=None,
                training=False, momentum=.1, eps=1e-5) -> Optional[Tensor]:
    """The scale of each channel in ``F.batch_norm``; None in training."""
    scale = None if training else (running_var + eps).rsqrt()
    return scale if weight is None or scale is None else scale * weight
