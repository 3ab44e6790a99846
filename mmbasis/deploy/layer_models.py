# Copyright (c) mmbasis authors. All rights reserved.
"""Small models of single layers, to be timed on the device."""
import copy
import json
import os
import os.path as osp
import re
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any, Callable, Dict, Iterator, Optional, Sequence

import numpy as np
import torch
import torch.nn as nn

from ..compression.surgery import replace_modules
from ..layers import BasisLayer, observe
from ..planning import Costs, Layer, find_layers
from ..planning.latency import CARRIER, COMPRESSED_ID, MODEL_ID
from ..planning.statistics import LayerStatistics
from ..running import evaluation
from ..utils.io import write_atomically

#: channels that feed a layer: few, so that feeding it costs little
_FEED = 4


class _Carrier(nn.Module):
    """Makes the input of a layer on the device and reduces its output there:
    what is left of a timing after that of the carrier alone is the layer, in
    the memory layout that it has inside a network."""

    def __init__(self, layer: nn.Module, dense: nn.Module,
                 shape: Sequence[int]) -> None:
        super().__init__()
        # spatial dimensions, 0 for a linear layer
        dims = max(0, dense.weight.dim() - 2)
        axis = 1 if dims else len(shape) - 1
        self.shape = [*shape[:axis], _FEED, *shape[axis + 1:]]
        self.feed = getattr(nn, f'Conv{dims}d')(
            _FEED, shape[1], 1) if dims else nn.Linear(_FEED, shape[-1])
        self.layer = layer
        # the pooling that ONNX Runtime has for its blocked layout
        self.reduce = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reduce(self.layer(self.feed(x)))


class RawOutputs(nn.Module):
    """A model in mode ``'tensor'``: a classifier's scores, a detector's maps
    before decoding and non-maximum suppression."""

    def __init__(self, model: nn.Module, samples: Optional[list]) -> None:
        super().__init__()
        self.model = model
        self.samples = samples

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x, self.samples, mode='tensor')


def export_layers(folder: str,
                  model: nn.Module,
                  shape: Sequence[int],
                  samples: Optional[list],
                  count: int,
                  round_to: int,
                  torchscript: bool = False,
                  listener: Callable[[str], None] = lambda text: None) -> int:
    """Write all layers that a model has, at a grid of ranks, the model, and
    ``index.json`` into a folder.

    Args:
        folder (str): The folder.
        model (nn.Module): The dense model.
        shape (Sequence[int]): Of its input, ``(N, 3, H, W)``.
        samples (list, optional): ``data_samples`` for detectors that ask
            for them even in mode ``'tensor'``.
        count (int): Ranks for each layer.
        round_to (int): Ranks are multiples of this.
        torchscript (bool): Write TorchScript files for the PyTorch back end
            instead of ONNX. Defaults to False.
        listener (Callable): Takes a line of progress for each layer.

    Returns:
        int: How many models there are.
    """
    os.makedirs(folder, exist_ok=True)
    entries: Dict[str, Dict[str, Any]] = {}
    raw = RawOutputs(model, samples)
    for name, module, size, keys in _models(raw, shape, count, round_to,
                                            listener):
        if name not in entries:
            file = re.sub(r'[^\w.-]', '_', name) + (
                '.pt' if torchscript else '.onnx')
            _export(module.eval(), size, osp.join(folder, file), torchscript)
            entries[name] = dict(
                id=name, onnx=file, input_shape=list(size), **keys)
    index = dict(version=1, entries=list(entries.values()))
    write_atomically(
        osp.join(folder, 'index.json'), json.dumps(index, indent=1))
    return len(entries)


@torch.no_grad()
def _export(module: nn.Module, shape: Sequence[int], path: str,
            torchscript: bool) -> None:
    inputs = torch.randn(*shape)
    if torchscript:
        traced = torch.jit.trace(module, inputs, strict=False)
        torch.jit.freeze(traced).save(path)
    else:
        torch.onnx.export(
            module, (inputs, ), path, input_names=['input'], opset_version=13)


