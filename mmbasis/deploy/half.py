# Copyright (c) mmbasis authors. All rights reserved.
"""Fp16 as a strongly typed engine wants it: written into the ONNX graph.

Not by ``onnxruntime.transformers.float16``: between two operators that it
keeps in fp32 it goes through fp16, where squares overflow (``Pow`` and
``ReduceMean`` of a normalisation) and coordinates of boxes lose their last
pixel; and it rounds constants that an fp32 operator shares.
"""
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Set

import numpy as np

from ..utils.io import whole_file

#: operators that are worth fp16. What none of them follows, as the decoding of
#: boxes, stays fp32: it is cheap, and coordinates have more digits than fp16
HEAVY = set('Conv ConvTranspose Gemm MatMul'.split())
#: … and what these choose by, in names of operators of any domain
_CHOICES = 'NMS', 'NonMaxSuppression', 'RoiAlign', 'TopK'
#: operators that stay fp32: sums and powers, which overflow or lose digits;
#: choices, which turn on near ties; coordinates; types that ONNX fixes
FP32 = set("""
Constant ConstantOfShape CumSum DequantizeLinear DynamicQuantizeLinear Exp
EyeLike GatherND GlobalLpPool GridSample GroupNormalization If
InstanceNormalization LayerNormalization Log LogSoftmax Loop LpNormalization
Mod Multinomial NonMaxSuppression NonZero Pow QuantizeLinear RandomNormal
RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1
ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMean ReduceProd ReduceSum
ReduceSumSquare RoiAlign Scan Softmax Softplus Sqrt TopK
""".split())
#: inputs that ONNX wants in fp32 even where the operator is fp16
_FP32_INPUTS = dict(Resize=(1, 2))
#: the largest number of fp16, and the smallest with all of its digits
LARGEST, SMALLEST = 65504., 2.**-14
_STANDARD = ('', 'ai.onnx')


def write_half(path: str, output: str,
               images: Sequence[np.ndarray] = ()) -> None:
    """Write an fp16 graph of the same inputs and outputs, which stay fp32.

    Convolutions, matrix products and what lies between them become fp16;
    operators of :data:`FP32`, of other domains, and whose constants or values
    on the images fp16 cannot hold stay fp32, with casts around them. No
    operator gets inputs of mixed types.

    Args:
        path (str): The fp32 ONNX file.
        output (str): The fp16 one, whole or not at all.
        images (Sequence[ndarray]): What the graph takes, ``(N, 3, H, W)``.

    Raises:
        ValueError: If an operator hides the types of what follows it.
    """
    import onnx
    model = onnx.load(path)
    _constants_to_initializers(model.graph)
    model = onnx.shape_inference.infer_shapes(model)
    graph = _Graph(model.graph, path)
    graph.wide = _wide_tensors(model, graph.floats, images)
    graph.convert(graph.fp16_nodes())
    onnx.checker.check_model(model, full_check=True)
    with whole_file(output) as temporary:
        onnx.save(model, temporary)


def _constants_to_initializers(graph: Any) -> None:
    """So that each operator can have a constant in its own precision."""
    from onnx.helper import get_attribute_value
    nodes = []
    for node in graph.node:
        if node.op_type == 'Constant' and node.attribute[0].name == 'value':
            tensor = get_attribute_value(node.attribute[0])
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _wide_tensors(model: Any, floats: Set[str],
                  images: Sequence[np.ndarray]) -> Set[str]:
    """Tensors with values beyond half the range of fp16 on the images."""
    if not images:
        return set()
    import onnx
    import onnxruntime
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    names = [y for x in graph.node for y in x.output if y in floats]
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=x) for x in names)
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    opened.graph.CopyFrom(graph)
    session = onnxruntime.InferenceSession(
        opened.SerializeToString(), providers=['CPUExecutionProvider'])
    wide: Set[str] = set()
    for image in images:
        values = session.run(None, {session.get_inputs()[0].name: image})
        wide.update(name for name, x in zip(names, values)
                    if np.abs(x).max(initial=0.) > LARGEST / 2)
    return wide


