# Copyright (c) mmbasis authors. All rights reserved.
"""Running a model so that two runs can be compared, and comparing them."""
import copy
import importlib
import random
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import numpy as np
import torch
import torch.nn as nn
from mmengine.structures import BaseDataElement
from torch import Tensor


def forward(model: nn.Module, data: Any, mode: str) -> Any:
    """Run a model in one of MMEngine's modes, with the same random numbers
    whenever it is called.

    Args:
        model (nn.Module): The model.
        data (Any): As a dataloader yields it; it stays as it is.
        mode (str): ``'tensor'``, ``'predict'`` or ``'loss'``.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    data = model.data_preprocessor(copy.deepcopy(data), mode == 'loss')
    data = _cast(data, next(model.parameters()).dtype)
    return model._run_forward(data, mode)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Give all floating point tensors a type, in place where they lie in data
    elements."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: _cast(v, dtype) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_cast(v, dtype) for v in value)
    if isinstance(value, BaseDataElement):
        for key, item in value.items():
            if isinstance(item, (Tensor, BaseDataElement)):
                setattr(value, key, _cast(item, dtype))
    return value


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """New tensors get a type, and the suppression of boxes, which only knows
    float32, is given that."""
    module = importlib.import_module('mmcv.ops.nms')
    operators = (module.NMSop, module.SoftNMSop)
    originals = [operator.forward for operator in operators]
    default = torch.get_default_dtype()
    for operator, original in zip(operators, originals):
        operator.forward = staticmethod(_in_float32(original))
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
        for operator, original in zip(operators, originals):
            operator.forward = staticmethod(original)


def _in_float32(function: Any) -> Any:
    """Suppression of boxes and scores given in any precision."""

    def forward(ctx, bboxes, scores, *args):
        outputs = function(ctx, bboxes.float(), scores.float(), *args)
        return _cast(outputs, bboxes.dtype)

    return forward


def in_float32(model: nn.Module) -> nn.Module:
    """A copy in float32, without one in float64 on the way: large models leave
    no room for that."""
    memo = {
        id(x): nn.Parameter(x.detach().float(), x.requires_grad)
        for x in model.parameters()
    }
    return copy.deepcopy(model, memo).float()


def tensors(value: Any) -> List[Tensor]:
    """All tensors in nested outputs, in order."""
    if isinstance(value, Tensor):
        return [value.detach()]
    if isinstance(value, dict):
        return [x for item in value.values() for x in tensors(item)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in tensors(item)]
    if isinstance(value, BaseDataElement):
        return tensors({
            k: v
            for k, v in value.items() if not k.startswith('gt_')
        })
    return []


def difference(actual: Any, expected: Any) -> float:
    """The largest relative difference of two outputs, over their tensors.

    Relative is to the spread of a tensor's values, or to a hundredth of their
    size where they hardly vary: a large bias in all of them must not hide an
    error. Absolute where all are zero. Infinite where the outputs have
    different shapes.
    """
    actual, expected = tensors(actual), tensors(expected)
    if [x.shape for x in actual] != [x.shape for x in expected]:
        return float('inf')
    return max([_relative(a, b) for a, b in zip(actual, expected)] + [0.])


def _relative(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    if torch.equal(actual, expected) or not expected.numel():
        return 0.
    both = torch.isfinite(actual) & torch.isfinite(expected)
    if not torch.equal(actual[~both], expected[~both]):
        return float('inf')
    if not both.all():
        actual, expected = actual[both], expected[both]
    # no other copies: scores of thousands of classes take gigabytes
    spread = expected.std(unbiased=False) * expected.numel()**.5
    scale = max(spread, 1e-2 * expected.norm())
    if scale == 0:
        # an offset that points out of the image leaves nothing but zeros
        scale = torch.ones_like(scale)
    return float((actual - expected).norm() / scale)


def layer_differences(model: nn.Module, layers: Dict[str, nn.Module],
                      run: Any) -> float:
    """The largest difference between dense layers and the layers that stand
    for them, each on the dense layer's own inputs.

    Args:
        model (nn.Module): The dense model.
        layers (dict[str, nn.Module]): Replacements by name.
        run (Callable): Runs the dense model.
    """
    worst, handles = [0.], []
    for name, layer in layers.items():

        def compare(_, args, kwargs, output, layer=layer):
            worst.append(difference(layer(*args, **kwargs), output))

        handles.append(
            model.get_submodule(name).register_forward_hook(
                compare, with_kwargs=True))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return max(worst)
