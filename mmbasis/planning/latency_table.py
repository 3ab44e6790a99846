# Copyright (c) mmbasis authors. All rights reserved.
"""What layers cost by measured latencies of one model on one device."""
from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Iterable, Mapping, Sequence

import numpy as np

from ..utils.schema import is_integer, of_type, read_json, shown
from .costs import Cost, Costs, Ranks
from .latency_entries import (
    COMPRESSED_ID,
    MODEL_ID,
    check_entries,
    read_ranks,
    write_ranks,
)
from .layers import FORMS, Layer
from .plan import CompressionPlan

SCHEMA = 'mmbasis.latency_table'
#: in version 1 all ranks are of the output form
VERSIONS = (1, 2)
#: of the time alone, what a layer takes in a model at least
LEAST_SCALE = .5


class Grid:
    """Latencies of a layer in one form at the measured ranks, if any.

    Args:
        latencies (dict[Ranks, float]): By ranks, in ms.
        dense (float): Of the dense layer, ms.
    """

    def __init__(self, latencies: dict[Ranks, float], dense: float) -> None:
        self.choices = sorted(latencies, key=_sides)
        self.sides = np.array([_sides(x) for x in self.choices]).reshape(-1, 2)
        times = np.array([latencies[x] for x in self.choices])
        # ranks that are not above others on any side do not cost more
        below = (self.sides <= self.sides[:, None]).all(-1)
        self.latencies = np.where(below, times, 0.).max(-1, initial=0.)
        self.past = max([dense, *times])

    def at(self, ranks: Ranks) -> Any:
        """Milliseconds of the cheapest measured ranks that are not below these
        on any side, infinitely many where there are none."""
        asked = np.stack(np.broadcast_arrays(*_sides(ranks)), -1)
        within = (asked[..., None, :] <= self.sides).all(-1)
        return np.where(within, self.latencies, np.inf).min(
            -1, initial=np.inf)


def _sides(ranks: Ranks) -> tuple[Any, Any]:
    """Ranks of the output and of the input, 0 without a basis there."""
    return (0 if ranks.output is None else ranks.output,
            0 if ranks.input is None else ranks.input)


@dataclass
class Curve:
    """Latency of a layer in one forward pass of the model, ms: dense, and in
    each form."""
    shape: list[int]
    dense: float
    noise: float
    grids: dict[str, Grid]