class _Graph:
    """What has to be known of a graph whose types are inferred."""

    def __init__(self, graph: Any, path: str) -> None:
        from onnx import TensorProto, numpy_helper
        self.graph, self.fp32, self.fp16 = (
            graph, TensorProto.FLOAT, TensorProto.FLOAT16)
        self.constants: Dict[str, np.ndarray] = {
            x.name: numpy_helper.to_array(x)
            for x in graph.initializer if x.data_type == self.fp32}
        known = (*graph.input, *graph.value_info, *graph.output)
        types = {x.name: x.type.tensor_type.elem_type for x in known}
        for node in graph.node:
            for name in [x for x in node.output if x]:
                if not types.get(name):
                    raise ValueError(
                        f'{path}: the type of {name} is not known, as '
                        f'{node.domain or "ONNX"}::{node.op_type} does not '
                        'tell it: export a graph that ends before it '
                        '(before-nms)')
        #: tensors whose values fp16 cannot hold
        self.wide: Set[str] = set()
        #: tensors of fp32, constants too
        self.floats = {k for k, v in types.items() if v == self.fp32}
        self.floats.update(self.constants)

    def fp16_nodes(self) -> Set[int]:
        """Positions of the nodes that become fp16."""
        nodes = self.graph.node
        inner = set(_names(y for x in nodes for y in _inside(x)))
        data = {x.name for x in self.graph.input}
        for node in nodes:  # the rest are shapes and constants
            if node.op_type != 'Shape' and data.intersection(node.input):
                data.update(node.output)
        chosen = set()
        needed: Set[str] = set()  # by a heavy operator further on
        for i, node in reversed([*enumerate(nodes)]):
            own = node.domain in _STANDARD
            if (node.op_type in HEAVY or not own
                    or needed.intersection(node.output)):
                if not any(x in node.op_type for x in _CHOICES):
                    needed.update(node.input)
                if (own and node.op_type not in FP32
                        and data.intersection(node.input)
                        and not inner.intersection(node.output)
                        and all(map(self._fits, node.input))
                        and self.wide.isdisjoint(node.output)):
                    chosen.add(i)
        return chosen

    def _fits(self, name: str) -> bool:
        """Whether fp16 can hold what a node reads; small weights can go."""
        if name in self.wide:
            return False
        value = np.abs(self.constants.get(name, np.zeros(1)))
        value = value[np.isfinite(value)]
        largest = value.max(initial=0.)
        return largest == 0 or SMALLEST <= largest <= LARGEST

    def convert(self, chosen: Set[int]) -> None:
        """Make nodes fp16, with casts and constants as they need them."""
        from onnx.helper import make_node
        graph = self.graph
        made = {x for i in chosen for x in graph.node[i].output
                if x in self.floats}  # in fp16
        nodes: List[Any] = []
        given: Dict[Any, str] = {}  # by tensor and type
        for i, node in enumerate(graph.node):
            fixed = _FP32_INPUTS.get(node.op_type, ())
            for j, name in enumerate(node.input):
                half = i in chosen and j not in fixed
                if name not in self.floats or half == (name in made):
                    continue
                key = name, half
                if key not in given:
                    given[key] = f'{name}_{"fp16" if half else "fp32"}'
                    if name in self.constants:
                        self._add_constant(given[key], name)
                    else:
                        nodes.append(make_node(
                            'Cast', [name], [given[key]], f'Cast_{given[key]}',
                            to=self.fp16 if half else self.fp32))
                node.input[j] = given[key]
            for part in node.attribute if i in chosen else ():
                if (node.op_type, part.name, part.i) == (
                        'Cast', 'to', self.fp32):
                    part.i = self.fp16
            nodes.append(node)
        self._finish(nodes, made)

    def _add_constant(self, name: str, source: str) -> None:
        from onnx import numpy_helper
        value = self.constants[source].astype(np.float16)
        self.graph.initializer.append(numpy_helper.from_array(value, name))

    def _finish(self, nodes: List[Any], made: Set[str]) -> None:
        """Outputs stay fp32; what is not needed any more goes."""
        from onnx.helper import make_node
        graph = self.graph
        for name in {x.name for x in graph.output} & made:
            half = f'{name}_fp16'
            for node in nodes:
                _rename(node.input, name, half)
                _rename(node.output, name, half)
            nodes.append(make_node('Cast', [half], [name], f'Cast_{name}',
                                   to=self.fp32))
        used = set(_names(nodes))
        constants = [x for x in graph.initializer if x.name in used]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        graph.initializer.extend(constants)


def _rename(names: Any, before: str, after: str) -> None:
    for i, name in enumerate(names):
        if name == before:
            names[i] = after


def _inside(node: Any) -> List[Any]:
    """The nodes of the branches or the body of a node."""
    return [x for part in node.attribute if part.HasField('g')
            for x in part.g.node]


def _names(nodes: Iterable[Any]) -> Iterator[str]:
    """All that nodes read, inside of them, too."""
    for node in nodes:
        yield from node.input
        yield from _names(_inside(node))
