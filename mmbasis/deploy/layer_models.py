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
from itertools import chain
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

import numpy as np
import torch
import torch.nn as nn

from ..compression.surgery import replace_modules
from ..layers import BasisLayer, observe
from ..planning import Costs, Layer, Ranks, find_layers
from ..planning.latency_entries import (
    CARRIER,
    COMPRESSED_ID,
    MODEL_ID,
    write_ranks,
)
from ..planning.layers import FORMS
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
                  listener: Callable[[str], None] = lambda text: None,
                  forms: Sequence[str] = FORMS) -> int:
    """Write all layers that a dense model has, in each form at a few ranks,
    the model, and ``index.json`` into a folder; returns how many models that
    is.

    Args:
        folder (str): The folder.
        model (nn.Module): The dense model.
        shape (Sequence[int]): Of its input, ``(N, 3, H, W)``.
        samples (list, optional): ``data_samples`` for detectors that ask
            for them even in mode ``'tensor'``.
        count (int): The most ranks of each layer and form.
        round_to (int): Ranks are multiples of this.
        torchscript (bool): Write TorchScript files for the PyTorch back end
            instead of ONNX. Defaults to False.
        listener (Callable): Takes the name of each file.
        forms (Sequence[str]): Of :data:`FORMS`. Defaults to all.
    """
    os.makedirs(folder, exist_ok=True)
    suffix, entries = '.pt' if torchscript else '.onnx', {}
    raw = RawOutputs(model, samples)
    choose = partial(_choices, forms=forms, count=count, round_to=round_to)
    for entry, module in _models(raw, shape, choose):
        if entry['id'] not in entries:
            file = re.sub(r'[^\w.-]', '_', entry['id']) + suffix
            listener(file)
            _export(module.eval(), torch.randn(*entry['input_shape']),
                    osp.join(folder, file))
            entries[entry['id']] = dict(entry, onnx=file)
    index = json.dumps(dict(version=2, entries=[*entries.values()]), indent=1)
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


def _choices(costs: Costs, forms: Sequence[str], count: int,
             round_to: int) -> List[List[Ranks]]:
    """Ranks of a layer by form, those that save MACs and parameters: the
    multiples of the smallest power of two times ``round_to`` that are at most
    ``count``. Latencies have steps at such ranks."""
    found = []
    for form in forms:
        if costs.why_not(form):
            continue
        step, ranks = round_to, _multiples(costs, form, round_to, round_to)
        while len(ranks) > count:
            step *= 2
            ranks = _multiples(costs, form, step, round_to)
        if ranks:
            found.append(ranks)
    return found


def _multiples(costs: Costs, form: str, step: int,
               round_to: int) -> List[Ranks]:
    """Ranks of a form that save something. With two bases both are about the
    same fraction of their channels, the larger one a multiple of ``step`` and
    the other of ``round_to``: a whole grid would be many models."""
    layer = costs.layer
    full, inputs = layer.full_rank, layer.in_channels
    if form == 'spatial':
        found = [Ranks(x, None, True)
                 for x in range(step, layer.full_spatial_rank + 1, step)]
    elif form == 'input':
        found = [Ranks(None, x) for x in range(step, inputs + 1, step)]
    elif form == 'output':
        found = [Ranks(x) for x in range(step, full + 1, step)]
    else:
        sides = (np.arange(step, max(full, inputs) + 1, step)[:, None]
                 * [full, inputs] // (max(full, inputs) * round_to) * round_to)
        found = [Ranks(x, y) for x, y in sides.tolist()
                 if 0 < x <= y * layer.window]
    return [x for x in found if costs.is_smaller(x)]


def _models(
    raw: RawOutputs, shape: Sequence[int],
    choose: Callable[[Costs], List[List[Ranks]]]
) -> Iterator[Tuple[Dict[str, Any], nn.Module]]:
    """Entries and models: of each group of layers, then of the whole one,
    inside of which layers share the cache and take longer than alone."""
    middle: Dict[str, Ranks] = {}
    runs = _run_layers(raw, shape)
    for number, (group, (costs, size, uses)) in enumerate(runs.items()):
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
        choices = choose(costs)
        if choices:  # the forms take turns
            ranks = choices[number % len(choices)]
            middle.update(dict.fromkeys(uses, ranks[len(ranks) // 2]))
        for chosen in (None, *chain(*choices)):
            layer = dense if chosen is None else _basis(dense, chosen)
            entry = dict(shared, role='layer', **write_ranks(chosen))
            sides = [entry[k] for k in ('rank', 'input_rank') if entry[k]]
            entry['id'] = f'{group}/{entry["form"]}{"x".join(map(str, sides))}'
            yield entry, _carry(layer, size[axis], dims)
    whole = dict(id=MODEL_ID, role=MODEL_ID, input_shape=list(shape))
    yield whole, raw
    raw = copy.deepcopy(raw)
    layers = {raw.model.get_submodule(x): ranks for x, ranks in middle.items()}
    replace_modules(raw.model, {k: _basis(k, v) for k, v in layers.items()})
    named = {k: write_ranks(v) for k, v in middle.items()}
    yield dict(whole, id=COMPRESSED_ID, ranks=named), raw


def _run_layers(raw: RawOutputs, shape: Sequence[int]) -> Dict[str, tuple]:
    """Costs, input shape and uses by name of each group of layers."""
    groups: Dict[str, tuple] = {}

    def look(layer: Layer, module: nn.Module, args: tuple, kwargs: dict,
             y: torch.Tensor) -> None:
        size = tuple(args[0].shape)
        blocks, rows, _ = layer.matrix_shape
        positions = y.numel() // (blocks * rows)
        known = LayerStatistics(
            layer.known_kind.weight_positions(module, args[0], y), positions,
            in_positions=args[0].numel() // (blocks * layer.in_channels),
            middle_positions=positions * size[-1] / y.shape[-1])
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


def _basis(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The layer at some ranks, without zeros, which may be faster."""
    module = BasisLayer(module, ranks.output, input_rank=ranks.input,
                        spatial=ranks.spatial)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=.05)
    return module.eval()
