# Copyright (c) mmbasis authors. All rights reserved.
"""MACs and parameters of whole models."""
from functools import partial
from math import prod
from typing import Any, Dict, List, Tuple, Union

import torch.nn as nn
from mmengine.analysis import FlopAnalyzer
from torch import Tensor

from .adapter import Adapter, adapter_of
from .batch import Batch, tensors
from .states import Unchanged, evaluation

#: The operators of MMCV that apply weights, and where these stand among the
#: tensors that they take.
_WEIGHTS = {
    'prim::PythonOp.DeformConv2dFunction': 2,
    'prim::PythonOp.ModulatedDeformConv2dFunction': 3,
}


def _deform_conv_macs(index: int, inputs: List[Any],
                      outputs: List[Any]) -> int:
    batch, _, *positions = outputs[0].type().sizes()
    return batch * prod(positions) * prod(inputs[index].type().sizes())


class _Traced(nn.Module):
    """A model as a function of the tensors of a batch."""

    def __init__(self, adapter: Adapter, batch: Batch) -> None:
        super().__init__()
        self.model = adapter.model
        self.adapter, self.batch = adapter, batch

    def forward(self, *inputs: Tensor) -> Tuple[Tensor, ...]:
        remaining = iter(inputs)
        batch = self.batch.map(lambda _: next(remaining))
        return tuple(self.adapter.outputs(batch))


def model_complexity(model: Union[nn.Module, Adapter],
                     data: Any) -> Dict[str, Any]:
    """MACs and parameters of a whole model, counted by MMEngine's analysis.

    A fused multiply-add counts as one; biases, activations and elementwise
    sums count as in MMEngine. A deformable convolution counts as a plain one,
    without interpolation.

    Args:
        model (nn.Module | Adapter): The model; its raw outputs are traced.
        data (Any): A batch of one image, as its dataloader yields it.

    Returns:
        dict: ``macs``, ``params`` (numbers) and ``uncounted`` (names of
        operators that the analysis does not know, with their number).
    """
    adapter = adapter_of(model)
    with evaluation(adapter.model), Unchanged(adapter.model).during():
        batch = adapter.prepare(data)
        # the search for a way to run the model would end the trace
        adapter.outputs(batch)
        inputs = tuple(tensors((batch.args, batch.kwargs)))
        analyzer = FlopAnalyzer(_Traced(adapter, batch), inputs)
        analyzer.set_op_handle(**{
            k: partial(_deform_conv_macs, x) for k, x in _WEIGHTS.items()})
        analyzer.unsupported_ops_warnings(False)
        analyzer.uncalled_modules_warnings(False)
        analyzer.tracer_warnings('none')
        macs, uncounted = analyzer.total(), analyzer.unsupported_ops()
    params = sum(p.numel() for p in adapter.model.parameters())
    return dict(macs=int(macs), params=params, uncounted={
        k: int(v) for k, v in uncounted.items()})
