# Copyright (c) mmbasis authors. All rights reserved.
"""What an engine is made of: NVIDIA's kernels, and what each of them fuses."""
import re
from dataclasses import dataclass
from typing import Any, Dict, Tuple

#: layers of an engine that start no kernel: order between streams, sizes
_NO_KERNEL = {'signal', 'wait', 'shape_call', 'NoOp', 'Constant'}
#: layers that do nothing but copy
_COPY = {'Reformat', 'memcpy', 'memset', 'copy'}
#: parts of the names of generated kernels that move, pad or convert data
_MOVES = {'Move', 'Resh', 'Tran', 'Conc', 'Slic', 'Repl', 'Cast', 'Pad', 'Rev'}
_LAYER = re.compile(r'^Name: (.*?), LayerType: (\w+)', re.M)
_NODE = re.compile(r'\[ONNX Layer: (.*?)\]')


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine.

    Args:
        name (str): As the builder calls it.
        kind (str): Such as ``'correlation'`` (a convolution), ``'gemm'``,
            ``'kgen'`` (generated for what it fuses).
        nodes (tuple[str]): The nodes of the graph that it fuses; none for a
            kernel that the builder puts between them.
    """
    name: str
    kind: str
    nodes: Tuple[str, ...] = ()

    @property
    def copies(self) -> bool:
        """Whether it computes nothing: it copies, pads, converts or changes
        the memory layout."""
        if self.kind in _COPY:
            return True
        found = re.match(r'__myl_([A-Za-z]+)', self.name)
        parts = re.findall('[A-Z][a-z]*', found[1]) if found else []
        return bool(parts) and _MOVES.issuperset(parts)

    def __str__(self) -> str:
        return f'{self.kind}: {" + ".join(self.nodes) or self.name}'


@dataclass(frozen=True)
class Refusal:
    """What a parser or builder says against a graph.

    Args:
        node (str): Name of the node; empty where it names none.
        operator (str): Its operator; empty where it names none.
        message (str): NVIDIA's words.
        own_limit (bool): Whether TensorRT takes it, and only this builder
            does not.
    """
    node: str
    operator: str
    message: str
    own_limit: bool = False

    def __str__(self) -> str:
        where = f'{self.operator} {self.node}'.strip()
        limit = ' (a limit of this builder, not of TensorRT)'
        return (f'{where}: ' if where else '') + self.message + (
            limit if self.own_limit else '')


@dataclass(frozen=True)
class Engine:
    """An engine that was built, or why it was not.

    Args:
        compute_capability (str): Of the card that it is for: ``'8.6'``.
        refusals (tuple[Refusal]): None where it was built.
        kernels (tuple[Kernel]): In the order in which they run.
        size (int): Bytes of the engine.
        version (str): Of TensorRT for RTX; empty where it gave no answer.
    """
    compute_capability: str
    refusals: Tuple[Refusal, ...] = ()
    kernels: Tuple[Kernel, ...] = ()
    size: int = 0
    version: str = ''

    @property
    def refused(self) -> bool:
        """Whether TensorRT would not take the graph either."""
        return any(not x.own_limit for x in self.refusals)

    @property
    def copies(self) -> Tuple[Kernel, ...]:
        """The kernels that compute nothing."""
        return tuple(x for x in self.kernels if x.copies)

    def summary(self) -> Dict[str, Any]:
        """What a report keeps of it."""
        return dict(
            builder=f'TensorRT for RTX {self.version}'.rstrip(),
            compute_capability=self.compute_capability,
            built=not self.refusals,
            refused=self.refused,
            errors=[dict(vars(x), text=str(x)) for x in self.refusals],
            bytes=self.size,
            kernels=len(self.kernels),
            copies=len(self.copies),
            fused=[str(x) for x in self.kernels])


def read_kernels(log: str) -> Tuple[Kernel, ...]:
    """The kernels that a builder's log lists, written with
    ``ProfilingVerbosity.DETAILED``; none if it lists none."""
    layers = log.rpartition('\nLayers:\n')[2].partition('\nI/O Tensors:')[0]
    found = []
    for line in layers.splitlines():
        layer = _LAYER.match(line)
        if layer and layer[2] not in _NO_KERNEL:
            nodes = dict.fromkeys(_NODE.findall(line))
            found.append(Kernel(layer[1], layer[2], tuple(nodes)))
    return tuple(found)
