# Copyright (c) mmbasis authors. All rights reserved.
from functools import partial
from math import prod
from typing import Any, Dict, List

import torch
import torch.nn as nn
from mmengine.analysis import FlopAnalyzer

from ..planning import evaluation

#: The operators of MMCV that apply weights, and where these stand among the
#: tensors that they take.
_WEIGHTS = {
    'prim::PythonOp.DeformConv2dFunction': 2,
    'prim::PythonOp.ModulatedDeformConv2dFunction': 3,
}


def _deform_conv_macs(inputs: List[Any], outputs: List[Any],
                      index: int) -> int:
    """MACs of a deformable convolution in a trace: its weights at every
    output position.

    That the samples are interpolated is not counted.
    """
    batch, _, *positions = outputs[0].type().sizes()
    return batch * prod(positions) * prod(inputs[index].type().sizes())


def model_complexity(model: nn.Module, data: Any) -> Dict[str, Any]:
    """MACs and parameters of a whole model, counted by MMEngine's analysis.

    A fused multiply-add counts as one; biases, activations and elementwise
    sums count as MMEngine counts them (normalisation and activation are
    ignored there). A deformable convolution counts as a plain one; its offset
    branch is a layer of its own.

    Args:
        model (nn.Module): An MMEngine model.
        data (Any): A batch of one image, as its dataloader yields it.

    Returns:
        dict: ``macs``, ``params`` (numbers) and ``uncounted`` (names of
        operators that the analysis knows nothing of, with their number).
    """
    with evaluation(model):
        data = model.data_preprocessor(data, False)
        forward = model.forward
        samples = data.get('data_samples')
        model.forward = partial(forward, data_samples=samples, mode='tensor')
        try:
            analyzer = FlopAnalyzer(model, (_stack(data['inputs']), ))
            analyzer.set_op_handle(
                **{
                    name: partial(_deform_conv_macs, index=index)
                    for name, index in _WEIGHTS.items()
                })
            analyzer.unsupported_ops_warnings(False)
            analyzer.uncalled_modules_warnings(False)
            analyzer.tracer_warnings('none')
            macs = analyzer.total()
            uncounted = analyzer.unsupported_ops()
        finally:
            del model.forward
    return dict(
        macs=int(macs),
        params=sum(p.numel() for p in model.parameters()),
        uncounted={
            k: int(v)
            for k, v in uncounted.items()
        })


def _stack(inputs: Any) -> torch.Tensor:
    return torch.stack(list(inputs)) if isinstance(inputs,
                                                   (list, tuple)) else inputs
