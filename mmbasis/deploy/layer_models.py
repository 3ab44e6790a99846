# Copyright (c) mmbasis authors. All rights reserved.
"""Small models of single layers, to be timed on the device."""
import copy
import json
import os
import os.path as osp
import re
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..compression.surgery import replace_modules
from ..planning import LayerInfo, evaluation, find_layers, find_targets
from ..planning.latency import CARRIER, COMPRESSED_ID, MODEL_ID
from ..planning.layers import choose_layers
from ..utils.io import write_atomically

#: channels that feed a layer: few, so that feeding it costs little
_FEED = 4


class _Carrier(nn.Module):
    """Makes the input of a layer on the device and reduces its output there:
    what is left of a timing after that of the carrier alone is the layer, in
    the memory layout that it has inside a network."""

    def __init__(self, channels: int, dims: int,
                 layer: Optional[nn.Module]) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        self.feed = conv[dims](_FEED, channels, 1) if dims else nn.Linear(
            _FEED, channels)
        self.layer = layer if layer is not None else nn.Identity()
        # the pooling that ONNX Runtime has for its blocked layout
        self.reduce = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.layer(self.feed(x)))


def _dims(layer: LayerInfo) -> int:
    """Spatial dimensions, 0 for a linear layer."""
    return max(0, layer.module.weight.dim() - 2)


def layer_shapes(model: nn.Module, inputs: torch.Tensor,
                 samples: Optional[list]) -> List[Tuple[LayerInfo, dict]]:
    """Compressible layers and the input shapes that they see.

    Args:
        model (nn.Module): The dense model; its layers get their costs for
            these inputs.
        inputs (Tensor): A batch, ``(N, 3, H, W)``.
        samples (list, optional): ``data_samples`` for detectors that ask for
            them even in mode ``'tensor'``.

    Returns:
        list[tuple[LayerInfo, dict]]: Layers, and for each how often it sees
        an input shape in one forward pass.
    """
    layers = find_layers(model)
    targets = find_targets(model, {x.name: x.module for x in layers},
                           lambda: model(inputs, samples, mode='tensor'))
    choose_layers(model, layers, targets=targets)
    layers = [layer for layer in layers if layer.compressible]
    seen: Dict[str, Dict[tuple, int]] = {layer.name: {} for layer in layers}
    handles = []
    for layer in layers:

        def count(module, args, output, layer=layer):
            shapes = seen[layer.name]
            shape = tuple(args[0].shape)
            shapes[shape] = shapes.get(shape, 0) + 1
            layer.weight_positions += layer.kind.weight_positions(
                module, args[0], output)
            layer.out_positions += output.numel() // (
                layer.matrix_shape[0] * layer.matrix_shape[1])

        handles.append(layer.module.register_forward_hook(count))
    try:
        with evaluation(model), torch.no_grad():
            model(inputs, samples, mode='tensor')
    finally:
        for handle in handles:
            handle.remove()
    return [(layer, seen[layer.name]) for layer in layers if seen[layer.name]]


def rank_grid(layer: LayerInfo, count: int, round_to: int) -> List[int]:
    """Ranks to measure: multiples of ``round_to`` that save MACs, evenly
    spread."""
    ranks = np.arange(round_to, layer.break_even() + 1, round_to)
    if len(ranks) > count:
        chosen = np.linspace(0, len(ranks) - 1, count)
        ranks = ranks[chosen.round().astype(int)]
    return ranks.tolist()


def _geometry(module: nn.Module) -> str:
    """What tells layers of different speed apart, besides the input."""
    parts = [type(module).__name__, 'x'.join(map(str, module.weight.shape))]
    for key in ('stride', 'padding', 'dilation', 'groups'):
        if hasattr(module, key):
            value = getattr(module, key)
            value = value if isinstance(value, (tuple, str)) else (value, )
            parts.append(key[0] + 'x'.join(map(str, value)))
    return '_'.join(parts)


