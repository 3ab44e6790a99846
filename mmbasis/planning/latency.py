# Copyright (c) mmbasis authors. All rights reserved.
"""What layers cost in milliseconds on a device, as tools/latency_table.py
measured it."""
import json
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import numpy as np

from .layers import Layer

SCHEMA, VERSION = 'mmbasis.latency_table', 1
#: ids of the entries that are no layer
MODEL_ID, COMPRESSED_ID, CARRIER = 'model', 'model/compressed', 'carrier'


@dataclass
class Curve:
    """Latency of one layer at one input shape.

    Args:
        shape (list[int]): Of the dense weights.
        kind (str): Class name of the basis layer.
        dense (float): Latency of the dense layer, ms.
        noise (float): Two latencies that differ by less are equal, ms.
        ranks (ndarray): Measured ranks, rising.
        latencies (ndarray): Of the basis layer at those ranks, ms, never
            falling: see :meth:`LatencyTable.load`.
    """
    shape: List[int]
    kind: str
    dense: float
    noise: float
    ranks: np.ndarray
    latencies: np.ndarray

    def cost(self, rank: Optional[int]) -> float:
        """Latency at a rank, None for dense; between two measured ranks it is
        that of the higher one, and past the last not less than dense."""
        if rank is None:
            return self.dense
        at = int(np.searchsorted(self.ranks, rank))
        if at < len(self.ranks):
            return float(self.latencies[at])
        return float(max(self.dense, self.latencies[-1]))


def _require(condition: bool, path: str, text: str) -> None:
    if not condition:
        raise ValueError(f'{path} {text}')


