# Copyright (c) mmbasis authors. All rights reserved.
"""Tiny graphs, one for each variant of an operator of ONNX that an exporter
may write: attributes, number types, and what is constant."""
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

#: number types by short names
TYPES = dict(
    float=TensorProto.FLOAT, half=TensorProto.FLOAT16,
    double=TensorProto.DOUBLE, bfloat16=TensorProto.BFLOAT16,
    int32=TensorProto.INT32, int64=TensorProto.INT64, int8=TensorProto.INT8,
    uint8=TensorProto.UINT8, bool=TensorProto.BOOL, string=TensorProto.STRING)
X = (1, 4, 8, 8)
_RANDOM = np.random.RandomState(0)


class Variant(NamedTuple):
    """A graph by name; the nodes before the last one make its inputs."""
    name: str
    model: onnx.ModelProto


class From(NamedTuple):
    """An input that is computed from the shape of the first one: the sizes of
    these axes, of a type, limited to a largest value where there is one."""
    axes: Sequence[int]
    kind: str = 'int64'
    most: int = 0


def ints(*values: int) -> np.ndarray:
    """A constant of int64."""
    return np.array(values, np.int64)


def floats(*values: float) -> np.ndarray:
    """A constant of float."""
    return np.array(values, np.float32)


def scalar(value: Any, kind: str = 'float32') -> np.ndarray:
    """A constant without axes."""
    return np.array(value, kind)


def weights(*shape: int) -> np.ndarray:
    """A constant of small random numbers."""
    return _RANDOM.normal(0, .1, shape).astype(np.float32)


def shape_nodes(name: str, wanted: From) -> Iterator[onnx.NodeProto]:
    """Nodes that compute an input from the shape of ``x0``."""
    yield helper.make_node('Shape', ['x0'], [f'{name}_shape'])
    axes = numpy_helper.from_array(ints(*wanted.axes))
    yield helper.make_node('Constant', [], [f'{name}_axes'], value=axes)
    last = f'{name}_sizes'
    yield helper.make_node('Gather', [f'{name}_shape', f'{name}_axes'], [last])
    if wanted.most:
        most = numpy_helper.from_array(ints(wanted.most))
        yield helper.make_node('Constant', [], [f'{name}_most'], value=most)
        yield helper.make_node('Min', [last, f'{name}_most'], [f'{name}_min'])
        last = f'{name}_min'
    yield helper.make_node('Cast', [last], [name], to=TYPES[wanted.kind])