class LatencyTable(Cost):
    """Measured latencies of the layers of one model on one device, as
    ``tools/latency_table.py measure`` wrote them to a file. Where a lower rank
    was measured slower than a higher one of the same form, its latency counts
    for the higher one too. In a form that was not measured, a layer is not
    faster than dense."""

    source = 'by the latency table'

    def __init__(self, path: str, data: dict[str, Any]) -> None:
        super().__init__('latency')
        version = data['version']
        device, entries = data['device'], check_entries(data)
        #: what it is of; :meth:`load` takes it
        self.target: dict[str, str] = dict(
            path=path,
            device=str(device.get('board') or device.get('cpu')),
            backend=data['backend'],
            precision=data['precision'])
        self.record = dict(table=self.target)
        self.curves = _curves(entries, version)
        self.forms = tuple(x for x in FORMS if x == FORMS[0] or any(
            curve.grids[x].choices for curve in self.curves.values()))
        #: latency of the whole dense model, if it was measured
        self.model_ms = entries.get(MODEL_ID, {}).get('median_ms')
        #: how much longer layers take inside the model than alone
        self._dense_scale = self._basis_scale = 1.
        if self.model_ms is not None:
            self._scale_to(self.model_ms, entries.get(COMPRESSED_ID),
                           version)

    def _scale_to(self, dense_ms: float, compressed: dict[str, Any] | None,
                  version: int) -> None:
        """Predict the latencies of the dense and of the compressed model that
        were measured: in a model, layers share the cache, and blocks of a
        few channels more or less cost what no small model shows."""
        alone = sum(self.cost(name, None) for name in self.curves)
        if alone > dense_ms:
            self._dense_scale = self._basis_scale = dense_ms / alone
        if compressed is None:
            return
        given = compressed.get('ranks', {})
        of_type('a dict by layer', dict).check(
            f'{COMPRESSED_ID}: ranks', given)
        read = {name: read_ranks(x, version, f'{COMPRESSED_ID}: {name}')
                for name, x in given.items()}
        ranks = {name: x for name, x in read.items() if x is not None}
        basis = sum(
            self.cost(name, rank) for name, rank in ranks.items()
            if name in self.curves)
        if basis > 0:
            excess = compressed['median_ms'] - self.predict(ranks)
            self._basis_scale *= max(LEAST_SCALE, 1 + excess / basis)

    @classmethod
    def load(cls, path: str, **target: str | None) -> LatencyTable:
        """Read a table and :meth:`check` what it is of.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no complete table, or of another target.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.get('schema') != SCHEMA:
            raise ValueError(f'{path} is no latency table: make one by '
                             'tools/latency_table.py')
        version = data.get('version')
        if not is_integer(version) or version not in VERSIONS:
            raise ValueError(
                f'{path} is a latency table of version {shown(version)}, this '
                f'mmbasis reads {" and ".join(map(str, VERSIONS))}')
        if data.get('status') != 'complete':
            raise ValueError(f'{path} is not complete: tools/latency_table.py '
                             'measure goes on where it stopped')
        try:
            table = cls(path, data)
        except ValueError as error:
            raise ValueError(f'{path} is malformed: {error}; was the index of '
                             'tools/latency_table.py export measured?'
                             ) from None
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
        return self.cost(costs.layer.name, ranks)

    def pays(self, costs: Costs, ranks: int | Ranks) -> Any:
        return np.logical_and(
            super().pays(costs, ranks),
            self.is_faster(costs.layer.name, ranks))

    def budget(self, fraction: float, layers: Iterable[Costs]) -> float:
        """What some layers may take if the whole model keeps a fraction of
        its latency, ms; negative where all else takes longer alone."""
        dense = self.predict({})
        return fraction * dense - (dense - super().budget(1, layers))

    def cost(self, name: str, ranks: int | Ranks | None) -> Any:
        """Milliseconds that a layer takes in one forward pass of the model,
        None for the dense layer: those of the next higher measured ranks of
        this form, and past the last not less than dense."""
        given, curve = Ranks.of(ranks), self.curves[name]
        dense = self._dense_scale * curve.dense
        if given is None:
            return dense
        grid = curve.grids[given.form]
        return np.minimum(self._basis_scale * grid.at(given),
                          max(dense, self._basis_scale * grid.past))

    def noise(self, name: str) -> float:
        """Differences of :meth:`cost` below this mean nothing, ms."""
        return self._basis_scale * self.curves[name].noise

    def is_faster(self, name: str, ranks: int | Ranks) -> Any:
        """Whether a layer is faster at some ranks than dense, beyond
        noise."""
        basis = self.cost(name, ranks) + self.noise(name)
        return basis < self.cost(name, None)

    def rest(self) -> float:
        """Milliseconds of the dense model outside the layers of the table."""
        layers = sum(self.cost(name, None) for name in self.curves)
        return max(0., (self.model_ms or 0.) - layers)

    def predict(self, ranks: Mapping[str, int | Ranks]) -> float:
        """Milliseconds for one forward pass of the whole model, given the
        ranks of the layers that are compressed."""
        return self.rest() + sum(
            self.cost(name, ranks.get(name)) for name in self.curves)


def refine(path: str, plan: CompressionPlan,
           fraction: float) -> dict[str, Any]:
    """A latency table that agrees with a network that was planned by it: what
    a planner chooses by measurements is on average slower than these say.

    Args:
        path (str): The table.
        plan (CompressionPlan): What became of the layers.
        fraction (float): The latency of the compressed network as a fraction
            of that of the dense one, both measured in one run; over 0.

    Returns:
        dict: The table, whose compressed model is this network.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no complete table with the latency of the whole
            model, is of another model, or the fraction is not over 0.
    """
    table = LatencyTable.load(path)
    if not 0 < fraction < float('inf'):
        raise ValueError(f'the latency is {fraction} of that of the dense '
                         'network, not a positive number')
    if table.model_ms is None:
        raise ValueError(f'{path} has no latency of the whole model: measure '
                         'it again')
    other = [x for x in plan.layers if x not in table.curves]
    if other:
        raise ValueError(f'{path} is of another model than the plan: it lacks '
                         f'{", ".join(other[:4])} ({len(other)} layers in '
                         'all)')
    data = read_json(path)
    rows = [x for x in data['entries'] if x['id'] != COMPRESSED_ID]
    write = _write_rank if data['version'] == 1 else write_ranks
    rows.append(dict(
        id=COMPRESSED_ID, role=MODEL_ID, noise_ms=0.,
        median_ms=fraction * table.model_ms,
        ranks={k: write(x.ranks) for k, x in plan.layers.items()}))
    return dict(data, entries=rows)


def _write_rank(ranks: Ranks) -> int:
    if ranks.form != FORMS[0]:
        raise ValueError(f'tables of version 1 have no form {ranks.form!r}')
    return ranks.output


def _uses(layers: Sequence[dict]) -> tuple[dict[str, dict], dict[str, list]]:
    """How often each layer sees each input shape, by group, and the shape of
    its weights."""
    uses: dict[str, dict] = defaultdict(dict)
    shapes: dict[str, list[int]] = {}
    for entry in layers:
        for name, count in entry['uses'].items():
            uses[name][entry['group']] = count
            shape = shapes.setdefault(name, entry['weight_shape'])
            if shape != entry['weight_shape']:
                raise ValueError(f'{entry["id"]}: weight_shape of {name} is '
                                 f'{entry["weight_shape"]}, elsewhere {shape}')
    return uses, shapes


def _curves(entries: dict[str, dict], version: int) -> dict[str, Curve]:
    """By layer, the sums over all input shapes that it sees."""
    groups: dict[str, dict] = defaultdict(dict)
    noise: dict[str, float] = defaultdict(float)
    layers = [x for x in entries.values() if x.get('role') == 'layer']
    for entry in layers:
        # what feeds the layer is not the layer's
        feed = entries[entry['carrier']]['median_ms']
        key, ranks = entry['group'], read_ranks(entry, version, entry['id'])
        if ranks in groups[key]:
            raise ValueError(f'{entry["id"]}: group {key!r} has an entry of '
                             'the same form and ranks')
        groups[key][ranks] = max(entry['median_ms'] - feed, 1e-6)
        noise[key] = max(noise[key], entry['noise_ms'])
    uses, shapes = _uses(layers)
    curves = {}
    for name, counts in uses.items():
        common = set.intersection(*(set(groups[key]) for key in counts))
        if None not in common:
            raise ValueError(f'{name} has no entry of the dense layer')
        times = {
            ranks: sum(count * groups[key][ranks]
                       for key, count in counts.items())
            for ranks in common
        }
        dense = times[None]
        grids: dict[str, dict] = defaultdict(dict)
        for ranks, ms in times.items():
            if ranks is not None:
                grids[ranks.form][ranks] = ms
        curves[name] = Curve(
            shapes[name], dense,
            sum(count * noise[key] for key, count in counts.items()),
            {form: Grid(grids[form], dense) for form in FORMS})
    return curves
