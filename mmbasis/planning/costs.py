# Copyright (c) mmbasis authors. All rights reserved.
"""What layers cost, dense or not: MACs, parameters, time on a device."""
from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

from ..factorization import Spectrum
from . import devices
from .layers import Layer
from .statistics import LayerStatistics

SCHEMA, VERSION = 'mmbasis.latency_table', 1
#: ids of the entries that are no layer
MODEL_ID, COMPRESSED_ID, CARRIER = 'model', 'model/compressed', 'carrier'


class Ranks(NamedTuple):
    """How a layer is represented: basis filters per group, and input channels
    per group of an input basis; None for no basis on that side. For costs,
    arrays of both, which broadcast."""
    output: Any = None
    input: Any = None

    @classmethod
    def of(cls, ranks: int | Ranks | None) -> Ranks | None:
        """A planner's choice; a number is a rank of the output form."""
        return ranks if ranks is None or isinstance(ranks, cls) else cls(ranks)


@dataclass(frozen=True)
class Form:
    """How a basis layer is built, apart from its ranks: with a bias even where
    the dense layer has none, and with a batch normalisation between basis and
    coefficients."""
    bias: bool = False
    norm: bool = False


@dataclass(frozen=True, eq=False)
class Costs:
    """MACs and parameters of one layer, given how often it is applied and how
    its basis layer is built; and the ranks of the output form that a planner
    may choose from, those that pay, rising."""
    layer: Layer
    statistics: LayerStatistics
    form: Form = Form()
    ranks: tuple[int, ...] = ()

    @property
    def spectrum(self) -> Spectrum:
        """The spectrum that was measured."""
        assert self.statistics.spectrum is not None
        return self.statistics.spectrum

    def macs(self, ranks: int | Ranks | None = None) -> Any:
        """Multiply-accumulates for one image at some ranks; None for the dense
        layer. A bias costs nothing, as in MMEngine's analysis."""
        known = self.statistics
        if ranks is None:  # of any layer, also one of no known kind
            return self.layer.module.weight.numel() * known.weight_positions
        return self._sum(ranks, known.in_positions, known.weight_positions,
                         known.out_positions)

    def params(self, ranks: int | Ranks | None = None) -> Any:
        """Number of parameters at some ranks; None for the dense layer."""
        ranks, layer = Ranks.of(ranks), self.layer
        if ranks is None:
            module = layer.module
            return module.weight.numel() + (
                module.bias.numel() if layer.has_bias else 0)
        groups, rows, _ = layer.matrix_shape
        has_bias = layer.has_bias or self.form.bias
        params = self._sum(ranks, 1, 1, 1) + groups * rows * has_bias
        if ranks.output is not None:
            params = params + 2 * groups * ranks.output * self.form.norm
        return params

    def _sum(self, ranks: int | Ranks, before: float, at_weights: float,
             behind: float) -> Any:
        """Weights of input basis, basis and coefficients times numbers."""
        groups, rows, in_size = self.layer.matrix_shape
        output, inputs = Ranks.of(ranks) or Ranks()
        total: Any = 0
        if inputs is not None:
            channels = self.layer.in_channels
            total = channels * inputs * before
            in_size = in_size // channels * inputs
        if output is None:
            return groups * (total + rows * in_size * at_weights)
        return groups * (
            total + output * (in_size * at_weights + rows * behind))

    def is_smaller(self, ranks: Any) -> Any:
        """Whether the layer costs less than it does dense, in MACs and in
        parameters."""
        return np.logical_and(self.macs(ranks) < self.macs(),
                              self.params(ranks) < self.params())

    def energy_kept(self, ranks: Ranks) -> float:
        """Fraction of the energy that the directions of the output and of the
        input keep, rounded to six digits."""
        kept = 1.
        if ranks.output is not None:
            kept = self.spectrum.energy_kept(ranks.output)
        if ranks.input is not None:
            assert self.statistics.inputs is not None
            kept -= float(self.statistics.inputs.shares[ranks.input:].sum())
        return round(max(kept, 0.), 6)

    @cached_property
    def break_even(self) -> int:
        """The largest rank of the output form at which the layer
        :meth:`is_smaller`; 0 where there is none."""
        return int(
            self.is_smaller(np.arange(1, self.layer.full_rank + 1)).sum())


