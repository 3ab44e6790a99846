# Copyright (c) mmbasis authors. All rights reserved.
"""What layers do in a model, and what it costs, read from the graphs of one
run: autograd's, and that of a trace."""
from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from math import prod
from types import SimpleNamespace
from typing import AbstractSet, Any, Callable, NamedTuple
from unittest.mock import patch

import torch
import torch.nn as nn
import torch.utils.checkpoint
from mmengine.analysis import FlopAnalyzer
from torch import Tensor

from ..quirks import OFFSET_LAYERS
from .adapter import Adapter, adapter_of, tensors
from .passes import Unchanged, evaluation, requiring_gradients

#: Names of nodes that may multiply by a matrix of weights. Additions and
#: products by element take parameters, too: positions, scales.
MATRIX_PRODUCT = re.compile('mm|mv|dot|conv|linear|rnn', re.IGNORECASE)
#: Names of nodes that sample at given positions, and which of their operands
#: hold the positions, or the weights of the samples. The first match counts.
SAMPLERS = (
    ('ModulatedDeformConv2dFunctionBackward', (1, 2)),  # mmcv
    ('DeformConv2dFunctionBackward', (1, )),  # mmcv
    ('DeformConv2dFunction', (2, 3)),  # torchvision
    ('DeformRoIPoolFunctionBackward', (1, 2)),  # mmcv
    ('RoI', (1, )),  # mmcv: regions, which a cascade refines
    ('ROI', (1, )),  # torchvision
    ('MultiScaleDeformableAttnFunctionBackward', (3, 4)),  # mmcv, on a GPU
    ('GridSampler', (1, )),
)
#: The operators of MMCV that apply weights, by their names in a trace.
WEIGHTED = ('prim::PythonOp.DeformConv2dFunction',
            'prim::PythonOp.ModulatedDeformConv2dFunction')


class Targets(NamedTuple):
    """Names of layers that stay dense by default.

    A layer makes predictions if its output reaches an output of the model
    without another product by a weight matrix in between, or reaches neither
    an output nor another layer (proposals are detached). A layer that feeds
    another one of the same output counts only for a loss, a single number: in
    a backbone without a head, that leaves the last residual branch. Offsets
    reach, in the same way, the positions where one of :data:`SAMPLERS`
    samples, or its weights.
    """
    predictions: AbstractSet[str]
    offsets: AbstractSet[str]


def trace_targets(model: nn.Module, layers: Mapping[str, nn.Module],
                  run: Callable[[], Any]) -> Targets:
    """Find the :class:`Targets` among a model's layers, given by name: by what
    ``run`` returns, nested outputs or losses, with gradients. That takes as
    much memory as inference."""
    graph = _Graph(model, layers)
    # reentrant checkpoints and frozen layers would hide layers
    no_checkpoint = SimpleNamespace(
        apply=lambda function, preserve, *args: function(*args))
    with torch.enable_grad(), requiring_gradients(model, True), patch.object(
            torch.utils.checkpoint, 'CheckpointFunction', no_checkpoint
    ), torch.autograd.graph.saved_tensors_hooks(
            lambda x: None, _fail), ExitStack() as stack:
        for name, module in layers.items():
            hook = partial(graph.record, name)
            stack.callback(module.register_forward_hook(hook).remove)
        outputs = [x for x in tensors(run()) if x.grad_fn is not None]
    offsets = graph.offsets(outputs).union(
        f'{name}.{OFFSET_LAYERS.get(type(module).__name__)}'.lstrip('.')
        for name, module in model.named_modules())
    # an empty name is that of weights outside of layers
    known = layers.keys() - {''}
    return Targets(graph.predictions(outputs) & known, offsets & known)


def _fail(saved: None) -> Tensor:
    raise RuntimeError('the model computes gradients in its forward pass: '
                       'its layers cannot be traced')