def _fill(layer: nn.Module) -> nn.Module:
    """Numbers as a trained layer has them: zeros may be faster."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=.05)
    return layer.eval()


class LayerModels:
    """Writes the models and their index into a folder.

    Args:
        folder (str): The folder.
        torchscript (bool): Write TorchScript files for the PyTorch back end
            instead of ONNX. Defaults to False.
        opset (int): Opset of the ONNX files. Defaults to 13.
    """

    def __init__(self,
                 folder: str,
                 torchscript: bool = False,
                 opset: int = 13) -> None:
        self.folder = folder
        self.torchscript = torchscript
        self.opset = opset
        self.entries: List[Dict[str, Any]] = []
        os.makedirs(folder, exist_ok=True)

    def add(self, name: str, module: nn.Module, shape: Sequence[int],
            **keys: Any) -> None:
        """Write one model and its entry, unless the entry is there."""
        if any(x['id'] == name for x in self.entries):
            return
        suffix = '.pt' if self.torchscript else '.onnx'
        file = re.sub(r'[^\w.-]', '_', name) + suffix
        path = osp.join(self.folder, file)
        inputs = torch.randn(*shape)
        with torch.no_grad():
            if self.torchscript:
                traced = torch.jit.trace(module.eval(), inputs, strict=False)
                torch.jit.freeze(traced).save(path)
            else:
                torch.onnx.export(
                    module.eval(), (inputs, ),
                    path,
                    input_names=['input'],
                    opset_version=self.opset)
        self.entries.append(
            dict(id=name, onnx=file, input_shape=list(shape), **keys))

    def add_layer(self, layer: LayerInfo, shape: Tuple[int, ...], count: int,
                  ranks: Sequence[int]) -> None:
        """Add a layer at one input shape, dense and at ranks.

        Layers that differ in nothing that matters share their models.
        """
        group = f'{_geometry(layer.module)}/{"x".join(map(str, shape))}'
        known = [x for x in self.entries if x.get('group') == group]
        for entry in known:
            entry['uses'][layer.name] = count
        if known:
            return
        dims = _dims(layer)
        axis = 1 if dims else len(shape) - 1
        channels = shape[axis]
        feed = [*shape[:axis], _FEED, *shape[axis + 1:]]
        carrier = f'{CARRIER}/{"x".join(map(str, shape))}'
        self.add(carrier, _Carrier(channels, dims, None), feed, role=CARRIER)
        for rank in (None, *ranks):
            module = layer.module if rank is None else _fill(
                layer.kind(layer.module, rank))
            self.add(
                f'{group}/{"dense" if rank is None else f"rank{rank}"}',
                _Carrier(channels, dims, module),
                feed,
                role='layer',
                group=group,
                carrier=carrier,
                rank=rank,
                kind=layer.kind.__name__,
                weight_shape=list(layer.module.weight.shape),
                uses={layer.name: count})

    def add_model(self, model: nn.Module, shape: Sequence[int],
                  samples: Optional[list], ranks: Dict[str, int]) -> None:
        """Add the whole model up to its raw outputs, dense and at ranks.

        Inside a network, layers take longer than alone, where weights and
        activations stay in the cache; two measured networks say how much.

        Args:
            model (nn.Module): The dense model.
            shape (Sequence[int]): Of its input.
            samples (list, optional): See :func:`layer_shapes`.
            ranks (dict[str, int]): Of the layers to compress.
        """
        self.add(MODEL_ID, RawOutputs(model, samples), shape, role=MODEL_ID)
        compressed = copy.deepcopy(model)
        replace_modules(
            compressed, {
                layer.module: _fill(
                    layer.kind(layer.module, ranks[layer.name]))
                for layer in find_layers(compressed) if layer.name in ranks
            })
        self.add(
            COMPRESSED_ID,
            RawOutputs(compressed, samples),
            shape,
            role=MODEL_ID,
            ranks=ranks)

    def add_all(self,
                model: nn.Module,
                shape: Sequence[int],
                samples: Optional[list],
                count: int,
                round_to: int,
                listener: Callable[[str], None] = lambda text: None) -> None:
        """Add all layers that a model has, at a grid of ranks, and the model.

        Args:
            model (nn.Module): The dense model.
            shape (Sequence[int]): Of its input.
            samples (list, optional): See :func:`layer_shapes`.
            count (int): Ranks for each layer.
            round_to (int): Ranks are multiples of this.
            listener (Callable): Takes a line of progress for each layer.
        """
        layers = layer_shapes(model, torch.randn(*shape), samples)
        middle = {}
        for index, (layer, seen) in enumerate(layers):
            listener(f'{index + 1} of {len(layers)}: {layer.name}')
            ranks = rank_grid(layer, count, round_to)
            for layer_shape, uses in seen.items():
                self.add_layer(layer, layer_shape, uses, ranks)
            if ranks:
                middle[layer.name] = ranks[len(ranks) // 2]
        self.add_model(model, shape, samples, middle)

    def write_index(self) -> str:
        """Write ``index.json`` and return its path."""
        path = osp.join(self.folder, 'index.json')
        write_atomically(
            path, json.dumps(dict(version=1, entries=self.entries), indent=1))
        return path


class RawOutputs(nn.Module):
    """A model in mode ``'tensor'``: a classifier's scores, a detector's maps
    before decoding and non-maximum suppression."""

    def __init__(self, model: nn.Module, samples: Optional[list]) -> None:
        super().__init__()
        self.model = model
        self.samples = samples

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x, self.samples, mode='tensor')