class Cost:
    """What a budget counts: ``'macs'`` or ``'params'`` of :class:`Costs`.
    Others derive from it."""
    #: what a plan's record says of it
    record: dict[str, Any] = {}
    #: whether it knows all forms, or the output form alone
    knows_inputs = True

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def of(self, costs: Costs, ranks: int | Ranks | None) -> Any:
        """Cost of a layer at some ranks; None for the dense layer."""
        return getattr(costs, self.metric)(ranks)

    def pays(self, costs: Costs, ranks: int | Ranks) -> Any:
        """Whether a layer is cheaper at some ranks than dense."""
        return costs.is_smaller(ranks)

    def ranks(self, costs: Costs, round_to: int) -> tuple[int, ...]:
        """The multiples of ``round_to`` that pay, rising."""
        return tuple(
            rank for rank in range(round_to, costs.break_even + 1, round_to)
            if self.pays(costs, rank))

    def budget(self, fraction: float, layers: Iterable[Costs]) -> float:
        """What some layers may cost if the network keeps a fraction."""
        return fraction * sum(self.of(layer, None) for layer in layers)

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Require that their cost is known; the ValueError names others."""

    def why_not(self, costs: Costs, round_to: int) -> str:
        """Why no rank of a layer pays."""
        return (f'no rank pays: break-even is at {costs.break_even + 1}'
                f', ranks are multiples of {round_to}')


class DeviceCost(Cost):
    """Milliseconds of layers on a device, by its model: see
    :mod:`mmbasis.planning.devices` for what it assumes. All else that the
    network does is left out.

    Args:
        device (str): Name of a preset, such as ``'xavier-fp16'``; a ValueError
            lists them.
    """

    def __init__(self, device: str) -> None:
        super().__init__('latency')
        self.device = devices.device(device)

    def of(self, costs: Costs, ranks: int | Ranks | None) -> Any:
        layer, known = costs.layer, costs.statistics
        calls = max(known.calls, 1)
        groups, rows, _ = layer.matrix_shape
        convolution = devices.Convolution(
            groups * layer.in_channels, groups * rows, layer.window,
            known.in_positions / calls, known.out_positions / calls, groups,
            transposed=known.weight_positions != known.out_positions)
        output, inputs = Ranks.of(ranks) or Ranks()
        kernels = convolution.kernels(output, inputs)
        return 1e3 * calls * self.device.time(kernels)

    def pays(self, costs: Costs, ranks: int | Ranks) -> Any:
        return np.logical_and(
            super().pays(costs, ranks),
            self.of(costs, ranks) < self.of(costs, None))

    def why_not(self, costs: Costs, round_to: int) -> str:
        return (f'{super().why_not(costs, round_to)}, and none of them is '
                f'faster than the dense layer on {self.device.name}')


@dataclass
class Curve:
    """Latency of a layer in one forward pass of the model, ms: dense, at the
    measured ranks, rising, and past these."""
    shape: list[int]
    dense: float
    noise: float
    ranks: np.ndarray
    latencies: np.ndarray


class LatencyTable(Cost):
    """Measured latencies of the layers of one model on one device, as
    ``tools/latency_table.py measure`` wrote them to a file. Where a lower rank
    was measured slower than a higher one, its latency counts for the higher
    one too."""

    knows_inputs = False

    def __init__(self, path: str, data: dict[str, Any]) -> None:
        super().__init__('latency')
        device = data['device']
        entries = {e['id']: e for e in data['entries']}
        #: what it is of; :meth:`load` takes it
        self.target: dict[str, str] = dict(
            path=path,
            device=str(device.get('board') or device.get('cpu')),
            backend=data['backend'],
            precision=data['precision'])
        self.record = dict(table=self.target)
        self.curves = _curves(entries)
        #: latency of the whole dense model, if it was measured
        self.model_ms = entries.get(MODEL_ID, {}).get('median_ms')
        #: how much longer layers take inside the model than alone
        self._dense_scale = self._basis_scale = 1.
        if self.model_ms is not None:
            self._scale_to(self.model_ms, entries.get(COMPRESSED_ID))

    def _scale_to(self, dense_ms: float,
                  compressed: dict[str, Any] | None) -> None:
        """Predict the latencies of the dense and of the compressed model that
        were measured, as far as that is no speed-up of basis layers."""
        alone = sum(self.cost(name, None) for name in self.curves)
        if alone > dense_ms:
            self._dense_scale = self._basis_scale = dense_ms / alone
        if compressed is None:
            return
        ranks = compressed.get('ranks', {})
        basis = sum(
            self.cost(name, rank) for name, rank in ranks.items()
            if name in self.curves)
        excess = compressed['median_ms'] - self.predict(ranks)
        if basis > 0 and excess > 0:
            self._basis_scale *= 1 + excess / basis

    @classmethod
    def load(cls, path: str, **target: str | None) -> LatencyTable:
        """Read a table and :meth:`check` what it is of.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no complete table, or of another target.
        """
        with open(path, encoding='utf-8') as file:
            try:
                data = json.load(file)
            except ValueError as error:
                raise ValueError(f'{path} is not JSON: {error}') from None
        if not isinstance(data, dict) or data.get('schema') != SCHEMA:
            raise ValueError(f'{path} is no latency table: make one by '
                             'tools/latency_table.py')
        version = data.get('version')
        if version != VERSION:
            raise ValueError(f'{path} is a latency table of version '
                             f'{version!r}, this mmbasis reads {VERSION}')
        if data.get('status') != 'complete':
            raise ValueError(f'{path} is not complete: tools/latency_table.py '
                             'measure goes on where it stopped')
        try:
            table = cls(path, data)
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f'{path} is malformed: {error!r} in its entries; '
                             'was the index of tools/latency_table.py export '
                             'measured?') from None
        table.check(**target)
        return table

    def check(self, **target: str | None) -> None:
        """Require the ``backend``, the ``precision`` and, in its name, the
        ``device`` of a target, None for any; the ValueError names what
        differs."""
        for key, value in target.items():
            found = self.target.get(key, 'unknown')
            if value is not None and value != found and not (
                    key == 'device' and value.lower() in found.lower()):
                raise ValueError(
                    f'{self.target["path"]} was measured with {key} '
                    f'{found!r}, not {value!r}: measure a table there')

    def check_layers(self, layers: Sequence[Layer]) -> None:
        wrong = []
        for layer in layers:
            shape = list(layer.module.weight.shape)
            curve = self.curves.get(layer.name)
            if curve is None:
                wrong.append(f'{layer.name} is not in it')
            elif curve.shape != shape:
                wrong.append(f'{layer.name} has weights {shape}, in the '
                             f'table {curve.shape}')
        if wrong:
            raise ValueError(
                f'the latency table {self.target["path"]} is of another '
                f'model: {"; ".join(wrong[:4])} ({len(wrong)} layers in all)')

    def of(self, costs: Costs, ranks: int | Ranks | None) -> Any:
        given = Ranks.of(ranks) or Ranks()
        return self.cost(costs.layer.name, given.output)

    def pays(self, costs: Costs, ranks: int | Ranks) -> Any:
        given = Ranks.of(ranks) or Ranks()
        return np.logical_and(
            super().pays(costs, ranks),
            self.is_faster(costs.layer.name, given.output))

    def why_not(self, costs: Costs, round_to: int) -> str:
        return (f'{super().why_not(costs, round_to)}, and none of them is '
                'faster than the dense layer, by the latency table')

    def budget(self, fraction: float, layers: Iterable[Costs]) -> float:
        """What some layers may take if the whole model keeps a fraction of
        its latency, ms; negative where all else takes longer alone."""
        dense = self.predict({})
        return fraction * dense - (dense - super().budget(1, layers))

    def cost(self, name: str, rank: Any) -> Any:
        """Milliseconds that a layer takes in one forward pass of the model,
        None for the dense layer; between two measured ranks it is that of the
        higher one, and past the last not less than dense."""
        curve = self.curves[name]
        if rank is None:
            return self._dense_scale * curve.dense
        at = np.searchsorted(curve.ranks, rank)
        return self._basis_scale * curve.latencies[at]

    def noise(self, name: str) -> float:
        """Differences of :meth:`cost` below this mean nothing, ms."""
        return self._basis_scale * self.curves[name].noise

    def is_faster(self, name: str, rank: Any) -> Any:
        """Whether a layer is faster at a rank than dense, beyond noise."""
        return self.cost(name, rank) + self.noise(name) < self.cost(name, None)

    def rest(self) -> float:
        """Milliseconds of the dense model outside the layers of the table."""
        layers = sum(self.cost(name, None) for name in self.curves)
        return max(0., (self.model_ms or 0.) - layers)

    def predict(self, ranks: dict[str, int]) -> float:
        """Milliseconds for one forward pass of the whole model, given the
        ranks of the layers that are compressed."""
        return self.rest() + sum(
            self.cost(name, ranks.get(name)) for name in self.curves)


def _curves(entries: dict[str, dict]) -> dict[str, Curve]:
    """By layer, the sums over all input shapes that it sees."""
    groups: dict[str, dict] = defaultdict(dict)
    noise: dict[str, float] = defaultdict(float)
    uses: dict[str, dict] = defaultdict(dict)  # groups and counts by layer
    shapes = {}
    for entry in entries.values():
        if entry.get('role') == 'layer':
            # what feeds the layer is not the layer's
            feed = entries[entry['carrier']]['median_ms']
            key = entry['group']
            groups[key][entry['rank']] = max(entry['median_ms'] - feed, 1e-6)
            noise[key] = max(noise[key], entry['noise_ms'])
            for name, count in entry['uses'].items():
                uses[name][key] = count
                shapes[name] = entry['weight_shape']
    curves = {}
    for name, counts in uses.items():
        ranks = set.intersection(*(set(groups[key]) for key in counts))
        rising = sorted(ranks - {None})
        times = [
            sum(count * groups[key][rank] for key, count in counts.items())
            for rank in (*rising, None)
        ]
        curves[name] = Curve(
            shapes[name], times[-1],
            sum(count * noise[key] for key, count in counts.items()),
            np.array(rising, dtype=int), np.maximum.accumulate(times))
    return curves