class _Graph:
    """The autograd graph of a run."""

    def __init__(self, model: nn.Module,
                 layers: Mapping[str, nn.Module]) -> None:
        #: by identity, with the first layer that holds it, or an empty name
        self.parameters = {id(x): '' for x in model.parameters()}
        for name, module in layers.items():
            for x in module.parameters(recurse=False):
                self.parameters[id(x)] = self.parameters[id(x)] or name
        #: layers by the nodes of their outputs; keeps the nodes alive, which
        #: have an identity only as long as somebody holds them
        self.layers: dict[Any, str] = {}

    def record(self, name: str, module: nn.Module, args: Any,
               outputs: Any) -> None:
        """A forward hook that notes the nodes of a layer's outputs."""
        for x in tensors(outputs):
            # an in-place operation replaces the node of a view
            x = x if x._base is None else x._base
            if x.grad_fn is not None:
                self.layers[x.grad_fn] = name

    def predictions(self, outputs: list[Tensor]) -> set[str]:
        starts = [x.grad_fn for x in outputs]
        used = set(_walk(starts + _inputs(self.layers)))
        names = set(self.layers.values()) - set(map(self.layers.get, used))
        for output in outputs:
            found = self._last([output.grad_fn])
            if output.numel() > 1 and len(found) > 1:
                feeding = set(_walk(_inputs(found, False), positions=False))
                found = {k: v for k, v in found.items() if k not in feeding}
            names |= set(found.values())
        return names

    def offsets(self, outputs: list[Tensor]) -> set[str]:
        nodes = _walk([*(x.grad_fn for x in outputs), *self.layers])
        return set(self._last(_inputs(nodes, positions=True)).values())

    def _last(self, starts: Iterable[Any]) -> dict[Any, str]:
        """Products by weights next to some nodes, and the layers of these
        weights; an empty name for those of no layer (attention)."""
        found: dict[Any, str] = {}
        for node in _walk(starts, found):
            name = self._layer_of(node)
            if name is not None:
                found[node] = name
        return found

    def _layer_of(self, node: Any) -> str | None:
        # None where a node does not multiply by weights
        if node in self.layers or not MATRIX_PRODUCT.search(node.name()):
            return self.layers.get(node)
        owners = map(self._owners, reversed(_inputs([node])))
        # an empty name counts only if there is no other
        return max(next(filter(None, owners), ()), default=None)

    def _owners(self, operand: Any) -> set[str]:
        """Layers of the matrices that an operand is computed from; none where
        it also depends on what a layer computes."""
        owners = set()
        for node in _walk([operand]):
            if node in self.layers:
                return set()
            if type(node).__name__ == 'AccumulateGrad':
                if id(node.variable) not in self.parameters:
                    return set()
                if node.variable.dim() > 1:
                    owners.add(self.parameters[id(node.variable)])
        return owners


def _inputs(nodes: Iterable[Any],
            positions: bool | None = None) -> list[Any]:
    """What nodes are computed from: only the positions where they sample, or
    all but these, or by default both."""
    return [
        x for node in nodes for i, (x, _) in enumerate(node.next_functions)
        if positions in (None, i in _sampling_operands(node))
    ]


def _walk(starts: Iterable[Any], stop: Container[Any] = (),
          positions: bool | None = None) -> Iterator[Any]:
    """Nodes that some nodes are computed from, and these, each once; not
    beyond those in ``stop``, which may grow on the way."""
    seen, waiting = {None}, list(starts)
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            yield node
            if node not in stop:
                waiting += _inputs([node], positions)


def _sampling_operands(node: Any) -> tuple[int, ...]:
    return next((x for name, x in SAMPLERS if name in node.name()), ())


def model_complexity(model: nn.Module | Adapter, data: Any) -> dict[str, Any]:
    """MACs and parameters of a whole model, counted by MMEngine's analysis;
    a deformable convolution counts as a plain one, without interpolation.

    Args:
        model (nn.Module | Adapter): The model; its raw outputs are traced.
        data (Any): A batch of one image, as its dataloader yields it.

    Returns:
        dict: ``macs``, ``params`` and ``uncounted``: how many operators of
        which name the analysis does not know.
    """
    adapter = adapter_of(model)
    with evaluation(adapter.model), Unchanged(adapter.model).during():
        batch = adapter.prepare(data)
        # the search for a way to run the model would end the trace
        adapter.outputs(batch)
        model = nn.ModuleList([adapter.model])
        model.forward = lambda: tuple(adapter.outputs(batch))
        analyzer = FlopAnalyzer(model, ())
        analyzer.set_op_handle(**dict.fromkeys(WEIGHTED, _deform_conv_macs))
        analyzer.unsupported_ops_warnings(False)
        analyzer.uncalled_modules_warnings(False)
        analyzer.tracer_warnings('none')
        macs, uncounted = analyzer.total(), analyzer.unsupported_ops()
    return dict(
        macs=int(macs),
        params=sum(p.numel() for p in adapter.model.parameters()),
        uncounted={k: int(v) for k, v in uncounted.items()})


def _deform_conv_macs(inputs: list, outputs: list) -> int:
    batch, _, *positions = outputs[0].type().sizes()
    shapes = [x.type().sizes() for x in inputs]
    weight = [x for x in shapes if len(x) == 4][-1]  # a bias may follow
    return batch * prod(positions) * prod(weight)
