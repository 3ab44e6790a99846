# Copyright (c) mmbasis authors. All rights reserved.
"""What layers cost by measured latencies of one model on one device."""
from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Iterable, Sequence

import numpy as np

from .costs import Cost, Costs, Ranks
from .layers import Layer

SCHEMA, VERSION = 'mmbasis.latency_table', 1
#: ids of the entries that are no layer
MODEL_ID, COMPRESSED_ID, CARRIER = 'model', 'model/compressed', 'carrier'


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
    source = 'by the latency table'

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
