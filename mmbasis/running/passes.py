# Copyright (c) mmbasis authors. All rights reserved.
"""Forward passes that stop at layers, and at the sums that layers go into."""
import inspect
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..layers import observe
from .batch import tensors
from .states import cuda_devices, get_random, set_random

if TYPE_CHECKING:
    from .adapter import Adapter

_SUMS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__,
         Tensor.__iadd__)
_BATCH_NORM = inspect.signature(F.batch_norm)
#: the attribute that marks a tensor as the output of a layer
_BRANCH = '_mmbasis_branch'


@dataclass
class Sum:
    """A sum that a layer's output is about to go into, as of a residual block.

    Args:
        branch (Tensor): The operand that comes from the layer: ``scale``
            times its output plus a constant for each channel.
        other (Tensor): The other operand.
        scale (Tensor): That of a batch normalisation in between, shape
            ``(P, )``; or one, a scalar.
    """
    branch: Tensor
    other: Tensor
    scale: Tensor


class Pass:
    """The forward pass of one batch, which stops at layers.

    A hook of the layer hands control back to who advanced the pass, in the
    middle of whatever the model's ``forward`` does; it goes on when it is
    advanced again. So all batches go through the model side by side and
    once, without anybody knowing how the model is built.

    Each pass is a thread, of which one runs at a time, and not a coroutine:
    PyTorch keeps the states of gradients, autocast, modes and warnings by
    thread, and they have to stay those of the pass where it stopped. It can
    be left at any time: as a context manager, it is ended on exit. It has
    random numbers of its own, so that passes of two models that were made
    together draw the same ones.

    Args:
        adapter (Adapter): The model.
        data (Any): The batch.
        watch (SumWatch, optional): Sees the sums of this pass.
    """

    #: what the layer takes or returns, while the pass stands at it
    tensor: Tensor
    #: the sum, while the pass stands at one
    sum: Sum

    def __init__(self,
                 adapter: 'Adapter',
                 data: Any,
                 watch: Optional['SumWatch'] = None) -> None:
        self.adapter, self.data, self.watch = adapter, data, watch
        #: inputs of layers that wait for their sums
        self.inputs: Dict[str, Tensor] = {}
        #: where the pass stands; None at its end
        self.name: Optional[str] = None
        self._goes_on = threading.Semaphore(0)
        self._stands = threading.Semaphore(0)
        self._error: Optional[BaseException] = None
        self._left = False
        self._devices = cuda_devices(adapter.model)
        self._random = get_random(self._devices)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> 'Pass':
        return self

    def __exit__(self, *_) -> None:
        self._left = True
        if self._thread.is_alive():
            self._goes_on.release()
            self._thread.join()

    def advance(self) -> None:
        """Go on to the next layer, or to the end of the pass.

        Raises:
            Exception: What the model raised on the way.
        """
        self.name = None
        for key in ('tensor', 'sum'):  # not kept for longer than needed
            vars(self).pop(key, None)
        if self._thread.ident is None:
            self._thread.start()
        outside = get_random(self._devices)
        set_random(self._devices, self._random)
        self._goes_on.release()
        self._stands.acquire()
        self._random = get_random(self._devices)
        set_random(self._devices, outside)
        if self._error is not None:
            raise self._error

    def stop(self,
             name: str,
             tensor: Tensor,
             into: Optional[Sum] = None) -> None:
        """Hand control back; called in the middle of the pass."""
        self.name, self.tensor = name, tensor
        if into is not None:
            self.sum = into
        self._stands.release()
        self._wait()

    def _wait(self) -> None:
        self._goes_on.acquire()
        if self._left:
            raise _PassLeft

    def _run(self) -> None:
        _CURRENT.value = self
        try:
            self._wait()
            if self._devices:  # the device is by thread, too
                torch.cuda.set_device(
                    next(self.adapter.model.parameters()).device)
            with torch.no_grad(), self.watch or nullcontext():
                self.adapter.predict(self.data)
        except _PassLeft:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._stands.release()


