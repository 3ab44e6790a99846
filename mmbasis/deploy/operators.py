# Copyright (c) mmbasis authors. All rights reserved.
"""What TensorRT's ONNX parser accepts, without TensorRT.

For TensorRT 10 the rules are what NVIDIA's parser and builder say of a graph
of each operator, ``docs/results/operators.md``. What 8.5 (the last for Jetson
Xavier) refuses beside that is NVIDIA's operator matrix of that release,
``docs/operators.md`` of https://github.com/onnx/onnx-tensorrt.
"""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set

import numpy as np

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
#: largest K of TopK
MAX_K = 3840
_STANDARD = ('', 'ai.onnx')
#: operators whose values are followed, of so many numbers at most
_FOLDED = set('Add Cast Concat Constant Div Gather Identity Max Min Mul Shape '
              'Squeeze Sub Unsqueeze'.split())
_SMALL = 64
#: number types that are refused, of any input
_INTEGERS = {'INT32', 'INT64'}
_TYPES = {
    **dict.fromkeys(
        'Erf MatMul Gemm ReduceL2 ReduceLogSum ReduceLogSumExp'.split(),
        _INTEGERS),
    **dict.fromkeys(
        'Add Sub Mul Div Min Max Greater GreaterOrEqual Less LessOrEqual '
        'Where Concat Gather ArgMax ArgMin'.split(), {'UINT8'}),
    'Relu': {'INT32'},
    'DequantizeLinear': {'INT32', 'UINT8'},
}
#: values of attributes that are refused
_DILATED = dict(dilations=lambda x: set(x) != {1})
_ATTRIBUTES: Dict[str, Dict[str, Callable[[Any], bool]]] = dict(
    AveragePool=_DILATED,
    MaxPool=_DILATED,
    BatchNormalization=dict(training_mode=bool),
    ScatterND=dict(reduction=lambda x: x != 'none'),
    Resize=dict(
        antialias=bool,
        coordinate_transformation_mode=lambda x: x in
        ('half_pixel_symmetric', 'tf_crop_and_resize')))
#: optional outputs that are refused
_OUTPUTS = dict(MaxPool='Indices', LayerNormalization='Mean')
#: inputs that must be constant, by position
_CONSTANT = {
    'Squeeze': {1: 'axes'},
    'Unsqueeze': {1: 'axes'},
    'Dropout': {2: 'training_mode'},
    'Resize': {2: 'scales'},
    **dict.fromkeys(
        ('ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd ReduceL1 '
         'ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare').split(),
        {1: 'axes'}),
}
_CONSTANT_8_5 = {
    'TopK': {1: 'K'}, 'CumSum': {1: 'axis'}, 'Slice': {3: 'axes'}
}


class Graph(NamedTuple):
    """What is known of the tensors of a graph, by name.

    Args:
        constants (dict): What is computed from constants alone; None where
            the value is not known.
        kinds (dict[str, str]): Number types, such as ``'FLOAT'``.
        shapes (dict[str, list]): Sizes; None where one is not known.
        sizes (set[str]): What is computed from sizes and constants alone.
    """
    constants: Dict[str, Optional[np.ndarray]]
    kinds: Dict[str, str]
    shapes: Dict[str, List[Optional[int]]]
    sizes: Set[str]


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
    graph = _read(model, opset)
    problems: Dict[str, List[str]] = {}
    for version, newest in MAX_OPSET.items():
        found = [_problem(node, version, graph) for node in model.graph.node]
        if opset > newest:
            found.insert(0, f'opset {opset}: up to {newest} is supported')
        problems[version] = list(dict.fromkeys(filter(None, found)))
    return problems


def _read(model: Any, opset: int) -> Graph:
    """The facts of a model: types and sizes are inferred, then what is
    computed from constants and known sizes is folded, as the parser does."""
    import onnx
    from onnx.numpy_helper import to_array
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        inferred = model  # unknown operators, files above 2 GB
    # an input that is left out has the empty name
    graph = Graph({'': None}, {}, {}, set())
    for x in model.graph.initializer:
        small = np.prod(x.dims) <= _SMALL
        graph.constants[x.name] = to_array(x) if small else None
        graph.kinds[x.name] = onnx.TensorProto.DataType.Name(x.data_type)
        graph.shapes[x.name] = list(x.dims)
    known = inferred.graph
    for x in (*known.input, *known.value_info, *known.output):
        tensor = x.type.tensor_type
        graph.kinds[x.name] = onnx.TensorProto.DataType.Name(tensor.elem_type)
        if tensor.HasField('shape'):
            graph.shapes[x.name] = [
                d.dim_value if d.HasField('dim_value') else None
                for d in tensor.shape.dim
            ]
    for node in model.graph.node:
        _fold(node, graph, opset)
    return graph


