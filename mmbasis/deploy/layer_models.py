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
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn

from ..compression.surgery import replace_modules
from ..layers import BasisLayer, observe
from ..planning import Costs, Layer, find_layers
from ..planning.latency_table import CARRIER, COMPRESSED_ID, MODEL_ID
from ..planning.statistics import LayerStatistics
from ..running import evaluation
from ..utils.io import write_atomically

#: channels that feed a layer: few, so that feeding it costs little
_FEED = 4


def _carry(layer: nn.Module, channels: int, dims: int) -> nn.Module:
    """Make the input of a layer on the device and reduce its output there, in
    the memory layout that it has inside a network."""
    feed = getattr(nn, f'Conv{dims}d')(
        _FEED, channels, 1) if dims else nn.Linear(_FEED, channels)
    # the pooling that ONNX Runtime has for its blocked layout
    reduce = nn.AdaptiveAvgPool2d(1) if dims == 2 else nn.Identity()
    return nn.Sequential(feed, layer, reduce)


class RawOutputs(nn.Module):
    """A model in mode ``'tensor'``: scores, or a detector's undecoded maps."""

    def __init__(self, model: nn.Module, samples: Optional[list]) -> None:
        super().__init__()
        self.model, self.samples = model, samples

    def forward(self, x: torch.Tensor) -> Any:
        return self.model(x, self.samples, mode='tensor')


def export_layers(folder: str, model: nn.Module, shape: Sequence[int],
                  samples: Optional[list], count: int, round_to: int,
                  torchscript: bool = False,
                  listener: Callable[[str], None] = lambda text: None) -> int:
    """Write all layers that a dense model has, at a grid of ranks, the model,
    and ``index.json`` into a folder; returns how many models that is.

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
        listener (Callable): Takes the name of each file.
    """
    os.makedirs(folder, exist_ok=True)
    suffix, entries = '.pt' if torchscript else '.onnx', {}
    raw = RawOutputs(model, samples)
    for entry, module in _models(raw, shape, count, round_to):
        if entry['id'] not in entries:
            file = re.sub(r'[^\w.-]', '_', entry['id']) + suffix
            listener(file)
            _export(module.eval(), torch.randn(*entry['input_shape']),
                    osp.join(folder, file))
            entries[entry['id']] = dict(entry, onnx=file)
    index = json.dumps(dict(version=1, entries=[*entries.values()]), indent=1)
    write_atomically(osp.join(folder, 'index.json'), index)
    return len(entries)


@torch.no_grad()
def _export(module: nn.Module, inputs: torch.Tensor, path: str) -> None:
    if path.endswith('.pt'):
        traced = torch.jit.trace(module, inputs, strict=False)
        torch.jit.freeze(traced).save(path)
    else:
        torch.onnx.export(
            module, (inputs, ), path, input_names=['input'], opset_version=13)


def _models(raw: RawOutputs, shape: Sequence[int], count: int,
            round_to: int) -> Iterator[Tuple[Dict[str, Any], nn.Module]]:
    """Entries and models: of each group of layers, then of the whole one,
    inside of which layers share the cache and take longer than alone."""
    middle: Dict[str, int] = {}
    for group, (costs, size, uses) in _run_layers(raw, shape).items():
        dense = costs.layer.module
        # spatial dimensions, 0 for a linear layer
        dims = max(0, dense.weight.dim() - 2)
        axis = 1 if dims else -1
        feed = [*size]
        feed[axis] = _FEED
        carrier = f'{CARRIER}/{"x".join(map(str, size))}'
        entry = dict(id=carrier, role=CARRIER, input_shape=feed)
        yield entry, _carry(nn.Identity(), size[axis], dims)
        shared = dict(
            input_shape=feed, group=group, carrier=carrier, uses=uses,
            kind=costs.layer.known_kind.name,
            weight_shape=list(dense.weight.shape))
        # ranks that save MACs, evenly spread
        ranks = np.arange(round_to, costs.break_even + 1, round_to)
        chosen = np.linspace(0, len(ranks) - 1, min(count, len(ranks)))
        ranks = ranks[chosen.round().astype(int)].tolist()
        if ranks:
            middle.update(dict.fromkeys(uses, ranks[len(ranks) // 2]))
        for rank in (None, *ranks):
            layer = dense if rank is None else _basis(dense, rank)
            name = 'dense' if rank is None else f'rank{rank}'
            entry = dict(
                shared, id=f'{group}/{name}', role='layer', rank=rank)
            yield entry, _carry(layer, size[axis], dims)
    whole = dict(id=MODEL_ID, role=MODEL_ID, input_shape=list(shape))
    yield whole, raw
    raw = copy.deepcopy(raw)
    layers = {raw.model.get_submodule(x): rank for x, rank in middle.items()}
    replace_modules(raw.model, {k: _basis(k, v) for k, v in layers.items()})
    yield dict(whole, id=COMPRESSED_ID, ranks=middle), raw


def _run_layers(raw: RawOutputs, shape: Sequence[int]) -> Dict[str, tuple]:
    """Costs, input shape and uses by name of each group of layers."""
    groups: Dict[str, tuple] = {}

    def look(layer: Layer, module: nn.Module, args: tuple, kwargs: dict,
             y: torch.Tensor) -> None:
        size = tuple(args[0].shape)
        blocks, rows, _ = layer.matrix_shape
        known = LayerStatistics(
            layer.known_kind.weight_positions(module, args[0], y),
            y.numel() // (blocks * rows),
            in_positions=args[0].numel() // (blocks * layer.in_channels))
        group = f'{_geometry(module)}/{"x".join(map(str, size))}'
        _, _, uses = groups.setdefault(
            group, (Costs(layer, known), size, Counter()))
        uses[layer.name] += 1

    with evaluation(raw.model), ExitStack() as stack:
        for layer in find_layers(raw.model):
            if layer.obstacle is None:
                hook = partial(look, layer)
                stack.callback(observe(layer.module, hook).remove)
        raw(torch.randn(*shape))
    return groups


def _geometry(module: nn.Module) -> str:
    """What tells layers of different speed apart, besides the input."""
    parts = [type(module).__name__, 'x'.join(map(str, module.weight.shape))]
    for key in ('stride', 'padding', 'dilation', 'groups'):
        if hasattr(module, key):
            values = np.atleast_1d(getattr(module, key))
            parts.append(key[0] + 'x'.join(map(str, values)))
    return '_'.join(parts)


def _basis(module: nn.Module, rank: int) -> nn.Module:
    """The layer at a rank, without zeros, which may be faster."""
    module = BasisLayer(module, rank)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=.05)
    return module.eval()
