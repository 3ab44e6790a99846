# Copyright (c) mmbasis authors. All rights reserved.
"""What TensorRT needs and what its ONNX parser accepts, without TensorRT.

The facts are those of NVIDIA's operator matrix, ``docs/operators.md`` of
https://github.com/onnx/onnx-tensorrt, as it stands for TensorRT 8.5 (the last
for Jetson Xavier) and 10.15.
"""
import os.path as osp
from typing import Any, Callable, Dict, List, Set

from .export import Deployment, precisions

#: operators of ONNX that TensorRT 10 does not support
_REFUSED = set("""
AffineGrid Attention Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr
BitwiseXor CenterCropPad Col2Im Compress ConcatFromSequence ConvInteger DFT Det
DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional
OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch
RotaryEmbedding SequenceAt SequenceConstruct SequenceEmpty SequenceErase
SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss
SplitToSequence StringConcat StringNormalizer StringSplit Swish TensorScatter
TfIdfVectorizer Unique
""".split())
#: … and those up to opset 17 that only 8.5 does not
_SINCE_10 = set("""
BlackmanWindow CastLike HammingWindow HannWindow Hardmax IsInf
LayerNormalization STFT
""".split())
REFUSED = {'8.5': _REFUSED | _SINCE_10, '10': _REFUSED}
#: newest opset; operators that came with later ones are not supported
MAX_OPSET = {'8.5': 17, '10': 24}
_STANDARD = ('', 'ai.onnx')

_POOLING = dict(
    kernel_shape=lambda x: len(x) == 1, dilations=lambda x: set(x) != {1})
#: which values of attributes are refused
_ATTRIBUTES: Dict[str, Dict[str, Callable[[Any], bool]]] = dict(
    AveragePool=_POOLING,
    MaxPool=_POOLING,
    Resize=dict(
        mode=lambda x: x == b'cubic',
        coordinate_transformation_mode=lambda x: x in
        (b'half_pixel_symmetric', b'tf_crop_and_resize')))
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
    from onnx.defs import has
    from onnx.helper import get_attribute_value
    kind = node.op_type
    if node.domain not in _STANDARD:
        return (f'{node.domain}::{kind}: a custom operator, needs '
                "MMDeploy's plugin library (mmdeploy_tensorrt_ops)")
    if kind in REFUSED[version] or not has(kind, MAX_OPSET[version], ''):
        return f'{kind}: not supported'
    if constants.issuperset(node.output):
        return ''
    values = {x.name: get_attribute_value(x) for x in node.attribute}
    for name, refuses in _ATTRIBUTES.get(kind, {}).items():
        value = values.get(name)
        if value is not None and refuses(value):
            text = value.decode() if isinstance(value, bytes) else value
            return f'{kind}: {name}={text!r} is not supported'
    if kind == 'MaxPool' and any(node.output[1:]):
        return f'{kind}: the output Indices is not supported'
    if kind in _CONSTANT and (kind != 'Slice' or version == '8.5'):
        position, name = _CONSTANT[kind]
        if not constants.issuperset(node.input[position:position + 1]):
            return f'{kind}: {name} must be a constant'
    return ''


def trtexec_commands(deployment: Deployment, path: str,
                     index: int = 0) -> Dict[str, str]:
    """The commands that build the engine on the device, without MMDeploy, for
    each TensorRT version. In int8, 8.5 measures the speed with made-up scales,
    unless the graph has its own or ``--calib`` names a calibration cache.

    Args:
        deployment (Deployment): The engine is fp32 unless it is for TensorRT.
        path (str): The ONNX file.
        index (int): Which of the graphs it is. Defaults to the first.
    """
    file = osp.basename(path)
    engine = f'{osp.splitext(file)[0]}.engine'
    parts = ['trtexec', f'--onnx={file}', f'--saveEngine={engine}']
    given = deployment.deploy_cfg.backend_config.get('model_inputs')
    shapes = given[index].input_shapes if given else {}
    ranges = []
    for which in ('min', 'opt', 'max'):
        # a graph of fixed shapes refuses them
        text = ','.join(f'{name}:{"x".join(map(str, x[f"{which}_shape"]))}'
                        for name, x in shapes.items()
                        if x['min_shape'] != x['max_shape'])
        if text:
            ranges.append(f'--{which}Shapes={text}')
    lowered = [f'--{x}' for x in precisions(deployment.deploy_cfg)]
    # 8.5 lowers, also what the file states; 10 takes the file's word
    stated = ['--stronglyTyped'] if _states_precision(path) else lowered
    return {
        '8.5': ' '.join(parts + lowered + ranges),
        '10': ' '.join(parts + stated + ranges)
    }


def _states_precision(path: str) -> bool:
    """Whether a graph holds fp16 weights or quantisation of its own."""
    import onnx
    graph = onnx.load(path, load_external_data=False).graph
    return any(x.data_type == onnx.TensorProto.FLOAT16
               for x in graph.initializer) or any(
                   x.op_type == 'QuantizeLinear' for x in graph.node)