class _PassLeft(BaseException):
    """Ends the thread of a pass that nobody advances any more."""


_CURRENT = threading.local()


def current_pass() -> Optional[Pass]:
    """The pass that is running, None outside of any."""
    return getattr(_CURRENT, 'value', None)


class SumWatch(TorchFunctionMode):
    """Sees into which sums the outputs of layers go.

    Where ``x + norm(layer(z))`` is computed, the layer can make up for what
    is wrong with ``x`` as well. Which layers stand so is found by running the
    model once on data, under :meth:`probe`. Later passes stop at the sum
    instead of at the layer.
    """

    def __init__(self) -> None:
        super().__init__()
        #: layers whose output goes into a sum and nowhere else
        self.residual: Set[str] = set()
        #: all layers that take one input (not offsets, too), in the order in
        #: which they ran
        self.order: List[str] = []
        self._probing = False

    def probe(self, adapter: 'Adapter', layers: Dict[str, nn.Module],
              data: Any) -> None:
        """Run a model once to find its residual layers.

        Args:
            adapter (Adapter): The model.
            layers (dict[str, nn.Module]): The layers to follow, by name.
            data (Any): A batch.
        """

        def hook(name: str, args: tuple, y: Any) -> None:
            if name not in self.order and len(args) == 1:
                self.order.append(name)
                self.mark(name, y)

        handles = [
            observe(module,
                    lambda _, args, kwargs, y, name=name: hook(name, args, y))
            for name, module in layers.items()
        ]
        self._probing = True
        try:
            with self:
                adapter.predict(data)
        finally:
            self._probing = False
            for handle in handles:
                handle.remove()

    @staticmethod
    def mark(name: str, y: Tensor) -> None:
        """Follow a layer's output."""
        setattr(y, _BRANCH, (name, y.new_ones(())))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        marked = [x for x in tensors((args, kwargs)) if hasattr(x, _BRANCH)]
        if not marked:
            return func(*args, **kwargs)
        if func in _SUMS and _is_plain_sum(args, kwargs):
            self._at_sum(*args)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        scale = _norm_scale(func, args, kwargs)
        if scale is not None and marked == [args[0]]:
            name, before = _unmark(args[0])
            setattr(result, _BRANCH, (name, before * scale))
        elif any(True for _ in tensors(result)):
            for x in marked:  # something else makes use of it
                _unmark(x)
        return result

    def _at_sum(self, left: Tensor, right: Tensor) -> None:
        """The layer that ran last takes the sum; both marks end here."""
        found = [(*_unmark(x), x, y) for x, y in ((left, right), (right, left))
                 if hasattr(x, _BRANCH)]
        name, scale, branch, other = max(
            found, key=lambda entry: self.order.index(entry[0]))
        if self._probing:
            self.residual.add(name)
            return
        current = current_pass()
        if current is not None:
            current.stop(name, current.inputs.pop(name, branch),
                         Sum(branch, other, scale))


def _unmark(tensor: Tensor) -> Tuple[str, Tensor]:
    mark = getattr(tensor, _BRANCH)
    delattr(tensor, _BRANCH)
    return mark


def _is_plain_sum(args: tuple, kwargs: dict) -> bool:
    return (not kwargs and len(args) == 2
            and all(isinstance(x, Tensor)
                    for x in args) and args[0].shape == args[1].shape
            and args[0] is not args[1] and args[0].dtype == args[1].dtype)


def _norm_scale(func: Any, args: tuple, kwargs: dict) -> Optional[Tensor]:
    """The scale of each channel if a function is a batch normalisation that
    takes its statistics as they are."""
    if func is not F.batch_norm:
        return None
    bound = _BATCH_NORM.bind(*args, **kwargs)
    bound.apply_defaults()
    norm = bound.arguments
    if norm['training']:
        return None
    scale = (norm['running_var'] + norm['eps']).rsqrt()
    return scale if norm['weight'] is None else scale * norm['weight']