def variant(operator: str, *inputs: Any, tag: str = '', outputs: int = 1,
            opset: int = 17, **attributes: Any) -> Variant:
    """The graph of an operator.

    Args:
        operator (str): Its type.
        *inputs: A shape (of float), a pair of a shape and a number type, an
            array (a constant), a :class:`From`, or None (left out).
        tag (str): What is special.
        outputs (int): How many it has.
        opset (int): Version of the operators.
        **attributes: Its attributes.
    """
    names, values, constants, nodes = [], [], [], []
    for index, given in enumerate(inputs):
        name = f'x{index}'
        names.append('' if given is None else name)
        if isinstance(given, np.ndarray):
            constants.append(numpy_helper.from_array(given, name))
        elif isinstance(given, From):
            nodes += shape_nodes(name, given)
        elif given is not None:
            shape, kind = given if given and isinstance(
                given[0], tuple) else (given, 'float')
            values.append(
                helper.make_tensor_value_info(name, TYPES[kind], shape))
    made = [f'y{i}' for i in range(outputs)]
    nodes.append(
        helper.make_node(operator, names, made, name='node', **attributes))
    graph = helper.make_graph(
        nodes, 'graph', values,
        [helper.make_empty_tensor_value_info(x) for x in made], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', opset)], ir_version=8)
    return Variant(f'{operator} {tag}'.strip(), typed(model))


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with types for its outputs; floats where none are known."""
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError:
        inferred = model
    for output in inferred.graph.output:
        kind = output.type.tensor_type
        if output.type.WhichOneof('value') in (None, 'tensor_type') and (
                not kind.elem_type):
            kind.elem_type = TensorProto.FLOAT
    return inferred


def unary() -> Iterator[Variant]:
    """Functions of each number."""
    for name in ('Abs Acos Acosh Asin Asinh Atan Atanh Ceil Celu Cos Cosh Elu '
                 'Erf Exp Floor HardSigmoid HardSwish Identity IsInf IsNaN '
                 'LeakyRelu Log Neg Reciprocal Relu Round Selu Sigmoid Sign '
                 'Sin Sinh Softplus Softsign Sqrt Tan Tanh '
                 'ThresholdedRelu').split():
        yield variant(name, X)
    yield variant('Mish', X, opset=18)
    for how in ('none', 'tanh'):
        yield variant('Gelu', X, opset=20, tag=how, approximate=how)
    yield variant('IsInf', X, tag='positive', detect_negative=0)
    for name in ('Relu', 'Sigmoid', 'Abs', 'Neg', 'Exp', 'Sqrt', 'Sign',
                 'Floor', 'Erf', 'Identity', 'IsNaN'):
        for kind in ('half', 'double', 'bfloat16', 'int32', 'int64', 'int8'):
            if legal(name, kind):
                yield variant(name, (X, kind), tag=kind)
    yield variant('Not', (X, 'bool'))
    yield variant('PRelu', X, weights(4, 1, 1))
    yield variant('PRelu', X, (4, 1, 1), tag='slope not constant')
    yield variant('Clip', X, scalar(0.), scalar(6.))
    yield variant('Clip', X, None, scalar(6.), tag='max alone')
    yield variant('Clip', X, (), (), tag='limits not constant')
    for kind in ('int32', 'int64'):
        yield variant('Clip', (X, kind), scalar(0, kind), scalar(6, kind),
                      tag=kind)


def binary() -> Iterator[Variant]:
    """Functions of pairs of numbers."""
    for name in 'Add Sub Mul Div Pow Min Max Mean Sum'.split():
        yield variant(name, X, (4, 1, 1))
        for kind in ('half', 'double', 'bfloat16', 'int32', 'int64', 'uint8',
                     'int8'):
            if legal(name, kind):
                yield variant(name, (X, kind), (X, kind), tag=kind)
    yield variant('Max', X, X, X, tag='three')
    yield variant('Pow', X, scalar(2, 'int64'), tag='int64 exponent')
    for kind in ('int32', 'int64'):
        yield variant('Mod', (X, kind), (X, kind), tag=kind)
    for kind in ('float', 'half', 'int64'):
        yield variant('Mod', (X, kind), (X, kind), tag=f'{kind} fmod', fmod=1)
    for name in 'And Or Xor'.split():
        yield variant(name, (X, 'bool'), (X, 'bool'))
    yield variant('BitShift', (X, 'uint8'), (X, 'uint8'), direction='LEFT')
    for name in 'BitwiseAnd BitwiseOr BitwiseXor'.split():
        yield variant(name, (X, 'int32'), (X, 'int32'), opset=18)
    yield variant('BitwiseNot', (X, 'int32'), opset=18)


def choices() -> Iterator[Variant]:
    """Comparisons, number types, and one of many."""
    for name in 'Equal Greater GreaterOrEqual Less LessOrEqual'.split():
        for kind in ('float', 'half', 'double', 'int32', 'int64', 'bool',
                     'uint8'):
            if legal(name, kind):
                yield variant(name, (X, kind), (X, kind), tag=kind)
    for kind in ('float', 'half', 'int64', 'bool', 'uint8'):
        yield variant('Where', (X, 'bool'), (X, kind), (X, kind), tag=kind)
    for kind in ('half', 'double', 'bfloat16', 'int32', 'int64', 'int8',
                 'uint8', 'bool'):
        yield variant('Cast', X, tag=f'to {kind}', to=TYPES[kind])
        yield variant('Cast', (X, kind), tag=f'from {kind}', to=TYPES['float'])
    yield variant('CastLike', X, (X, 'half'))
    for name in 'Softmax LogSoftmax Hardmax'.split():
        yield variant(name, X)
        yield variant(name, X, tag='axis 1', axis=1)
        yield variant(name, X, tag='opset 11', opset=11)
        yield variant(name, (X, 'half'), tag='half')


def legal(operator: str, kind: str, position: int = 0) -> bool:
    """Whether the standard allows a number type for an input."""
    schema = onnx.defs.get_schema(operator, 17)
    inputs = schema.inputs[min(position, len(schema.inputs) - 1)]
    return f'tensor({dict(half="float16").get(kind, kind)})' in inputs.types


def networks() -> Iterator[Variant]:
    """Convolutions, poolings, normalisations, products of matrices."""
    w = weights(8, 4, 3, 3)
    yield variant('Conv', X, w)
    yield variant('Conv', X, w, weights(8), tag='bias')
    yield variant('Conv', X, (8, 4, 3, 3), tag='weight not constant')
    yield variant('Conv', X, w, (8, ), tag='bias not constant')
    yield variant('Conv', X, w, tag='stride, pads', strides=[2, 2],
                  pads=[1, 1, 1, 1])
    yield variant('Conv', X, w, tag='uneven pads', pads=[0, 1, 2, 1])
    yield variant('Conv', X, w, tag='dilations', dilations=[2, 2])
    for how in ('SAME_UPPER', 'SAME_LOWER', 'VALID'):
        yield variant('Conv', X, w, tag=how, auto_pad=how, strides=[2, 2])
    yield variant('Conv', X, weights(8, 2, 3, 3), tag='group', group=2)
    yield variant('Conv', X, weights(4, 1, 3, 3), tag='depthwise', group=4)
    yield variant('Conv', (1, 4, 8), weights(8, 4, 3), tag='1d')
    yield variant('Conv', (1, 4, 8, 8, 8), weights(8, 4, 3, 3, 3), tag='3d')
    yield variant('Conv', (X, 'half'), w.astype('f2'), tag='half')
    yield variant('Conv', (X, 'double'), w.astype('f8'), tag='double')
    t = weights(4, 8, 3, 3)
    yield variant('ConvTranspose', X, t)
    yield variant('ConvTranspose', X, t, tag='stride, output_padding',
                  strides=[2, 2], output_padding=[1, 1], pads=[1, 1, 1, 1])
    yield variant('ConvTranspose', X, t, tag='output_shape', strides=[2, 2],
                  output_shape=[16, 16])
    yield variant('ConvTranspose', X, t, tag='dilations', dilations=[2, 2])
    yield variant('ConvTranspose', X, weights(4, 2, 3, 3), tag='group',
                  group=2)
    yield variant('ConvTranspose', X, (4, 8, 3, 3), tag='weight not constant')
    yield variant('ConvTranspose', (1, 4, 8), weights(4, 8, 3), tag='1d')
    yield variant('ConvTranspose', (1, 4, 8, 8, 8), weights(4, 8, 3, 3, 3),
                  tag='3d')
    yield from poolings()
    yield from normalisations()
    yield from products()
    yield from quantised()
    yield from recurrent()


def poolings() -> Iterator[Variant]:
    """Poolings of one to three axes."""
    for name in 'MaxPool AveragePool'.split():
        for axes, shape in ((1, (1, 4, 8)), (2, X), (3, (1, 4, 8, 8, 8))):
            yield variant(name, shape, tag=f'{axes}d', kernel_shape=[2] * axes)
        two = dict(kernel_shape=[3, 3])
        yield variant(name, X, tag='ceil_mode', ceil_mode=1, strides=[2, 2],
                      **two)
        yield variant(name, X, tag='pads', pads=[1, 1, 1, 1], **two)
        yield variant(name, X, tag='uneven pads', pads=[0, 0, 1, 1], **two)
        yield variant(name, X, tag='SAME_UPPER', auto_pad='SAME_UPPER', **two)
        yield variant(name, (X, 'half'), tag='half', **two)
    yield variant('MaxPool', X, tag='no dilation', kernel_shape=[2, 2],
                  dilations=[1, 1])
    yield variant('MaxPool', X, tag='dilations', kernel_shape=[2, 2],
                  dilations=[2, 2])
    yield variant('MaxPool', X, tag='Indices', kernel_shape=[2, 2], outputs=2)
    yield variant('MaxPool', (X, 'int8'), tag='int8', kernel_shape=[2, 2])
    yield variant('AveragePool', X, tag='count_include_pad',
                  kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1)
    yield variant('AveragePool', X, tag='dilations', kernel_shape=[2, 2],
                  dilations=[2, 2], opset=19)
    for name in 'GlobalAveragePool GlobalMaxPool GlobalLpPool'.split():
        for axes, shape in ((1, (1, 4, 8)), (2, X), (3, (1, 4, 8, 8, 8))):
            yield variant(name, shape, tag=f'{axes}d')
    yield variant('LpPool', X, kernel_shape=[2, 2])
    yield variant('MaxRoiPool', X, (5, 5), pooled_shape=[2, 2])
    yield variant('MaxUnpool', X, (X, 'int64'), kernel_shape=[2, 2])
    for mode in ('avg', 'max'):
        yield variant('RoiAlign', X, (5, 4), ints(0, 0, 0, 0, 0), tag=mode,
                      mode=mode, output_height=2, output_width=2)
    yield variant('DeformConv', X, weights(8, 4, 3, 3), (1, 18, 6, 6),
                  opset=19)


def normalisations() -> Iterator[Variant]:
    """Normalisations, and dropout in its ways."""
    four = [weights(4) for _ in range(3)] + [np.ones(4, 'f')]
    yield variant('BatchNormalization', X, *four)
    yield variant('BatchNormalization', X, *four, tag='opset 11', opset=11)
    yield variant('BatchNormalization', (1, 4, 8), *four, tag='1d')
    yield variant('BatchNormalization', (1, 4, 8, 8, 8), *four, tag='3d')
    yield variant('BatchNormalization', X, *four, tag='training',
                  training_mode=1, outputs=3)
    yield variant('BatchNormalization', X, (4, ), *four[1:],
                  tag='scale not constant')
    yield variant('InstanceNormalization', X, *four[:2])
    yield variant('InstanceNormalization', (1, 4, 8), *four[:2], tag='1d')
    yield variant('InstanceNormalization', (1, 4, 8, 8, 8), *four[:2],
                  tag='3d')
    yield variant('InstanceNormalization', X, (4, ), (4, ),
                  tag='scale not constant')
    yield variant('LayerNormalization', X, weights(8), weights(8))
    yield variant('LayerNormalization', X, weights(8), tag='no bias')
    yield variant('LayerNormalization', X, weights(4, 8, 8), tag='axis 1',
                  axis=1)
    yield variant('LayerNormalization', X, weights(8), tag='three outputs',
                  outputs=3)
    yield variant('GroupNormalization', X, weights(2), weights(2), opset=18,
                  num_groups=2)
    yield variant('GroupNormalization', X, weights(4), weights(4), opset=21,
                  tag='opset 21', num_groups=2)
    yield variant('LRN', X, size=3)
    yield variant('LpNormalization', X)
    yield variant('LpNormalization', X, tag='p 1, axis 1', p=1, axis=1)
    yield variant('MeanVarianceNormalization', X)
    yield variant('Dropout', X, opset=11, tag='opset 11')
    yield variant('Dropout', X)
    yield variant('Dropout', X, tag='mask', outputs=2)
    yield variant('Dropout', X, scalar(.5), tag='ratio')
    for value in (False, True):
        yield variant('Dropout', X, scalar(.5), scalar(value, 'bool'),
                      tag=f'training_mode {value}')
    yield variant('Dropout', X, scalar(0.), scalar(True, 'bool'),
                  tag='training_mode True, ratio 0')
    yield variant('Dropout', X, scalar(.5), ((), 'bool'),
                  tag='training_mode not constant')


def products() -> Iterator[Variant]:
    """Products of matrices."""
    yield variant('MatMul', (1, 6, 8), weights(8, 5))
    yield variant('MatMul', (2, 6, 8), (2, 8, 5), tag='two inputs')
    yield variant('MatMul', (8, ), weights(8, 5), tag='vector')
    for kind in ('half', 'double', 'bfloat16', 'int32', 'int64'):
        yield variant('MatMul', ((6, 8), kind), ((8, 5), kind), tag=kind)
    yield variant('Gemm', (6, 8), weights(8, 5))
    yield variant('Gemm', (6, 8), weights(5, 8), weights(5), tag='transB',
                  transB=1)
    yield variant('Gemm', (8, 6), weights(8, 5), weights(5),
                  tag='transA, alpha, beta', transA=1, alpha=.5, beta=.5)
    yield variant('Gemm', (6, 8), (8, 5), (6, 5), tag='inputs')
    yield variant('Gemm', ((6, 8), 'int32'), ((8, 5), 'int32'), tag='int32')
    for equation in ('bij,bjk->bik', 'bhij,bhjk', 'bij->bji', 'ij,ij->',
                     '...ij,...jk->...ik', 'ii->i', 'bij,bjk,bkl->bil'):
        shapes = [(4, ) * max(3, len(x)) if '.' in x else (4, ) * len(x)
                  for x in equation.split('->')[0].split(',')]
        yield variant('Einsum', *shapes, tag=equation, equation=equation)
    yield variant('Det', (4, 4))
    yield variant('MatMulInteger', ((6, 8), 'uint8'), ((8, 5), 'uint8'))
    yield variant('ConvInteger', (X, 'uint8'), ((8, 4, 3, 3), 'uint8'))


def quantised() -> Iterator[Variant]:
    """Quantisation, and operators of quantised numbers."""
    one, many = scalar(.1), np.full(4, .1, 'f')
    for kind in ('int8', 'uint8'):
        zero = scalar(0, kind)
        yield variant('QuantizeLinear', X, one, zero, tag=kind)
        yield variant('DequantizeLinear', (X, kind), one, zero, tag=kind)
    yield variant('QuantizeLinear', X, one, scalar(3, 'int8'),
                  tag='zero point 3')
    yield variant('QuantizeLinear', X, one, tag='no zero point')
    yield variant('QuantizeLinear', X, many, np.zeros(4, 'int8'),
                  tag='per channel', axis=1)
    yield variant('QuantizeLinear', X, (), scalar(0, 'int8'),
                  tag='scale not constant')
    yield variant('DequantizeLinear', (X, 'int8'), many, np.zeros(4, 'int8'),
                  tag='per channel', axis=1)
    yield variant('DequantizeLinear', (X, 'int32'), one, tag='int32')
    yield variant('DequantizeLinear', np.ones((4, 3), 'int8'), many,
                  np.zeros(4, 'int8'), tag='of a constant', axis=0)
    yield variant('DynamicQuantizeLinear', X, outputs=3)
    zero = scalar(0, 'int8')
    yield variant('QLinearConv', (X, 'int8'), one, zero,
                  np.ones((8, 4, 3, 3), 'int8'), one, zero, one, zero)
    yield variant('QLinearMatMul', ((6, 8), 'int8'), one, zero,
                  np.ones((8, 5), 'int8'), one, zero, one, zero)


def recurrent() -> Iterator[Variant]:
    """Recurrent cells over six steps."""
    for name, gates in (('RNN', 1), ('GRU', 3), ('LSTM', 4)):
        for tag, count in (('forward', 1), ('bidirectional', 2)):
            yield variant(name, (6, 1, 8), weights(count, 4 * gates, 8),
                          weights(count, 4 * gates, 4), tag=tag,
                          hidden_size=4, direction=tag, outputs=2)
    yield variant('GRU', (6, 1, 8), weights(1, 12, 8), weights(1, 12, 4),
                  tag='linear_before_reset', hidden_size=4, outputs=2,
                  linear_before_reset=1)
    yield variant('LSTM', (6, 1, 8), weights(1, 16, 8), weights(1, 16, 4),
                  None, np.full(1, 6, 'int32'), tag='lengths', hidden_size=4,
                  outputs=2)


def shapes() -> Iterator[Variant]:
    """What moves numbers, or computes sizes."""
    yield variant('Reshape', X, ints(1, -1, 0, 8), tag='0 and -1')
    yield variant('Reshape', X, From((1, 0, 2, 3)), tag='from a shape')
    yield variant('Reshape', X, ((2, ), 'int64'), tag='not constant')
    yield variant('Reshape', X, ints(4, 64), tag='allowzero', allowzero=1)
    yield variant('Flatten', X)
    yield variant('Flatten', X, tag='axis 2', axis=2)
    yield variant('Transpose', X, perm=[0, 2, 3, 1])
    yield variant('Transpose', X, tag='reversed')
    for name, shape, axes in (('Squeeze', (1, 4, 1), (0, )),
                              ('Unsqueeze', X, (0, 5))):
        yield variant(name, shape, ints(*axes))
        yield variant(name, shape, tag='opset 11', opset=11, axes=axes)
        yield variant(name, shape, ((len(axes), ), 'int64'),
                      tag='axes not constant')
    yield variant('Squeeze', (1, 4, 1), tag='no axes')
    yield variant('Expand', (4, 1), ints(2, 4, 8))
    yield variant('Expand', X, From((0, 1, 2, 3)), tag='from a shape')
    yield variant('Expand', (4, 1), ((2, ), 'int64'), tag='not constant')
    yield variant('Tile', X, ints(1, 1, 2, 2))
    yield variant('Tile', X, From((0, 0, 1, 1)), tag='from a shape')
    yield variant('Tile', X, ((4, ), 'int64'), tag='not constant')
    yield variant('Concat', X, X, axis=1)
    yield variant('Concat', X, weights(1, 4, 8, 8), tag='constant', axis=-1)
    for kind in ('half', 'int32', 'int64', 'uint8', 'bool', 'double'):
        yield variant('Concat', (X, kind), (X, kind), tag=kind, axis=1)
    yield variant('Split', X, outputs=2, axis=1)
    yield variant('Split', X, ints(1, 3), outputs=2, axis=1, tag='sizes')
    yield variant('Split', X, ((2, ), 'int64'), outputs=2, axis=1,
                  tag='sizes not constant')
    yield variant('Split', X, outputs=2, axis=1, tag='opset 11', opset=11,
                  split=[1, 3])
    yield variant('Split', X, outputs=2, axis=1, tag='num_outputs', opset=18,
                  num_outputs=2)
    yield from slices()
    yield from gathers()
    yield from pads()
    for mode in ('DCR', 'CRD'):
        yield variant('DepthToSpace', X, tag=mode, blocksize=2, mode=mode)
    yield variant('SpaceToDepth', X, blocksize=2)
    yield variant('ReverseSequence', (6, 2, 3), ints(4, 6))
    yield variant('Shape', X)
    yield variant('Shape', X, tag='start, end', start=1, end=3)
    yield variant('Size', X)
    yield from made_up()


def slices() -> Iterator[Variant]:
    """Slices with constants and without."""
    yield variant('Slice', X, ints(0), ints(2), ints(1))
    yield variant('Slice', X, ints(0, 0, 2, 2), ints(1, 4, 6, 6),
                  tag='no axes')
    yield variant('Slice', X, ints(-1), ints(-9), ints(3), ints(-1),
                  tag='backwards')
    yield variant('Slice', X, ints(0), ints(8), ints(3), ints(2), tag='steps')
    yield variant('Slice', X, ints(0), From((1, )), ints(2),
                  tag='ends from a shape')
    for index, name in enumerate(('starts', 'ends', 'axes', 'steps')):
        given: List[Any] = [ints(0), ints(2), ints(1), ints(1)]
        given[index] = ((1, ), 'int64')
        yield variant('Slice', X, *given, tag=f'{name} not constant')
    yield variant('Slice', (X, 'int64'), ints(0), ints(2), ints(1),
                  tag='int64')


def gathers() -> Iterator[Variant]:
    """Gathers and scatters."""
    for kind in ('float', 'half', 'int32', 'int64', 'bool', 'uint8'):
        yield variant('Gather', (X, kind), ints(0, 2), tag=kind, axis=1)
    yield variant('Gather', X, ((3, ), 'int64'), tag='indices not constant')
    yield variant('Gather', X, ((3, ), 'int32'), tag='int32 indices')
    yield variant('Gather', X, ints(-1), tag='negative index', axis=2)
    yield variant('Gather', X, scalar(1, 'int64'), tag='scalar', axis=2)
    full = (X, 'int64')
    yield variant('GatherElements', X, full, axis=1)
    yield variant('GatherND', X, ((3, 2), 'int64'))
    yield variant('GatherND', X, ((1, 3, 2), 'int64'), tag='batch_dims',
                  batch_dims=1)
    yield variant('GatherND', X, ((3, 4), 'int64'), tag='elements')
    yield variant('ScatterElements', X, full, X, axis=1)
    for how in ('add', 'mul'):
        yield variant('ScatterElements', X, full, X, tag=how, axis=1,
                      reduction=how)
    for how in ('max', 'min'):
        yield variant('ScatterElements', X, full, X, tag=how, axis=1,
                      reduction=how, opset=18)
    yield variant('Scatter', X, full, X, opset=10)
    yield variant('ScatterND', X, ((3, 2), 'int64'), (3, 8, 8))
    yield variant('ScatterND', X, ((3, 4), 'int64'), (3, ), tag='elements')
    for how in ('add', 'mul'):
        yield variant('ScatterND', X, ((3, 2), 'int64'), (3, 8, 8), tag=how,
                      reduction=how)
    yield variant('ScatterND', (X, 'int64'), ((3, 2), 'int64'),
                  ((3, 8, 8), 'int64'), tag='int64')
    yield variant('OneHot', ((5, ), 'int64'), ints(4), floats(0, 1))
    yield variant('OneHot', ((5, ), 'int64'), ((1, ), 'int64'), floats(0, 1),
                  tag='depth not constant')
    yield variant('OneHot', ((5, ), 'int64'), ints(4), ints(0, 1),
                  tag='int64')
    yield variant('Compress', X, ((4, ), 'bool'), axis=1)
    yield variant('Unique', X)
    yield variant('NonZero', X)


def pads() -> Iterator[Variant]:
    """Paddings."""
    around = ints(0, 0, 1, 1, 0, 0, 1, 1)
    for mode in ('constant', 'reflect', 'edge'):
        yield variant('Pad', X, around, tag=mode, mode=mode)
    yield variant('Pad', X, around, tag='wrap', mode='wrap', opset=19)
    yield variant('Pad', X, around, scalar(1.), tag='value')
    yield variant('Pad', X, around, (), tag='value not constant')
    yield variant('Pad', X, -around, tag='negative')
    yield variant('Pad', X, ((8, ), 'int64'), tag='pads not constant')
    yield variant('Pad', X, From((0, ) * 8), tag='pads from a shape')
    yield variant('Pad', X, ints(1, 0, 1, 0), None, ints(1, 2), tag='axes',
                  opset=18)
    for kind in ('half', 'int32', 'int64', 'bool'):
        if legal('Pad', kind):
            yield variant('Pad', (X, kind), around, tag=kind)


def made_up() -> Iterator[Variant]:
    """Numbers out of sizes, and random ones."""
    for name in ('RandomNormalLike', 'RandomUniformLike', 'Bernoulli'):
        yield variant(name, X)
    for name in ('RandomNormal', 'RandomUniform'):
        yield variant(name, shape=[2, 3])
    yield variant('Multinomial', (1, 8), sample_size=3)
    yield variant('ConstantOfShape', ints(2, 3), tag='constant')
    yield variant('ConstantOfShape', ((2, ), 'int64'), tag='not constant')
    for kind in ('float32', 'int64', 'int32'):
        yield variant('Range', *(scalar(x, kind) for x in (0, 8, 2)),
                      tag=f'constant {kind}')
    for kind in ('float', 'int64', 'int32'):
        yield variant('Range', *[((), kind)] * 3, tag=f'{kind} not constant')
    yield variant('EyeLike', (4, 4))
    yield variant('Trilu', X, upper=0)
    yield variant('Trilu', X, scalar(1, 'int64'), tag='k')
    yield variant('Trilu', X, ((), 'int64'), tag='k not constant')
    for name in 'BlackmanWindow HannWindow HammingWindow'.split():
        yield variant(name, scalar(16, 'int64'))
        yield variant(name, ((), 'int64'), tag='size not constant')
    yield variant('MelWeightMatrix', *(scalar(x, 'int64') for x in (
        8, 64, 8192)), scalar(0.), scalar(4096.))
    yield variant('DFT', (1, 16, 1), axis=1)
    yield variant('STFT', (1, 64, 1), scalar(8, 'int64'), weights(16))


def reductions() -> Iterator[Variant]:
    """Sums, the best of many."""
    for name in ('ReduceSum ReduceMean ReduceMax ReduceMin ReduceProd '
                 'ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp '
                 'ReduceSumSquare').split():
        axes: Dict[str, Any] = dict(axes=[2, 3])
        yield variant(name, X, tag='opset 11', opset=11, keepdims=0, **axes)
        yield variant(name, X, ints(1), tag='opset 18', opset=18)
        for kind in ('half', 'int32', 'int64', 'double'):
            yield variant(name, (X, kind), ints(1), tag=kind, opset=18)
        yield variant(name, X, ((1, ), 'int64'), tag='axes not constant',
                      opset=18)
        yield variant(name, X, tag='all', opset=18)
        yield variant(name, X, tag='noop', opset=18, noop_with_empty_axes=1)
    for name in 'ArgMax ArgMin'.split():
        yield variant(name, X, axis=1)
        yield variant(name, X, tag='keepdims 0', axis=1, keepdims=0)
        yield variant(name, X, tag='select_last_index', axis=1,
                      select_last_index=1)
        for kind in ('half', 'int32', 'int64', 'uint8'):
            if legal(name, kind):
                yield variant(name, (X, kind), tag=kind, axis=1)
    for kind in ('float', 'half', 'int32', 'int64', 'double'):
        yield variant('CumSum', (X, kind), scalar(1, 'int64'), tag=kind)
    yield variant('CumSum', X, scalar(1, 'int64'), tag='reverse, exclusive',
                  reverse=1, exclusive=1)
    yield variant('CumSum', X, ((), 'int64'), tag='axis not constant')
    yield variant('CumSum', X, scalar(1, 'int32'), tag='int32 axis')
    many = (1, 8000)
    for count in (5, 3840, 3841, 8000):
        yield variant('TopK', many, ints(count), tag=f'K {count}', outputs=2)
    yield variant('TopK', many, From((1, )), tag='K from a shape', outputs=2)
    yield variant('TopK', many, From((1, ), most=1000), outputs=2,
                  tag='K from a shape, at most 1000')
    yield variant('TopK', many, ((1, ), 'int64'), tag='K not constant',
                  outputs=2)
    yield variant('TopK', many, ints(5), tag='smallest', largest=0, outputs=2)
    yield variant('TopK', many, ints(5), tag='unsorted', sorted=0, outputs=2)
    yield variant('TopK', (8000, ), ints(5), tag='1d', outputs=2)
    yield variant('TopK', many, ints(5), tag='opset 11', opset=11, outputs=2)
    yield variant('TopK', (20, 30), ints(5), tag='axis 0', axis=0, outputs=2)
    for kind in ('half', 'int32', 'int64', 'double'):
        yield variant('TopK', (many, kind), ints(5), tag=kind, outputs=2)


def resizings() -> Iterator[Variant]:
    """Resizing in all its ways, sampling, suppression."""
    twice, size = floats(1, 1, 2, 2), ints(1, 4, 16, 16)
    for mode in ('nearest', 'linear', 'cubic'):
        yield variant('Resize', X, None, twice, tag=f'{mode} scales',
                      mode=mode)
        yield variant('Resize', X, None, None, size, tag=f'{mode} sizes',
                      mode=mode)
        yield variant('Resize', X, None, None, From((0, 1, 2, 3)),
                      tag=f'{mode} sizes from a shape', mode=mode)
        yield variant('Resize', X, None, ((4, ), 'float'),
                      tag=f'{mode} scales not constant', mode=mode)
        yield variant('Resize', X, None, floats(1, 1, .5, .5),
                      tag=f'{mode} smaller', mode=mode)
        yield variant('Resize', X, None, floats(1, 2, 2, 2),
                      tag=f'{mode} channels', mode=mode)
        yield variant('Resize', X, floats(), twice, tag=f'{mode} opset 11',
                      mode=mode, opset=11)
        yield variant('Resize', (1, 4, 8), None, floats(1, 1, 2),
                      tag=f'{mode} 1d', mode=mode)
        yield variant('Resize', (1, 4, 8, 8, 8), None, floats(1, 1, 2, 2, 2),
                      tag=f'{mode} 3d', mode=mode)
        yield variant('Resize', (X, 'half'), None, twice, tag=f'{mode} half',
                      mode=mode)
        for how in ('half_pixel', 'pytorch_half_pixel', 'align_corners',
                    'asymmetric', 'half_pixel_symmetric'):
            yield variant('Resize', X, None, twice, tag=f'{mode} {how}',
                          mode=mode, coordinate_transformation_mode=how,
                          opset=19 if 'symm' in how else 17)
        yield variant('Resize', X, floats(0, 0, 0, 0, 1, 1, 1, 1), twice,
                      tag=f'{mode} tf_crop_and_resize', mode=mode,
                      coordinate_transformation_mode='tf_crop_and_resize')
        yield variant('Resize', X, None, floats(1, 1, .5, .5),
                      tag=f'{mode} antialias', mode=mode, antialias=1,
                      opset=18)
    for how in ('floor', 'ceil', 'round_prefer_floor', 'round_prefer_ceil'):
        for where in ('asymmetric', 'half_pixel'):
            yield variant('Resize', X, None, twice,
                          tag=f'nearest {how} {where}', nearest_mode=how,
                          coordinate_transformation_mode=where)
    yield variant('Resize', X, None, twice, tag='cubic -0.5', mode='cubic',
                  cubic_coeff_a=-.5)
    yield variant('Resize', X, None, twice, tag='cubic exclude_outside',
                  mode='cubic', exclude_outside=1)
    for mode in ('bilinear', 'nearest', 'bicubic'):
        for pad in ('zeros', 'border', 'reflection'):
            yield variant('GridSample', X, (1, 5, 5, 2), tag=f'{mode} {pad}',
                          mode=mode, padding_mode=pad, align_corners=1)
    yield variant('AffineGrid', (1, 2, 3), ints(1, 3, 8, 8), opset=20)
    yield variant('NonMaxSuppression', (1, 20, 4), (1, 3, 20), ints(5),
                  floats(.5), floats(.1))
    yield variant('NonMaxSuppression', (1, 20, 4), (1, 3, 20),
                  ((1, ), 'int64'), floats(.5), tag='number not constant')


def dynamic() -> Iterator[Variant]:
    """What takes sizes of an input of unknown size."""
    x = ('n', 4, 'h', 'w')
    for mode in ('nearest', 'linear', 'cubic'):
        yield variant('Resize', x, None, None, From((0, 1, 2, 3)),
                      tag=f'{mode} dynamic sizes', mode=mode)
        yield variant('Resize', x, None, From((0, 1, 2, 3), 'float', 1),
                      tag=f'{mode} dynamic scales', mode=mode)
        yield variant('Resize', x, None, floats(1, 1, 2, 2),
                      tag=f'{mode} dynamic, constant scales', mode=mode)
    yield variant('TopK', x, From((3, )), tag='dynamic K', outputs=2)
    yield variant('TopK', x, From((3, ), most=4000), outputs=2,
                  tag='dynamic K, at most 4000')
    yield variant('Reshape', x, From((0, 1, 3, 2)), tag='dynamic')
    yield variant('Expand', x, From((0, 1, 2, 3)), tag='dynamic')
    yield variant('Tile', x, From((0, 0, 1, 1), most=2), tag='dynamic')
    yield variant('Slice', x, ints(0), From((2, )), ints(2), tag='dynamic')


def others() -> Iterator[Variant]:
    """Losses, texts, sequences, branches and loops."""
    labels = ((1, 8, 8), 'int64')
    yield variant('SoftmaxCrossEntropyLoss', X, labels)
    yield variant('NegativeLogLikelihoodLoss', X, labels)
    yield variant('StringNormalizer', ((3, ), 'string'))
    yield variant('TfIdfVectorizer', ((5, ), 'int64'), max_gram_length=1,
                  min_gram_length=1, max_skip_count=0, mode='TF',
                  ngram_counts=[0], ngram_indexes=[0, 1], pool_int64s=[2, 3])
    for name in ('SequenceConstruct', 'SplitToSequence', 'SequenceEmpty',
                 'Optional'):
        yield variant(name, *[X] * (name != 'SequenceEmpty'))
    yield branch()
    yield loop()
    yield scan()


def _finish(name: str, nodes: Sequence[onnx.NodeProto],
            inputs: Sequence[onnx.ValueInfoProto],
            constants: Sequence[onnx.TensorProto] = ()) -> Variant:
    output = helper.make_tensor_value_info('y', TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, 'graph', inputs, [output], constants)
    opsets = [helper.make_opsetid('', 17)]
    return Variant(
        name, helper.make_model(graph, opset_imports=opsets, ir_version=8))


def _float(name: str, shape: Tuple[int, ...] = (4, )) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def branch() -> Variant:
    """A condition that is an input."""
    graphs = {
        f'{which}_branch': helper.make_graph(
            [helper.make_node(operator, ['x'], [which])], which, [],
            [_float(which)])
        for which, operator in (('then', 'Relu'), ('else', 'Neg'))
    }
    condition = helper.make_tensor_value_info('c', TensorProto.BOOL, ())
    return _finish('If', [helper.make_node('If', ['c'], ['y'], **graphs)],
                   [_float('x'), condition])


def loop() -> Variant:
    """Three rounds."""
    one, truth = TensorProto.INT64, TensorProto.BOOL
    body = helper.make_graph([
        helper.make_node('Identity', ['go'], ['on']),
        helper.make_node('Relu', ['a'], ['b'])
    ], 'body', [
        helper.make_tensor_value_info('i', one, ()),
        helper.make_tensor_value_info('go', truth, ()), _float('a')
    ], [helper.make_tensor_value_info('on', truth, ()), _float('b')])
    constants = [
        numpy_helper.from_array(scalar(3, 'int64'), 'n'),
        numpy_helper.from_array(scalar(True, 'bool'), 't')
    ]
    return _finish(
        'Loop', [helper.make_node('Loop', ['n', 't', 'x'], ['y'], body=body)],
        [_float('x')], constants)


def scan() -> Variant:
    """A running sum of rows."""
    body = helper.make_graph([
        helper.make_node('Add', ['state', 'row'], ['next']),
        helper.make_node('Identity', ['next'], ['out'])
    ], 'body', [_float('state'), _float('row')],
                             [_float('next'), _float('out')])
    return _finish('Scan', [
        helper.make_node('Scan', ['s', 'x'], ['last', 'y'], body=body,
                         num_scan_inputs=1)
    ], [_float('s'), _float('x', (6, 4))])


def all_variants() -> Dict[str, onnx.ModelProto]:
    """The graphs by name."""
    found: Dict[str, onnx.ModelProto] = {}
    for part in (unary, binary, choices, networks, shapes, reductions,
                 resizings, dynamic, others):
        for name, model in part():
            if name in found:
                raise ValueError(f'two variants are called {name!r}')
            found[name] = model
    return found
