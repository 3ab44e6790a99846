# Copyright (c) mmbasis authors. All rights reserved.
"""What layers do in a model, read from the autograd graph of one run."""
import re
from contextlib import ExitStack, contextmanager
from typing import (
    AbstractSet,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
)

import torch
import torch.nn as nn
import torch.utils.checkpoint
from torch import Tensor

from ..quirks import OFFSET_LAYERS
from .batch import tensors

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


class Targets(NamedTuple):
    """Names of layers that stay dense by default.

    A layer makes predictions if its output reaches an output of the model
    without another product by a weight matrix in between: scales, activations,
    normalisations, sums and losses do not count. So does a layer whose output
    reaches neither an output nor another layer: proposals, for example, are
    detached.

    Of the layers that one output reaches, those do not count that feed another
    of them: in a backbone without a head, each residual branch reaches the
    output, and the last one counts. A loss, a single number, tells nothing of
    the kind: all layers that it reaches count.

    A layer decides where others sample if its output reaches the sampling
    positions, or the weights of the samples, of one of :data:`SAMPLERS` in the
    same way.

    Args:
        predictions (set[str]): Layers that make predictions.
        offsets (set[str]): Layers that decide where others sample.
    """
    predictions: AbstractSet[str]
    offsets: AbstractSet[str]


def trace_targets(model: nn.Module, layers: Mapping[str, nn.Module],
                  run: Callable[[], Any]) -> Targets:
    """Find the layers that make predictions and those that decide where
    others sample.

    The graph holds no activations, so a trace takes as much memory as
    inference. Nothing is kept.

    Args:
        model (nn.Module): The model. Its parameters require gradients during
            the trace, so that frozen layers are seen.
        layers (Mapping[str, nn.Module]): Layers of the model by name.
        run (Callable): Runs the model, and returns nested dictionaries,
            sequences and dataclasses of tensors: outputs or losses.

    Returns:
        Targets: Some of the names. Empty where the model runs without
        gradients (``no_grad``), which nobody can look into.
    """
    graph = _Graph(model, layers)
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_requiring_gradients(model))
        stack.enter_context(_without_checkpoints())
        stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(_drop, _fail))
        for name, module in layers.items():
            handle = module.register_forward_hook(graph.recorder(name))
            stack.callback(handle.remove)
        outputs = [x for x in tensors(run()) if x.grad_fn is not None]
    return Targets(
        graph.predictions(outputs),
        graph.offsets(outputs) | _named(model, layers))


def _named(model: nn.Module, layers: Mapping[str, nn.Module]) -> Set[str]:
    """Names of the offset layers that are known by name."""
    return {
        f'{name}.{OFFSET_LAYERS[type(module).__name__]}'.lstrip('.')
        for name, module in model.named_modules()
        if type(module).__name__ in OFFSET_LAYERS
    } & layers.keys()


