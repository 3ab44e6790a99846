# Copyright (c) mmbasis authors. All rights reserved.
"""What a network does between its layers: activations, sums, pooling."""
from typing import Any, List, NamedTuple, Set, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .adapter import tensors
from .passes import SUMS

#: what runtimes do as part of the layer in front, as ONNX Runtime and TensorRT
#: do; not SiLU, GELU and the like
_FUSED = (F.batch_norm, F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu,
          Tensor.relu_, F.relu6, F.hardtanh, F.hardtanh_, F.leaky_relu,
          F.leaky_relu_, torch.clamp, torch.clamp_, Tensor.clamp,
          Tensor.clamp_)
#: the attribute that marks what a layer returned, or what is fused to it
_OPEN = '_mmbasis_open'


class Operation(NamedTuple):
    """An operation without weights: numbers that it reads and writes."""
    read: float
    written: float


class TrafficWatch(TorchFunctionMode):
    """Lists the operations between the first and the last layer of a pass;
    those before and behind prepare images and decode outputs. Views are free,
    and so is what a runtime fuses to the layer in front. Operators from
    outside PyTorch cannot be seen."""

    def __init__(self) -> None:
        super().__init__()
        #: the operations so far, up to the last layer
        self.found: List[Operation] = []
        self._waiting: List[Operation] = []
        self._started = False

    def enter(self) -> None:
        """Tell that a layer starts."""
        if self._started:
            self.found += self._waiting
        self._started = True

    def leave(self, output: Any) -> None:
        """Tell that a layer is done: what it did itself does not count."""
        self._waiting = []
        for x in tensors(output):
            setattr(x, _OPEN, True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*tensors((args, kwargs))]
        before = [x._version for x in given]
        result = func(*args, **kwargs)
        written = [*tensors(result)]
        is_open = written and [
            x for x in given if vars(x).pop(_OPEN, False)]
        if is_open and func in (*_FUSED, *SUMS):
            # several normalisations and activations may follow
            for x in written:
                setattr(x, _OPEN, True)
        elif written:
            stored = _storages(given)
            changed = any(x._version != y for x, y in zip(given, before))
            made = sum(x.numel() for x in written
                       if changed or not _storages([x]) <= stored)
            if made:
                read = sum(x.numel() for x in given)
                self._waiting.append(Operation(read, made))
        return result


def _storages(values: List[Tensor]) -> Set[Tuple[Any, int]]:
    return {(x.device, x.untyped_storage().data_ptr()) for x in values}
