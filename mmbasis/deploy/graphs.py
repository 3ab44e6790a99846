# Copyright (c) mmbasis authors. All rights reserved.
"""ONNX graphs: where a model's raw outputs are in them, and rewrites."""
import json
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any, Callable, Dict, Iterable, Iterator, List, Tuple

import torch
import torch.nn as nn
from torch import Tensor

#: where an ONNX file keeps the names of its raw outputs
_KEY = 'mmbasis.raw_outputs'
# MMDeploy's domain: where a graph cut by MMDeploy has two of other names, it
# removes the wrong ones
_DOMAIN, _TAP = 'mmdeploy', 'MMBasisTap'


def heads(model: nn.Module) -> Dict[str, nn.Module]:
    """The modules whose outputs are a model's raw ones, before softmax,
    decoding and suppression, by name: all that are called ``head`` or
    ``…_head``, and what cuts regions out of features."""
    found = {}
    for name, module in model.named_modules():
        # the stages of a cascade are numbered
        words = [x for x in name.split('.') if not x.isdigit()]
        if words and words[-1].endswith(('head', 'roi_extractor')):
            found[name] = module
    return found


def is_of_regions(name: str) -> bool:
    """Whether a head, by name, sees the regions that others proposed."""
    return name.startswith('roi_head.')


def flat_tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        yield from flat_tensors([*value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from flat_tensors(item)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Nested lists, tuples and dicts with other floating-point tensors."""
    if isinstance(value, Tensor):
        return function(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {k: map_tensors(v, function) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(x, function) for x in value)
    return value


class Calls:
    """Names the tensors of the heads' calls, in the order of the calls:
    ``bbox_head[0]:1`` is the second output of the first call of
    ``bbox_head``, ``…<0`` the first input."""

    def __init__(self) -> None:
        self._counts: Dict[str, int] = {}

    def next(self, name: str) -> str:
        """The name of a head's next call."""
        number = self._counts[name] = self._counts.get(name, -1) + 1
        return f'{name}[{number}]'


class _Tap(torch.autograd.Function):
    """Leaves a node with a name in the graph."""

    @staticmethod
    def symbolic(g, x, name):
        tapped = g.op(f'{_DOMAIN}::{_TAP}', x, name_s=name)
        # shapes that are computed from it stay constants
        tapped.setType(x.type())
        return tapped

    @staticmethod
    def forward(ctx, x, name):
        return x.view_as(x)


@contextmanager
def tapped(model: nn.Module) -> Iterator[None]:
    """Have an export of a model mark its raw outputs, and what the heads of
    regions see, for :func:`take_taps`."""
    calls = Calls()

    def tap(call: str, sign: str, value: Any) -> Any:
        numbers = count()
        return map_tensors(
            value, lambda x: _Tap.apply(x, f'{call}{sign}{next(numbers)}'))

    with ExitStack() as stack:
        for name, module in heads(model).items():
            own: List[str] = []

            def before(_, args, name=name, own=own):
                own.append(calls.next(name))
                if is_of_regions(name):
                    return tap(own[-1], '<', args)
                return None

            def after(_, args, outputs, own=own):
                return tap(own.pop(), ':', outputs)

            for handle in (module.register_forward_pre_hook(before),
                           module.register_forward_hook(after)):
                stack.callback(handle.remove)
        yield


def finish(path: str) -> None:
    """Make an exported file what back ends take, in place."""
    import onnx
    model = onnx.load(path)
    drop_dropout(model)
    take_taps(model)
    # torch gives open sizes of different tensors one name, and ONNX Runtime
    # would take them for equal
    del model.graph.value_info[:]
    onnx.save(model, path)


def take_taps(model: Any) -> None:
    """Take the marks of :func:`tapped` out of an ONNX graph, in place, and
    note in the model which tensors they stood at."""
    graph = model.graph
    taps = [x for x in graph.node if (x.domain, x.op_type) == (_DOMAIN, _TAP)]
    found: Dict[str, str] = {}
    for node in taps:
        name = node.attribute[0].s.decode()
        gone, kept = _bypass(graph, node)
        for other, tensor in found.items():
            found[other] = kept if tensor == gone else tensor
        found[name] = kept
    used = {'', *(x.domain for x in graph.node)}
    for opset in [x for x in model.opset_import if x.domain not in used]:
        model.opset_import.remove(opset)
    if found:
        entry = model.metadata_props.add()
        entry.key, entry.value = _KEY, json.dumps(found)


def drop_dropout(model: Any) -> None:
    """Evaluate dropout away in an ONNX graph, in place. MMDeploy's attention
    has it in training mode with a rate of zero, which TensorRT refuses."""
    for node in [x for x in model.graph.node if x.op_type == 'Dropout']:
        _bypass(model.graph, node)


def _bypass(graph: Any, node: Any) -> Tuple[str, str]:
    """Take a node out whose output is its first input; which of the two names
    is gone, and which is kept."""
    kept, gone = node.input[0], node.output[0]
    outputs = {x.name for x in graph.output}
    fixed = {x.name for x in (*graph.input, *graph.initializer)}
    if gone in outputs and kept in outputs | fixed:
        del node.input[1:], node.output[1:], node.attribute[:]
        node.op_type, node.domain = 'Identity', ''
        return kept, gone
    if gone in outputs:
        kept, gone = gone, kept
    graph.node.remove(node)
    _rename(graph, gone, kept)
    return gone, kept


def _rename(graph: Any, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def read_taps(model: Any) -> Dict[str, str]:
    """The tensors of an ONNX model's raw outputs by name; empty if it was not
    exported by :class:`Deployment`."""
    for entry in model.metadata_props:
        if entry.key == _KEY:
            return json.loads(entry.value)
    return {}


def keep_outputs(model: Any, names: Iterable[str]) -> Any:
    """A copy of an ONNX model that returns some of its tensors, without the
    nodes that these do not need."""
    copied = type(model)()
    copied.CopyFrom(model)
    graph, wanted = copied.graph, {*names}
    known = {x.name: x for x in graph.output}
    del graph.output[:]
    for name in dict.fromkeys(names):
        graph.output.add().CopyFrom(known.get(name, _untyped(name)))
    for index in range(len(graph.node) - 1, -1, -1):  # they are in order
        if wanted.isdisjoint(graph.node[index].output):
            del graph.node[index]
        else:
            wanted.update(graph.node[index].input)
            wanted.update(_captured(graph.node[index]))
    return copied


def _untyped(name: str) -> Any:
    """An output of which the type is to be inferred."""
    import onnx
    return onnx.ValueInfoProto(name=name)


def _captured(node: Any) -> Iterator[str]:
    """What the branches of a node take from outside."""
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            yield from (x.name for x in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)
