# Copyright (c) mmbasis authors. All rights reserved.
"""Small models of single layers, to be timed on the device."""
import copy
import json
import os
import os.path as osp
import re
from collections import Counter
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..compression.surgery import replace_modules
from ..layers import BasisLayer
from ..planning import Costs, Layer, find_layers
from ..planning.costs import CARRIER, COMPRESSED_ID, MODEL_ID
from ..planning.statistics import LayerRecorder
from ..running import evaluation
from ..utils.io import write_atomically

#: channels that feed a layer: few, so that feeding it costs little
_FEED = 4


class _Carrier(nn.Module):
    """Makes the input of a layer on the device and reduces its output there:
    what is left of a timing after that of the carrier alone is the layer, in
    the memory layout that it has inside a network."""

    def __init__(self, channels: int, dims: int, layer: nn.Module) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
        self.feed = conv[dims](_FEED, channels, 1) if dims else nn.Linear(
            _FEED, channels)
        self.layer = layer
        # the pooling that ONNX Runtime has for its blocked layout
        self.reduce = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.layer(self.feed(x)))


def _layer_shapes(
        model: nn.Module, inputs: torch.Tensor,
        samples: Optional[list]) -> List[Tuple[Costs, Counter]]:
    """Costs of the layers that can be compressed, and how often each sees an
    input shape in one forward pass."""
    layers = [x for x in find_layers(model) if x.obstacle is None]
    seen: List[Counter] = [Counter() for _ in layers]
    recorder = LayerRecorder(layers)
    with evaluation(model), ExitStack() as stack, recorder:
        for layer, counter in zip(layers, seen):

            def count(module: nn.Module,
                      args: tuple,
                      counter: Counter = counter) -> None:
                counter[tuple(args[0].shape)] += 1

            stack.callback(
                layer.module.register_forward_pre_hook(count).remove)
        model(inputs, samples, mode='tensor')
        recorder.images = recorder.passes = 1
    statistics = recorder.finish()
    return [(Costs(layer, statistics[layer.name]), counter)
            for layer, counter in zip(layers, seen) if counter]


def _rank_grid(costs: Costs, count: int, round_to: int) -> List[int]:
    """Ranks to measure: multiples of ``round_to`` that save MACs, evenly
    spread."""
    ranks = np.arange(round_to, costs.break_even + 1, round_to)
    chosen = np.linspace(0, len(ranks) - 1, min(count, len(ranks)))
    return ranks[chosen.round().astype(int)].tolist()


def _geometry(module: nn.Module) -> str:
    """What tells layers of different speed apart, besides the input."""
    parts = [type(module).__name__, 'x'.join(map(str, module.weight.shape))]
    for key in ('stride', 'padding', 'dilation', 'groups'):
        if hasattr(module, key):
            value = getattr(module, key)
            value = value if isinstance(value, (tuple, str)) else (value, )
            parts.append(key[0] + 'x'.join(map(str, value)))
    return '_'.join(parts)


def _basis(layer: Layer, rank: int) -> nn.Module:
    """The layer at a rank, with numbers as after training: zeros may be
    faster."""
    module = BasisLayer(layer.module, rank)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=.05)
    return module.eval()


class LayerModels:
    """Writes the models and their index into a folder.

    Args:
        folder (str): The folder.
        torchscript (bool): Write TorchScript files for the PyTorch back end
            instead of ONNX. Defaults to False.
    """

    def __init__(self, folder: str, torchscript: bool = False) -> None:
        self.folder = folder
        self.torchscript = torchscript
        self.entries: List[Dict[str, Any]] = []
        os.makedirs(folder, exist_ok=True)

    def _add(self, name: str, module: nn.Module, shape: Sequence[int],
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
                    opset_version=13)
        self.entries.append(
            dict(id=name, onnx=file, input_shape=list(shape), **keys))

    def _add_layer(self, layer: Layer, shape: Tuple[int, ...], count: int,
                   ranks: Sequence[int]) -> None:
        """Add a layer at one input shape, dense and at ranks.

        Layers that differ in nothing that matters share their models.
        """
        size = 'x'.join(map(str, shape))
        group = f'{_geometry(layer.module)}/{size}'
        known = [x for x in self.entries if x.get('group') == group]
        for entry in known:
            entry['uses'][layer.name] = count
        if known:
            return
        # spatial dimensions, 0 for a linear layer
        dims = max(0, layer.module.weight.dim() - 2)
        axis = 1 if dims else len(shape) - 1
        channels = shape[axis]
        feed = [*shape[:axis], _FEED, *shape[axis + 1:]]
        carrier = f'{CARRIER}/{size}'
        alone = _Carrier(channels, dims, nn.Identity())
        self._add(carrier, alone, feed, role=CARRIER)
        for rank in (None, *ranks):
            module = layer.module if rank is None else _basis(layer, rank)
            self._add(
                f'{group}/{"dense" if rank is None else f"rank{rank}"}',
                _Carrier(channels, dims, module),
                feed,
                role='layer',
                group=group,
                carrier=carrier,
                rank=rank,
                kind=layer.kind and layer.kind.name,
                weight_shape=list(layer.module.weight.shape),
                uses={layer.name: count})

    def _add_model(self, model: nn.Module, shape: Sequence[int],
                   samples: Optional[list], ranks: Dict[str, int]) -> None:
        """Add the whole model up to its raw outputs, dense and at ranks.

        Inside a network, layers take longer than alone, where weights and
        activations stay in the cache; two measured networks say how much.
        """
        self._add(MODEL_ID, RawOutputs(model, samples), shape, role=MODEL_ID)
        compressed = copy.deepcopy(model)
        replace_modules(
            compressed, {
                layer.module: _basis(layer, ranks[layer.name])
                for layer in find_layers(compressed) if layer.name in ranks
            })
        whole = RawOutputs(compressed, samples)
        self._add(COMPRESSED_ID, whole, shape, role=MODEL_ID, ranks=ranks)

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
            shape (Sequence[int]): Of its input, ``(N, 3, H, W)``.
            samples (list, optional): ``data_samples`` for detectors that ask
                for them even in mode ``'tensor'``.
            count (int): Ranks for each layer.
            round_to (int): Ranks are multiples of this.
            listener (Callable): Takes a line of progress for each layer.
        """
        layers = _layer_shapes(model, torch.randn(*shape), samples)
        middle = {}
        for index, (costs, seen) in enumerate(layers):
            layer = costs.layer
            listener(f'{index + 1} of {len(layers)}: {layer.name}')
            ranks = _rank_grid(costs, count, round_to)
            for layer_shape, uses in seen.items():
                self._add_layer(layer, layer_shape, uses, ranks)
            if ranks:
                middle[layer.name] = ranks[len(ranks) // 2]
        self._add_model(model, shape, samples, middle)

    def write_index(self) -> None:
        """Write ``index.json``."""
        index = dict(version=1, entries=self.entries)
        write_atomically(
            osp.join(self.folder, 'index.json'), json.dumps(index, indent=1))


class RawOutputs(nn.Module):
    """A model in mode ``'tensor'``: a classifier's scores, a detector's maps
    before decoding and non-maximum suppression."""

    def __init__(self, model: nn.Module, samples: Optional[list]) -> None:
        super().__init__()
        self.model = model
        self.samples = samples

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x, self.samples, mode='tensor')