class _Graph:
    """The autograd graph of a run.

    Args:
        model (nn.Module): The model.
        layers (Mapping[str, nn.Module]): Layers of the model by name.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str,
                                                         nn.Module]) -> None:
        self.parameters = {id(x) for x in model.parameters()}
        self.owners: Dict[int, str] = {}
        for name, module in layers.items():
            for parameter in module.parameters(recurse=False):
                self.owners.setdefault(id(parameter), name)
        #: layers by the nodes of their outputs; keeps the nodes alive, which
        #: have an identity only as long as somebody holds them
        self.layers: Dict[Any, str] = {}

    def recorder(self, name: str) -> Callable:
        """A forward hook that notes the nodes of a layer's outputs."""

        def hook(module: nn.Module, args: Any, outputs: Any) -> None:
            for x in tensors(outputs):
                # an in-place operation replaces the node of a view
                x = x if x._base is None else x._base
                if x.grad_fn is not None:
                    self.layers[x.grad_fn] = name

        return hook

    def predictions(self, outputs: Iterable[Tensor]) -> Set[str]:
        """Names of the layers that make predictions."""
        outputs = list(outputs)
        names = self._ends([x.grad_fn for x in outputs])
        for output in outputs:
            found = self._last([output.grad_fn])
            if output.numel() > 1 and len(found) > 1:
                feeding = set(_walk(_inputs(found, values=True), values=True))
                found = {k: v for k, v in found.items() if k not in feeding}
            names |= set(found.values())
        return names - {''}

    def offsets(self, outputs: Iterable[Tensor]) -> Set[str]:
        """Names of the layers that decide where others sample."""
        starts = [x.grad_fn for x in outputs]
        operands = [
            node.next_functions[index][0]
            for node in _walk([*starts, *self.layers])
            for index in _sampling_operands(node)
            if index < len(node.next_functions)
        ]
        return set(self._last(operands).values()) - {''}

    def _ends(self, outputs: List[Any]) -> Set[str]:
        """Names of the layers that neither an output nor another layer depends
        on."""
        used = {
            self.layers[node]
            for node in _walk(outputs + _inputs(self.layers))
            if node in self.layers
        }
        return set(self.layers.values()) - used

    def _last(self, starts: Iterable[Any]) -> Dict[Any, str]:
        """Products by weights next to some nodes, and whose weights they are;
        empty for those of no layer (attention's)."""
        found: Dict[Any, str] = {}

        def stop(node: Any) -> bool:
            name = self._layer_of(node)
            if name is not None:
                found[node] = name
            return name is not None

        for _ in _walk(starts, stop):
            pass
        return found

    def _layer_of(self, node: Any) -> Optional[str]:
        """None where a node does not multiply by weights."""
        if node in self.layers:
            return self.layers[node]
        if not MATRIX_PRODUCT.search(node.name()):
            return None
        for operand in reversed(_inputs([node])):
            weights = self._weights(operand)
            if weights:
                names = [self.owners[x] for x in weights if x in self.owners]
                return names[0] if names else ''
        return None

    def _weights(self, operand: Any) -> Set[int]:
        """Matrices of parameters that an operand is computed from; none where
        it also depends on what a layer computes."""
        weights = set()
        for node in _walk([operand]):
            if node in self.layers:
                return set()
            variable = _variable(node)
            if variable is not None and id(variable) not in self.parameters:
                return set()
            if variable is not None and variable.dim() > 1:
                weights.add(id(variable))
        return weights


def _inputs(nodes: Iterable[Any], values: bool = False) -> List[Any]:
    """What nodes are computed from.

    Args:
        nodes (Iterable): The nodes.
        values (bool): Leave out positions to sample at. Defaults to False.
    """
    return [
        x for node in nodes for i, (x, _) in enumerate(node.next_functions)
        if not (values and i in _sampling_operands(node))
    ]


def _walk(starts: Iterable[Any],
          stop: Callable[[Any], bool] = lambda node: False,
          values: bool = False) -> Iterator[Any]:
    """Nodes that some nodes are computed from, and these, each once; not
    beyond where to stop."""
    seen, waiting = set(), list(starts)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        if not stop(node):
            waiting += _inputs([node], values)


def _variable(node: Any) -> Optional[Tensor]:
    is_leaf = type(node).__name__ == 'AccumulateGrad'
    return node.variable if is_leaf else None


def _sampling_operands(node: Any) -> Tuple[int, ...]:
    for name, operands in SAMPLERS:
        if name in node.name():
            return operands
    return ()


@contextmanager
def _requiring_gradients(model: nn.Module) -> Iterator[None]:
    frozen = [
        x for x in model.parameters()
        if not x.requires_grad and x.is_floating_point()
    ]
    try:
        for parameter in frozen:
            parameter.requires_grad = True
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad = False


class _NoCheckpoint:
    """Runs what is to be checkpointed as if it was not."""

    @staticmethod
    def apply(function: Callable, preserve: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """Reentrant checkpoints hide their layers from the graph. There is nothing
    to save: the graph holds no activations."""
    module: Any = torch.utils.checkpoint
    original = module.CheckpointFunction
    module.CheckpointFunction = _NoCheckpoint
    try:
        yield
    finally:
        module.CheckpointFunction = original


def _drop(tensor: Tensor) -> None:
    return None


def _fail(saved: None) -> Tensor:
    raise RuntimeError('the model computes gradients in its forward pass: '
                       'its layers cannot be traced')
