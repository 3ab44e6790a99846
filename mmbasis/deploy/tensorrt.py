# Copyright (c) mmbasis authors. All rights reserved.
"""What TensorRT's ONNX parser accepts, checked without TensorRT.

The facts are those of NVIDIA's operator matrix, ``docs/operators.md`` of
https://github.com/onnx/onnx-tensorrt, as it stands for TensorRT 8.5 (the last
for Jetson Xavier) and 10.15.
"""
import os.path as osp
from typing import Any, Callable, Dict, List, Set

from .export import Deployment, precisions

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
_STANDARD = ('', 'ai.onnx')

_POOLING = dict(
    kernel_shape=lambda x: len(x) in (2, 3), dilations=lambda x: set(x) == {1})
#: which values of attributes are accepted
_ATTRIBUTES: Dict[str, Dict[str, Callable[[Any], bool]]] = dict(
    AveragePool=_POOLING,
    MaxPool=_POOLING,
    Resize=dict(
        mode=(b'nearest', b'linear').__contains__,
        coordinate_transformation_mode=(
            b'half_pixel', b'pytorch_half_pixel', b'tf_half_pixel_for_nn',
            b'asymmetric', b'align_corners').__contains__,
        nearest_mode=(b'floor', b'ceil', b'round_prefer_floor',
                      b'round_prefer_ceil').__contains__))
#: inputs that must be constant, by position
_CONSTANT = dict(
    TopK=(1, 'K (at most 3840)'),
    Squeeze=(1, 'axes'),
    Unsqueeze=(1, 'axes'),
    CumSum=(1, 'axis'),
    Slice=(3, 'axes'))


def check_tensorrt(path: str) -> Dict[str, List[str]]:
    """Check a graph against the operators that TensorRT's parser accepts.

    Args:
        path (str): ONNX file.

    Returns:
        dict[str, list[str]]: For each TensorRT version what it would refuse,
        one line per operator; an empty list where it would take the graph.
    """
    import onnx
    model = onnx.load(path)
    opset = max(x.version for x in model.opset_import if x.domain in _STANDARD)
    nodes = model.graph.node
    # an input that is left out has the empty name
    constants = {'', *(x.name for x in model.graph.initializer)}
    for node in nodes:
        # what is computed from constants alone is folded before it is parsed
        if node.op_type == 'Constant' or (any(node.input) and
                                          constants.issuperset(node.input)):
            constants.update(node.output)
    problems: Dict[str, List[str]] = {}
    for version, newest in MAX_OPSET.items():
        found = [_problem(node, version, constants) for node in nodes]
        if opset > newest:
            found.insert(0, f'opset {opset}: up to {newest} is supported')
        problems[version] = list(dict.fromkeys(filter(None, found)))
    return problems


def _problem(node: Any, version: str, constants: Set[str]) -> str:
    """What TensorRT refuses of a node, by the names of constant tensors."""
    from onnx.helper import get_attribute_value
    kind = node.op_type
    if node.domain not in _STANDARD:
        return (f'{node.domain}::{kind}: a custom operator, needs '
                "MMDeploy's plugin library (mmdeploy_tensorrt_ops)")
    if kind not in OPERATORS[version]:
        return f'{kind}: not supported'
    if constants.issuperset(node.output):
        return ''
    accepts = _ATTRIBUTES.get(kind, {})
    for x in node.attribute:
        value = get_attribute_value(x)
        if x.name in accepts and not accepts[x.name](value):
            text = value.decode() if isinstance(value, bytes) else value
            return f'{kind}: {x.name}={text!r} is not supported'
    if kind == 'MaxPool' and any(node.output[1:]):
        return f'{kind}: the output Indices is not supported'
    if kind in _CONSTANT and (kind != 'Slice' or version == '8.5'):
        position, name = _CONSTANT[kind]
        if not constants.issuperset(node.input[position:position + 1]):
            return f'{kind}: {name} must be a constant'
    return ''


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
    file = osp.basename(path)
    parts = [
        'trtexec', f'--onnx={file}',
        f'--saveEngine={osp.splitext(file)[0]}.engine',
        *(f'--{x}' for x in precisions(deployment.deploy_cfg))
    ]
    given = deployment.deploy_cfg.backend_config.get('model_inputs')
    shapes = given[index].input_shapes if given else {}
    for which in ('min', 'opt', 'max'):
        # a graph of fixed shapes refuses them
        text = ','.join(f'{name}:{"x".join(map(str, x[f"{which}_shape"]))}'
                        for name, x in shapes.items()
                        if x['min_shape'] != x['max_shape'])
        if text:
            parts.append(f'--{which}Shapes={text}')
    return ' '.join(parts)
