# Copyright (c) mmbasis authors. All rights reserved.
"""What TensorRT's ONNX parser accepts, checked without TensorRT.

The facts are those of NVIDIA's operator matrix, ``docs/operators.md`` of
https://github.com/onnx/onnx-tensorrt, as it stands for TensorRT 8.5 (the last
for Jetson Xavier) and 10.15.
"""
import os.path as osp
from typing import Any, Dict, List, Set

from .export import Deployment

#: operators that both versions support
_COMMON = set("""
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool
BatchNormalization Cast Ceil Celu Clip Concat Constant ConstantOfShape Conv
ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum
Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements
GatherND Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
GreaterOrEqual GridSample HardSigmoid HardSwish Identity If ImageScaler
InstanceNormalization IsNaN LRN LSTM LeakyRelu Less LessOrEqual Log LogSoftmax
Loop LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization
Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike
RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2
ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd
ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round
ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid
Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt
Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze
Upsample Where Xor
""".split())
#: … and those that only 10 does
_SINCE_10 = set("""
BlackmanWindow CastLike DeformConv Gelu GroupNormalization HammingWindow
HannWindow Hardmax IsInf LayerNormalization Mish RMSNormalization STFT
""".split())
OPERATORS: Dict[str, Set[str]] = {'8.5': _COMMON, '10': _COMMON | _SINCE_10}
MAX_OPSET = {'8.5': 17, '10': 24}

_RESIZE = dict(
    mode=('nearest', 'linear'),
    coordinate_transformation_mode=('half_pixel', 'pytorch_half_pixel',
                                    'tf_half_pixel_for_nn', 'asymmetric',
                                    'align_corners'),
    nearest_mode=('floor', 'ceil', 'round_prefer_floor', 'round_prefer_ceil'))
#: inputs that must be constant, by position
_CONSTANT = dict(
    TopK=(1, 'K (at most 3840)'),
    Squeeze=(1, 'axes'),
    Unsqueeze=(1, 'axes'),
    CumSum=(1, 'axis'),
    Slice=(3, 'axes'))


def _restriction(node: Any, version: str, constants: Set[str],
                 nonzero: Set[str]) -> str:
    """What TensorRT refuses of a node whose operator it supports, by the names
    of the tensors that are constant and of those that are not all 0."""
    from onnx.helper import get_attribute_value
    values = {x.name: get_attribute_value(x) for x in node.attribute}
    if node.op_type == 'Resize':
        for key, accepted in _RESIZE.items():
            value = values.get(key, accepted[0].encode()).decode()
            if value not in accepted:
                return f'{key}={value!r} is not supported'
    elif node.op_type in ('MaxPool', 'AveragePool'):
        return _pooling(node, values)
    elif node.op_type in ('QuantizeLinear', 'DequantizeLinear'):
        if nonzero.intersection(node.input[2:]):
            return 'the zero point must be 0'
    elif node.op_type in _CONSTANT:
        position, name = _CONSTANT[node.op_type]
        fits = constants.issuperset(node.input[position:position + 1])
        if not fits and (node.op_type != 'Slice' or version == '8.5'):
            return f'{name} must be a constant'
    return ''


def _pooling(node: Any, attributes: Dict[str, Any]) -> str:
    if len(attributes.get('kernel_shape', [0, 0])) not in (2, 3):
        return 'only 2d and 3d pooling'
    if any(d != 1 for d in attributes.get('dilations', [])):
        return 'dilations must be 1'
    return 'the output Indices is not supported' if any(
        node.output[1:]) else ''


def check_tensorrt(path: str) -> Dict[str, List[str]]:
    """Check a graph against the operators that TensorRT's parser accepts.

    Args:
        path (str): ONNX file.

    Returns:
        dict[str, list[str]]: For each TensorRT version what it would refuse,
        one line per operator; an empty list where it would take the graph.
    """
    import onnx
    from onnx.numpy_helper import to_array
    model = onnx.load(path)
    opset = max(x.version for x in model.opset_import
                if x.domain in ('', 'ai.onnx'))
    initializers = model.graph.initializer
    nonzero = {x.name for x in initializers if to_array(x).any()}
    # an input that is left out has the empty name
    constants = {'', *(x.name for x in initializers)}
    for node in model.graph.node:
        # what is computed from constants alone is folded before it is parsed
        if node.op_type == 'Constant' or (any(node.input) and
                                          constants.issuperset(node.input)):
            constants.update(node.output)
    problems: Dict[str, List[str]] = {}
    for version in OPERATORS:
        found = []
        if opset > MAX_OPSET[version]:
            found.append(
                f'opset {opset}: up to {MAX_OPSET[version]} is supported')
        found += [
            _problem(node, version, constants, nonzero)
            for node in model.graph.node
        ]
        problems[version] = list(dict.fromkeys(filter(None, found)))
    return problems


def _problem(node: Any, version: str, constants: Set[str],
             nonzero: Set[str]) -> str:
    if node.domain not in ('', 'ai.onnx'):
        return (f'{node.domain}::{node.op_type}: a custom operator, needs '
                "MMDeploy's plugin library (mmdeploy_tensorrt_ops)")
    if node.op_type not in OPERATORS[version]:
        return f'{node.op_type}: not supported'
    if constants.issuperset(node.output):
        return ''
    text = _restriction(node, version, constants, nonzero)
    return text and f'{node.op_type}: {text}'


def trtexec_command(deployment: Deployment, path: str, index: int = 0) -> str:
    """The command that builds the engine on the device, without MMDeploy.

    Without a calibration cache, which trtexec takes as ``--calib``, int8
    measures speed with made-up scales.

    Args:
        deployment (Deployment): With a TensorRT deploy config, or any other:
            the engine is fp32 then.
        path (str): The ONNX file.
        index (int): Which of the graphs it is. Defaults to the first.

    Returns:
        str: One line.
    """
    backend = deployment.deploy_cfg.backend_config
    common = backend.get('common_config') or {}
    file = osp.basename(path)
    parts = [
        'trtexec', f'--onnx={file}',
        f'--saveEngine={osp.splitext(file)[0]}.engine'
    ]
    parts += [f'--{x}' for x in ('fp16', 'int8') if common.get(f'{x}_mode')]
    model_inputs = backend.get('model_inputs') or []
    shapes = model_inputs[index].input_shapes if model_inputs else {}
    for which in ('min', 'opt', 'max'):
        # a graph of fixed shapes refuses them
        text = ','.join(f'{name}:{"x".join(map(str, x[f"{which}_shape"]))}'
                        for name, x in shapes.items()
                        if x['min_shape'] != x['max_shape'])
        if text:
            parts.append(f'--{which}Shapes={text}')
    return ' '.join(parts)