def _models(raw: RawOutputs, shape: Sequence[int], count: int, round_to: int,
            listener: Callable[[str], None]) -> Iterator[tuple]:
    """Id, module, input shape and entry of all models to be timed.

    Layers that differ in nothing that matters share theirs. Inside a network,
    layers take longer than alone, where weights and activations stay in the
    cache; the whole model, dense and compressed, says how much.
    """
    groups = _run_layers(raw, torch.randn(*shape))
    middle: Dict[str, int] = {}
    for index, (group, (costs, size, uses)) in enumerate(groups.items()):
        dense = costs.layer.module
        listener(f'{index + 1} of {len(groups)}: {costs.layer.name}')
        # ranks that save MACs, evenly spread
        ranks = np.arange(round_to, costs.break_even + 1, round_to)
        chosen = np.linspace(0, len(ranks) - 1, min(count, len(ranks)))
        ranks = ranks[chosen.round().astype(int)].tolist()
        if ranks:
            middle.update(dict.fromkeys(uses, ranks[len(ranks) // 2]))
        carrier = f'{CARRIER}/{group.rpartition("/")[2]}'
        alone = _Carrier(nn.Identity(), dense, size)
        yield carrier, alone, alone.shape, dict(role=CARRIER)
        keys = dict(
            role='layer',
            group=group,
            carrier=carrier,
            kind=costs.layer.known_kind.name,
            weight_shape=list(dense.weight.shape),
            uses=uses)
        for rank in (None, *ranks):
            name = 'dense' if rank is None else f'rank{rank}'
            layer = dense if rank is None else _basis(dense, rank)
            yield (f'{group}/{name}', _Carrier(layer, dense, size),
                   alone.shape, dict(keys, rank=rank))
    yield MODEL_ID, raw, shape, dict(role=MODEL_ID)
    raw = copy.deepcopy(raw)
    replace_modules(
        raw.model, {
            x.module: _basis(x.module, middle[x.name])
            for x in find_layers(raw.model) if x.name in middle
        })
    yield COMPRESSED_ID, raw, shape, dict(role=MODEL_ID, ranks=middle)


def _run_layers(raw: RawOutputs, inputs: torch.Tensor) -> Dict[str, tuple]:
    """Costs and input shape of each group of layers that can be compressed,
    and how often one forward pass uses each of them."""
    groups: Dict[str, tuple] = {}

    def look(layer: Layer, module: nn.Module, args: tuple, kwargs: dict,
             y: torch.Tensor) -> None:
        shape = tuple(args[0].shape)
        times, rows, _ = layer.matrix_shape
        known = LayerStatistics(
            layer.known_kind.weight_positions(module, args[0], y),
            y.numel() // (times * rows))
        group = f'{_geometry(module)}/{"x".join(map(str, shape))}'
        _, _, uses = groups.setdefault(
            group, (Costs(layer, known), shape, Counter()))
        uses[layer.name] += 1

    with evaluation(raw.model), ExitStack() as stack:
        for layer in find_layers(raw.model):
            if layer.obstacle is None:
                hook = partial(look, layer)
                stack.callback(observe(layer.module, hook).remove)
        raw(inputs)
    return groups


def _geometry(module: nn.Module) -> str:
    """What tells layers of different speed apart, besides the input."""
    parts = [type(module).__name__, 'x'.join(map(str, module.weight.shape))]
    for key in ('stride', 'padding', 'dilation', 'groups'):
        if hasattr(module, key):
            value = getattr(module, key)
            value = value if isinstance(value, (tuple, str)) else (value, )
            parts.append(key[0] + 'x'.join(map(str, value)))
    return '_'.join(parts)


def _basis(module: nn.Module, rank: int) -> nn.Module:
    """The layer at a rank, with numbers as after training: zeros may be
    faster."""
    module = BasisLayer(module, rank)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=.05)
    return module.eval()