def _fold(node: Any, graph: Graph, opset: int) -> None:
    """Add the outputs of a node that computes with constants alone."""
    from onnx import helper, reference
    constants, shape = graph.constants, graph.shapes.get(
        node.input[0]) if node.input else None
    if node.op_type == 'Shape' and shape and None not in shape:
        feeds: Dict[str, Any] = {
            node.input[0]: np.zeros([x or 0 for x in shape], np.float32)}
    elif constants.keys() >= set(node.input) and (
            any(node.input) or node.op_type == 'Constant'):
        feeds = {x: constants[x] for x in node.input if x}
    else:
        if node.op_type == 'Shape' or graph.sizes.intersection(
                node.input) and (constants.keys()
                                 | graph.sizes) >= set(node.input):
            graph.sizes.update(node.output)
        return
    constants.update(dict.fromkeys(node.output))
    if node.op_type not in _FOLDED or any(x is None for x in feeds.values()):
        return
    value, = reference.ReferenceEvaluator(
        helper.make_model(
            helper.make_graph(
                [node], 'folded',
                [helper.make_empty_tensor_value_info(x) for x in feeds],
                [helper.make_empty_tensor_value_info(node.output[0])]),
            opset_imports=[helper.make_opsetid('', opset)])).run(None, feeds)
    if np.size(value) <= _SMALL:
        constants[node.output[0]] = np.asarray(value)


def _problem(node: Any, version: str, graph: Graph) -> str:
    """What TensorRT refuses of a node."""
    from onnx.defs import has
    kind = node.op_type
    if node.domain not in _STANDARD:
        return (f'{node.domain}::{kind}: a custom operator, needs '
                "MMDeploy's plugin library (mmdeploy_tensorrt_ops)")
    if kind in REFUSED[version] or not has(kind, MAX_OPSET[version], ''):
        return f'{kind}: not supported'
    if graph.constants.keys() >= set(node.output):
        return ''
    reason = (
        _attribute(node, version) or _input(node, version, graph)
        or _value(node, graph))
    return f'{kind}: {reason}' if reason else ''


def _attributes(node: Any) -> Dict[str, Any]:
    from onnx.helper import get_attribute_value
    values = {x.name: get_attribute_value(x) for x in node.attribute}
    return {
        k: x.decode() if isinstance(x, bytes) else x
        for k, x in values.items()
    }


def _attribute(node: Any, version: str) -> str:
    """An attribute or an optional output that is refused."""
    values = _attributes(node)
    for name, refuses in _ATTRIBUTES.get(node.op_type, {}).items():
        if name in values and refuses(values[name]):
            return f'{name}={values[name]!r} is not supported'
    if version == '8.5' and values.get('mode') == 'cubic' and (
            node.op_type == 'Resize'):
        return "mode='cubic' is not supported"
    if node.op_type in _OUTPUTS and any(node.output[1:]):
        return f'the output {_OUTPUTS[node.op_type]} is not supported'
    return ''


def _input(node: Any, version: str, graph: Graph) -> str:
    """An input of a wrong type, or one that must be constant."""
    kind = node.op_type
    checked = (x for i, x in enumerate(node.input)
               if i not in _CONSTANT.get(kind, {}))
    for name in checked:
        if graph.kinds.get(name) in _TYPES.get(kind, ()):
            return f'{graph.kinds[name].lower()} is not supported'
    needed = dict(_CONSTANT.get(kind, {}))
    if version == '8.5':
        needed.update(_CONSTANT_8_5.get(kind, {}))
    known = {*graph.constants}
    if kind == 'Resize':
        known = known | graph.sizes
    for position, what in needed.items():
        if not known >= set(node.input[position:][:1]):
            return f'{what} must be a constant'
    if kind == 'Range' and graph.kinds.get(node.input[0]) == 'FLOAT':
        return 'of floats must be constant'
    return ''


def _value(node: Any, graph: Graph) -> str:
    """A size or a constant that is refused."""
    kind, values = node.op_type, _attributes(node)
    given = [graph.constants.get(x) for x in node.input]
    before = graph.shapes.get(node.input[0]) if node.input else None
    after = graph.shapes.get(node.output[0])
    if kind == 'Dropout' and len(given) > 2 and given[2] is not None and (
            given[2].any()):
        return 'training_mode is not supported'
    if kind == 'TopK' and given[1] is not None and given[1].max() > MAX_K:
        return f'K is {given[1].max()}, the largest is {MAX_K}'
    if kind in ('QuantizeLinear', 'DequantizeLinear') and len(given) > 2 and (
            given[2] is not None and given[2].any()):
        return 'only the zero point 0 is supported'
    if kind == 'Resize' and values.get('mode') == 'cubic' and (
            before and after and any(
                None not in (a, b) and a != b
                for a, b in zip(before[:-2], after[:-2]))):
        return "mode='cubic' of more than the last two axes is not supported"
    return ''
