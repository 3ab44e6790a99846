# Copyright (c) mmbasis authors. All rights reserved.
"""What layers cost, dense or not: MACs, parameters, time on a device."""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np

from ..factorization import Spectrum
from ..running import Operation
from .devices import DEVICES, device
from .kernels import Convolution, Kernel
from .layers import FORMS, Layer
from .statistics import LayerStatistics


class Ranks(NamedTuple):
    """How a layer is represented: basis filters per group, and input channels
    per group of an input basis; None for no basis on that side; and whether
    the basis is k x 1 and the coefficients 1 x k. For costs, arrays of both
    ranks, which broadcast."""
    output: Any = None
    input: Any = None
    spatial: bool = False

    @property
    def form(self) -> str:
        """``'output'``, ``'input'`` or ``'both'``: where it has a basis; or
        ``'spatial'``."""
        if self.spatial:
            return 'spatial'
        if self.input is None:
            return 'output'
        return 'input' if self.output is None else 'both'

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
        if ranks is None:  # of any layer, also one of no known kind
            return (self.layer.module.weight.numel()
                    * self.statistics.weight_positions)
        return sum(x.macs for x in self._kernels(ranks))

    def params(self, ranks: int | Ranks | None = None) -> Any:
        """Number of parameters at some ranks; None for the dense layer."""
        ranks, layer = Ranks.of(ranks), self.layer
        if ranks is None:
            module = layer.module
            return module.weight.numel() + (
                module.bias.numel() if layer.has_bias else 0)
        params = sum(x.weights for x in self._kernels(ranks))
        if layer.has_bias or self.form.bias:
            params = params + self.convolution.out_channels
        if self.form.norm and ranks.output is not None:
            params = params + 2 * self.convolution.groups * ranks.output
        return params

    def why_not(self, form: str) -> str:
        """:meth:`Layer.why_not`, and why not as basis layers are built."""
        why = self.layer.why_not(form)
        if form == 'spatial' and self.form.norm:
            why = why or ('no spatial form: behind a normalization padding '
                          'would not be zero')
        return why

    @property
    def is_measured(self) -> bool:
        """Whether its time is known: its kind, and where it ran."""
        known = self.statistics
        smallest = min(known.in_positions, known.out_positions,
                       known.weight_positions)
        return self.layer.kind is not None and smallest > 0

    @cached_property
    def convolution(self) -> Convolution:
        """What its MACs and its time depend on, for one image, of a layer
        that :attr:`is_measured`."""
        layer, known = self.layer, self.statistics
        groups, rows, _ = layer.matrix_shape
        return Convolution(
            groups * layer.in_channels, groups * rows, layer.window,
            known.in_positions, known.out_positions, groups,
            weight_positions=known.weight_positions, adds=known.adds,
            sides=tuple(layer.module.weight.shape[2:]),
            middle_positions=known.middle_positions)

    def _kernels(self, ranks: int | Ranks | None) -> tuple[Kernel, ...]:
        return self.convolution.kernels(*(Ranks.of(ranks) or Ranks()))

    def is_smaller(self, ranks: Any) -> Any:
        """Whether the layer costs less than it does dense, in MACs and in
        parameters."""
        return np.logical_and(self.macs(ranks) < self.macs(),
                              self.params(ranks) < self.params())

    def energy_kept(self, ranks: Ranks) -> float:
        """Fraction of the energy that the directions of the output and of the
        input keep, rounded to six digits."""
        kept = 1.
        if ranks.spatial:
            assert self.statistics.columns is not None
            shares = self.statistics.columns.shares
            return round(max(1 - float(shares[ranks.output:].sum()), 0.), 6)
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
    #: the forms whose cost it knows
    forms: tuple[str, ...] = FORMS
    #: where its time is from, as in "faster on a T4"; empty if it is no time
    source = ''

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
        ranks = np.arange(round_to, costs.break_even + 1, round_to)
        return tuple(ranks[self.pays(costs, Ranks(ranks))].tolist())

    def budget(self, fraction: float, layers: Iterable[Costs]) -> float:
        """What some layers may cost if the network keeps a fraction."""
        return fraction * sum(self.of(layer, None) for layer in layers)

    def within(self, network: Sequence[Costs],
               between: Sequence[Operation]) -> Cost:
        """The same for layers of a network, given all of its layers whose time
        is known, and what it does between them."""
        return self

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Require that their cost is known; the ValueError names others."""

    def why_not(self, costs: Costs, round_to: int) -> str:
        """Why no rank of a layer pays."""
        slow = ', and none of them is faster than the dense layer '
        return (f'no rank pays: break-even is at {costs.break_even + 1}, '
                f'ranks are multiples of {round_to}'
                + (self.source and slow + self.source))

    def why_not_at(self, costs: Costs, rank: int) -> str:
        """Why a rank of the output form does not pay."""
        if self.source and costs.is_smaller(rank):
            return (f'at rank {rank} it is not faster than the dense layer '
                    + self.source)
        return f'rank {rank} is past break-even ({costs.break_even + 1})'


class DeviceCost(Cost):
    """Milliseconds of layers for one image on a device, by its model: see
    :mod:`mmbasis.planning.devices` for what it assumes.

    Args:
        name (str): Name of a preset, such as ``'xavier-fp16'``; a ValueError
            lists them.
        network (Sequence[Costs]): All layers of the network; a fraction is one
            of the time of these and of ``between``. Defaults to those that
            the fraction is of, alone.
        between (Sequence[Operation]): What the network does between layers.
    """

    def __init__(self, name: str, network: Sequence[Costs] = (),
                 between: Sequence[Operation] = ()) -> None:
        super().__init__('latency')
        self.device = device(name)
        self.network, self.between = network, between
        self.source = f'on {name}, by its model'

    def of(self, costs: Costs, ranks: int | Ranks | None) -> Any:
        calls = max(costs.statistics.calls, 1)
        # they share an image's positions
        call = replace(costs.convolution, batch=1 / calls)
        kernels = call.kernels(*(Ranks.of(ranks) or Ranks()))
        return 1e3 * calls * self.device.time(kernels)

    def pays(self, costs: Costs, ranks: int | Ranks) -> Any:
        return np.logical_and(
            super().pays(costs, ranks),
            self.of(costs, ranks) < self.of(costs, None))

    def within(self, network: Sequence[Costs],
               between: Sequence[Operation]) -> DeviceCost:
        return DeviceCost(self.device.name, network, between)

    def rest(self) -> float:
        """Milliseconds of what stands between the layers of the network."""
        return 1e3 * sum(
            float(self.device.kernel_time(Kernel(1, 1, *x, window=0)))
            for x in self.between)

    def budget(self, fraction: float, layers: Iterable[Costs]) -> float:
        """What some layers may take if the whole network keeps a fraction of
        its time, ms; negative where all else takes longer alone."""
        own = super().budget(1, layers)
        network = super().budget(1, self.network) if self.network else own
        network += self.rest()
        return fraction * network - (network - own)


def predicted_ms(
    layers: Iterable[tuple[Costs, Ranks | None]],
    between: Sequence[Operation] = ()
) -> dict[str, dict[str, float]]:
    """Time of a network for one image on each preset of
    :data:`~mmbasis.planning.devices.DEVICES`.

    Args:
        layers (Iterable[tuple[Costs, Ranks | None]]): Layers with their ranks,
            None for dense ones. Layers of unknown kind and layers that did not
            run are left out.
        between (Sequence[Operation]): What the network does between them.

    Returns:
        dict: By preset, ``{'before', 'after'}``: milliseconds with dense
        layers and with those of these ranks.
    """
    known = [(x, ranks) for x, ranks in layers if x.is_measured]
    times = {}
    for name in DEVICES if known else ():
        cost = DeviceCost(name, (), between)
        before, after = (
            cost.rest() + sum(float(cost.of(x, ranks)) for x, ranks in rows)
            for rows in ([(x, None) for x, _ in known], known))
        times[name] = dict(before=round(before, 6), after=round(after, 6))
    return times
