# Copyright (c) mmbasis authors. All rights reserved.
"""Int8 as pairs of QuantizeLinear and DequantizeLinear in the ONNX graph."""
import os.path as osp
import re
import tempfile
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Optional

import numpy as np

from ..models.int8 import InputScales
from ..utils.io import whole_file

#: operators whose inputs and weights are int8
OPERATORS = ['Conv', 'MatMul', 'Gemm']
#: ResNet-18 on a CPU core: 192 ms in fp32, 64 ms as ONNX Runtime wants int8,
#: 305 ms as TensorRT does. That fuses a layer with what follows up to the next
#: pair, takes symmetric values alone, and refuses biases of int32. Before
#: version 10 it needs the pair at the weights, too
_TENSORRT = dict(
    ActivationSymmetric=True,
    WeightSymmetric=True,
    QuantizeBias=False,
    OpTypesToExcludeOutputQuantization=OPERATORS,
    AddQDQPairToWeight=True)


def quantize_onnx(path: str, output: str, images: List[np.ndarray],
                  backend: str = 'onnxruntime',
                  scales: Optional[InputScales] = None) -> None:
    """Write a graph whose convolutions and matrix products are int8: weights
    with a step per output channel, what is computed with one per tensor.

    The back ends need two kinds: TensorRT refuses the quantised biases that
    make ONNX Runtime fast. TensorRT's rounds what layers read and nothing
    else, as the training did; in ONNX Runtime's a shortcut is rounded, too.

    Args:
        path (str): ONNX file of one input, fp32.
        output (str): The int8 one.
        images (list[ndarray]): For calibration, each ``(1, 3, H, W)``.
        backend (str): ``'tensorrt'`` or another.
        scales (InputScales, optional): Trained ones; the rest is calibrated.

    ValueError is raised if the scales are of another model."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process
    strict = backend == 'tensorrt'
    options = dict(_TENSORRT) if strict else {}
    with tempfile.TemporaryDirectory() as folder, whole_file(output) as target:
        prepared = osp.join(folder, 'prepared.onnx')
        # symbolic shapes fail on those of detectors, which depend on data
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        if scales is not None:
            options['TensorQuantOverrides'] = _overrides(
                graph, scales.layers, strict, path)
        feeds = ({graph.input[0].name: x} for x in images)
        quantize_static(
            prepared, target,
            SimpleNamespace(get_next=lambda: next(feeds, None)),
            op_types_to_quantize=OPERATORS, per_channel=True,
            activation_type=QuantType.QInt8 if strict else QuantType.QUInt8,
            weight_type=QuantType.QInt8, extra_options=options)
        if strict:
            _leave_others(target)


def _overrides(graph: Any, scales: Mapping[str, float], signed: bool,
               path: str) -> Dict[str, List[dict]]:
    """The steps by name of the tensor that a layer reads, as ONNX Runtime
    takes them; of layers that read one tensor the largest. Unsigned numbers
    are the signed ones, moved by 128."""
    found: Dict[str, float] = {}
    for node in graph.node:
        step = _step_of(node.name, scales)
        if node.op_type in OPERATORS and step is not None:
            tensor = node.input[0]
            found[tensor] = max(step, found.get(tensor, 0.))
    if not found:
        raise ValueError(
            f'{path}: none of its operators is of one of the '
            f'{len(scales)} layers that the checkpoint has trained scales '
            f'for, such as {next(iter(scales), None)!r}')
    zero = np.array(0, np.int8) if signed else np.array(128, np.uint8)
    return {name: [dict(scale=np.array(x, 'f'), zero_point=zero)]
            for name, x in found.items()}


def _leave_others(path: str) -> None:
    """Let what is not int8 read the values before they are rounded: ONNX
    Runtime gives all readers of a tensor the rounded ones."""
    import onnx
    model = onnx.load(path)
    made = {y: x for x in model.graph.node for y in x.output}
    rounding = 'QuantizeLinear', 'DequantizeLinear'
    for node in model.graph.node:
        if node.op_type in (*OPERATORS, *rounding):
            continue
        for i, name in enumerate(node.input):
            if name in made and made[name].op_type == 'DequantizeLinear':
                node.input[i] = made[made[name].input[0]].input[0]
    onnx.save(model, path)


def _step_of(node: str, scales: Mapping[str, float]) -> Optional[float]:
    """The step of a layer by the name that torch's exporter gives its
    operator: ``/backbone/layer1/layer1.0/conv1/Conv``."""
    parts = node.strip('/').split('/')[:-1]
    # a container's name stands before that of its item, which has it, too
    names = [x for x, y in zip(parts, [*parts[1:], ''])
             if not y.startswith(f'{x}.')]
    # calls of a shared layer are numbered
    for name in ('.'.join(names),
                 '.'.join(re.sub(r'_\d+$', '', x) for x in names)):
        if name in scales:
            return scales[name]
    return None
