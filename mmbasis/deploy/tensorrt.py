# Copyright (c) mmbasis authors. All rights reserved.
"""What TensorRT's ONNX parser accepts, checked without TensorRT.

The facts are those of NVIDIA's operator matrix, ``docs/operators.md`` of
https://github.com/onnx/onnx-tensorrt, as it stands for TensorRT 8.5 (the last
for Jetson Xavier) and 10.15.
"""
import os.path as osp
from typing import Any, Callable, Dict, List, Optional, Set

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


class _Graph:
    """An ONNX graph's nodes, and which of its tensors are constant."""

    def __init__(self, path: str) -> None:
        import onnx
        self.model = onnx.load(path)
        self.nodes = list(self.model.graph.node)
        self.constants = {x.name for x in self.model.graph.initializer}
        # what is computed from constants alone, TensorRT folds as well
        for node in self.nodes:
            if node.op_type == 'Constant' or (node.input and all(
                    x in self.constants for x in node.input if x)):
                self.constants.update(node.output)

    @property
    def opset(self) -> int:
        return max(
            x.version for x in self.model.opset_import
            if x.domain in ('', 'ai.onnx'))


def _attributes(node: Any) -> Dict[str, Any]:
    import onnx
    values = {
        x.name: onnx.helper.get_attribute_value(x)
        for x in node.attribute
    }
    return {
        k: v.decode() if isinstance(v, bytes) else v
        for k, v in values.items()
    }


def _inputs_constant(graph: _Graph, node: Any, *positions: int) -> bool:
    return all(i >= len(node.input) or not node.input[i]
               or node.input[i] in graph.constants for i in positions)


def _check_resize(graph: _Graph, node: Any, version: str) -> str:
    for key, value in _attributes(node).items():
        if key in _RESIZE and value not in _RESIZE[key]:
            return f'{key}={value!r} is not supported'
    return ''


def _check_pool(graph: _Graph, node: Any, version: str) -> str:
    attributes = _attributes(node)
    if len(attributes.get('kernel_shape', [0, 0])) not in (2, 3):
        return 'only 2d and 3d pooling'
    if any(d != 1 for d in attributes.get('dilations', [])):
        return 'dilations must be 1'
    return 'the output Indices is not supported' if len(
        [x for x in node.output if x]) > 1 else ''


def _constant_input(name: str) -> Callable[[_Graph, Any, str], str]:
    """The second input must be constant."""

    def check(graph: _Graph, node: Any, version: str) -> str:
        fits = _inputs_constant(graph, node, 1)
        return '' if fits else f'{name} must be a constant'

    return check


def _check_slice(graph: _Graph, node: Any, version: str) -> str:
    if version == '8.5' and not _inputs_constant(graph, node, 3):
        return 'axes must be a constant'
    return ''


def _check_quantize(graph: _Graph, node: Any, version: str) -> str:
    return _zero_point(graph, node)


def _zero_point(graph: _Graph, node: Any) -> str:
    import onnx.numpy_helper
    if len(node.input) < 3:
        return ''
    for x in graph.model.graph.initializer:
        if x.name == node.input[2]:
            values = onnx.numpy_helper.to_array(x)
            return 'the zero point must be 0' if values.any() else ''
    return ''


_CHECKS: Dict[str, Callable[[_Graph, Any, str], str]] = dict(
    Resize=_check_resize,
    MaxPool=_check_pool,
    AveragePool=_check_pool,
    TopK=_constant_input('K (at most 3840)'),
    Squeeze=_constant_input('axes'),
    Unsqueeze=_constant_input('axes'),
    Slice=_check_slice,
    CumSum=_constant_input('axis'),
    QuantizeLinear=_check_quantize,
    DequantizeLinear=_check_quantize)


def check_tensorrt(path: str) -> Dict[str, List[str]]:
    """Check a graph against the operators that TensorRT's parser accepts.

    Args:
        path (str): ONNX file.

    Returns:
        dict[str, list[str]]: For each TensorRT version what it would refuse,
        one line per operator; an empty list where it would take the graph.
    """
    graph = _Graph(path)
    problems: Dict[str, List[str]] = {}
    for version, known in OPERATORS.items():
        found = []
        if graph.opset > MAX_OPSET[version]:
            found.append(f'opset {graph.opset}: up to {MAX_OPSET[version]} '
                         'is supported')
        for node in graph.nodes:
            text = _problem(graph, node, version, known)
            if text and text not in found:
                found.append(text)
        problems[version] = found
    return problems


def _problem(graph: _Graph, node: Any, version: str, known: Set[str]) -> str:
    if node.domain not in ('', 'ai.onnx'):
        return (f'{node.domain}::{node.op_type}: a custom operator, needs '
                "MMDeploy's plugin library (mmdeploy_tensorrt_ops)")
    if node.op_type not in known:
        return f'{node.op_type}: not supported'
    check = _CHECKS.get(node.op_type)
    # shape arithmetic on constants is folded before it is parsed
    if check is None or all(x in graph.constants for x in node.output if x):
        return ''
    text = check(graph, node, version)
    return text and f'{node.op_type}: {text}'


def trtexec_command(deployment: Deployment,
                    path: str,
                    index: int = 0,
                    calib_cache: Optional[str] = None) -> str:
    """The command that builds the engine on the device, without MMDeploy.

    Args:
        deployment (Deployment): With a TensorRT deploy config, or any other:
            the engine is fp32 then.
        path (str): The ONNX file.
        index (int): Which of the graphs it is. Defaults to the first.
        calib_cache (str, optional): A calibration cache for int8. Without one
            trtexec measures speed with made-up scales.

    Returns:
        str: One line.
    """
    backend = deployment.deploy_cfg.backend_config
    common = backend.get('common_config') or {}
    parts = [
        'trtexec', f'--onnx={osp.basename(path)}',
        f'--saveEngine={osp.splitext(osp.basename(path))[0]}.engine'
    ]
    parts += [f'--{x}' for x in ('fp16', 'int8') if common.get(f'{x}_mode')]
    if calib_cache is not None:
        parts.append(f'--calib={calib_cache}')
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