class LatencyTable:
    """Measured latencies of the layers of one model on one device.

    Args:
        path (str): Where it was read from, for messages.
        device (dict): Description of the device.
        backend (str): ``'onnxruntime'``, ``'torch'``, ``'tensorrt'`` …
        precision (str): ``'fp32'``, ``'fp16'`` or ``'int8'``.
        curves (dict[str, list[tuple[Curve, int]]]): For each layer, the
            curves of the input shapes it sees and how often it sees them in
            one forward pass.
        model_ms (float, optional): Latency of the whole dense model.
        compressed_ms (float, optional): Of the whole model at some ranks.
        compressed_ranks (dict[str, int], optional): Those ranks.
    """

    def __init__(self,
                 path: str,
                 device: Dict[str, Any],
                 backend: str,
                 precision: str,
                 curves: Dict[str, List[Tuple[Curve, int]]],
                 model_ms: Optional[float] = None,
                 compressed_ms: Optional[float] = None,
                 compressed_ranks: Optional[Dict[str, int]] = None) -> None:
        self.path = path
        self.device = device
        self.backend = backend
        self.precision = precision
        self.curves = curves
        self.model_ms = model_ms
        #: how much longer layers take inside the model than alone
        self._dense_scale = self._basis_scale = 1.
        self._fit_scales(compressed_ms, compressed_ranks or {})

    def _fit_scales(self, compressed_ms: Optional[float],
                    ranks: Dict[str, int]) -> None:
        """Make the predictions of the dense and of the compressed model those
        that were measured, as far as that is no speed-up of basis layers."""
        if self.model_ms is None:
            return
        alone = sum(self.cost(name, None) for name in self.curves)
        if alone > self.model_ms:
            self._dense_scale = self._basis_scale = self.model_ms / alone
        if compressed_ms is None:
            return
        basis = sum(
            self.cost(name, rank) for name, rank in ranks.items()
            if name in self.curves)
        excess = compressed_ms - self.predict(ranks)
        if basis > 0 and excess > 0:
            self._basis_scale *= 1 + excess / basis

    @property
    def device_name(self) -> str:
        """The board, or the processor."""
        return str(self.device.get('board') or self.device.get('cpu'))

    def describe(self) -> Dict[str, str]:
        """Plain data for a plan's record; :meth:`of` reads it again."""
        return dict(
            path=self.path,
            device=self.device_name,
            backend=self.backend,
            precision=self.precision)

    # --------------------------------------------------------------- read
    @classmethod
    def of(cls, table: Union[str, Dict[str, str], 'LatencyTable']) -> \
            'LatencyTable':
        """A table from its file, from ``dict(path=…, device=…, backend=…,
        precision=…)`` that says what it must be of, or itself."""
        if isinstance(table, LatencyTable):
            return table
        return cls.load(**(dict(
            path=table) if isinstance(table, str) else table))

    @classmethod
    def load(cls,
             path: str,
             device: Optional[str] = None,
             backend: Optional[str] = None,
             precision: Optional[str] = None) -> 'LatencyTable':
        """Read and check a table.

        A layer is never taken to be faster at a higher rank: where a lower
        rank was measured slower, its latency counts for the higher one too.

        Args:
            path (str): JSON file of ``tools/latency_table.py measure``.
            device (str, optional): Text that the device's name must contain.
            backend (str, optional): Back end that it must be of.
            precision (str, optional): Precision that it must be of.

        Returns:
            LatencyTable: The table.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no complete latency table, or of another
                device, back end or precision.
        """
        data = _read(path)
        try:
            table = cls(path, data['device'], data['backend'],
                        data['precision'], _curves(data['entries']),
                        *_model_ms(data['entries']))
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f'{path} is malformed: {error!r} in its entries; '
                             'was the index of tools/latency_table.py export '
                             'measured?') from None
        table.check(device, backend, precision)
        return table

    def check(self,
              device: Optional[str] = None,
              backend: Optional[str] = None,
              precision: Optional[str] = None) -> None:
        """Require that the table speaks of a target; see :meth:`load`."""
        found = dict(
            device=self.device_name,
            backend=self.backend,
            precision=self.precision)
        wanted = dict(device=device, backend=backend, precision=precision)
        for key, value in wanted.items():
            if value is None:
                continue
            fits = value.lower() in found[key].lower() if key == 'device' \
                else value == found[key]
            _require(
                fits, self.path, f'was measured with {key} {found[key]!r}, '
                f'not {value!r}: measure a table there')

    # -------------------------------------------------------------- costs
    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Require curves for layers.

        Raises:
            ValueError: Naming the layers that the table does not hold, or
                holds with other weights.
        """
        missing = [
            layer.name for layer in layers if layer.name not in self.curves
        ]
        wrong = [
            f'{layer.name} has weights {list(layer.module.weight.shape)}, in '
            f'the table {curve.shape}' for layer in layers
            for curve, _ in self.curves.get(layer.name, [])[:1]
            if curve.shape != list(layer.module.weight.shape)
        ]
        if missing or wrong:
            text = '; '.join(wrong[:2] +
                             [f'{x} is not in it' for x in missing[:2]])
            raise ValueError(
                f'the latency table {self.path} is of another model: {text} '
                f'({len(missing) + len(wrong)} layers in all)')

    def cost(self, name: str, rank: Optional[int]) -> float:
        """Milliseconds that a layer takes in one forward pass of the model, at
        all its input shapes; ``rank`` None is the dense layer."""
        scale = self._dense_scale if rank is None else self._basis_scale
        return scale * sum(n * curve.cost(rank)
                           for curve, n in self.curves[name])

    def noise(self, name: str) -> float:
        """Differences of :meth:`cost` below this mean nothing, ms."""
        return self._basis_scale * sum(n * curve.noise
                                       for curve, n in self.curves[name])

    def is_faster(self, name: str, rank: int) -> bool:
        """Whether a layer is faster at a rank than dense, beyond noise."""
        return self.cost(name, rank) + self.noise(name) < self.cost(name, None)

    def measured_ranks(self, name: str) -> List[int]:
        """The ranks that were measured at all input shapes of a layer."""
        sets = [set(curve.ranks.tolist()) for curve, _ in self.curves[name]]
        return sorted(set.intersection(*sets))

    def rest(self) -> float:
        """Milliseconds of the dense model outside the layers of the table."""
        if self.model_ms is None:
            return 0.
        layers = sum(self.cost(name, None) for name in self.curves)
        return max(0., self.model_ms - layers)

    def budget(self, fraction: float, names: Iterable[str]) -> float:
        """What is left for some layers of a fraction of the model's latency.

        Args:
            fraction (float): Of the latency of the whole dense model.
            names (Iterable[str]): The layers whose ranks are to be chosen;
                all else takes its time as it is.

        Returns:
            float: Milliseconds; negative where all else takes longer alone.
        """
        dense = {name: self.cost(name, None) for name in self.curves}
        fixed = self.rest() + sum(dense.values())
        fixed -= sum(dense[name] for name in names)
        return fraction * (self.rest() + sum(dense.values())) - fixed

    def predict(self, ranks: Dict[str, int]) -> float:
        """Latency of the whole model.

        Args:
            ranks (dict[str, int]): Of the layers that are compressed.

        Returns:
            float: Milliseconds for one forward pass.
        """
        return self.rest() + sum(
            self.cost(name, ranks.get(name)) for name in self.curves)


def _read(path: str) -> dict:
    """The content of a complete table."""
    with open(path, encoding='utf-8') as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise ValueError(f'{path} is not JSON: {error}') from None
    _require(
        isinstance(data, dict) and data.get('schema') == SCHEMA, path,
        'is no latency table: make one by tools/latency_table.py')
    _require(
        data.get('version') == VERSION, path,
        f'is a latency table of version {data.get("version")!r}, this '
        f'mmbasis reads version {VERSION}')
    _require(
        data.get('status') == 'complete', path,
        'is not complete: run tools/latency_table.py measure again, it '
        'goes on where it stopped')
    return data


def _model_ms(entries: List[dict]) -> tuple:
    """Latency of the whole model, dense and compressed, and the ranks."""
    whole = {e['id']: e for e in entries}
    compressed = whole.get(COMPRESSED_ID, {})
    return (whole.get(MODEL_ID, {}).get('median_ms'),
            compressed.get('median_ms'), compressed.get('ranks'))


def _curves(entries: List[dict]) -> Dict[str, List[Tuple[Curve, int]]]:
    carriers = {
        e['id']: e['median_ms']
        for e in entries if e.get('role') == CARRIER
    }
    groups: Dict[str, List[dict]] = {}
    for entry in entries:
        if entry.get('role') == 'layer':
            groups.setdefault(entry['group'], []).append(entry)
    curves: Dict[str, List[Tuple[Curve, int]]] = {}
    for group in groups.values():
        curve = _curve(group, carriers)
        for name, count in group[0]['uses'].items():
            curves.setdefault(name, []).append((curve, count))
    return curves


def _curve(group: List[dict], carriers: Dict[str, float]) -> Curve:

    def net(entry: dict) -> float:
        # what feeds the layer is not the layer's
        return max(entry['median_ms'] - carriers[entry['carrier']], 1e-6)

    dense = next(e for e in group if e['rank'] is None)
    rest = sorted((e for e in group if e['rank'] is not None),
                  key=lambda e: e['rank'])
    return Curve(
        dense['weight_shape'], dense['kind'], net(dense),
        max(e['noise_ms'] for e in group),
        np.array([e['rank'] for e in rest], dtype=int),
        np.maximum.accumulate(np.array([net(e) for e in rest], dtype=float)))
