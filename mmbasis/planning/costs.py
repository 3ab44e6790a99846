# Copyright (c) mmbasis authors. All rights reserved.
"""What layers cost, dense and as basis layers."""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Iterable, Sequence

from ..factorization import Spectrum
from .layers import Layer
from .statistics import LayerStatistics


@dataclass(frozen=True)
class Form:
    """How a basis layer is built, apart from its rank: with a bias of the
    coefficients even where the dense layer has none, and with a batch
    normalisation between basis and coefficients."""
    bias: bool = False
    norm: bool = False


@dataclass(frozen=True, eq=False)
class Costs:
    """MACs and parameters of one layer, given how often it is applied and how
    its basis layer is built."""
    layer: Layer
    statistics: LayerStatistics
    form: Form = Form()

    @property
    def spectrum(self) -> Spectrum:
        """The spectrum that was measured."""
        assert self.statistics.spectrum is not None
        return self.statistics.spectrum

    def macs(self, rank: int | None = None) -> float:
        """Multiply-accumulates for one image at a rank (basis filters per
        group); None for the dense layer. A bias costs nothing, as in
        MMEngine's analysis."""
        known = self.statistics
        if rank is None:
            return self.layer.module.weight.numel() * known.weight_positions
        groups, rows, in_size = self.layer.matrix_shape
        return groups * rank * (
            in_size * known.weight_positions + rows * known.out_positions)

    def params(self, rank: int | None = None) -> int:
        """Number of parameters at a rank; None for the dense layer."""
        module, has_bias = self.layer.module, self.layer.has_bias
        if rank is None:
            return module.weight.numel() + (
                module.bias.numel() if has_bias else 0)
        groups, rows, in_size = self.layer.matrix_shape
        params = groups * rank * (in_size + rows + 2 * self.form.norm)
        return params + groups * rows * (self.form.bias or has_bias)

    @cached_property
    def break_even(self) -> int:
        """The largest rank at which the layer costs less than it does dense,
        in MACs and in parameters; 0 where there is none."""
        macs, params = self.macs(), self.params()
        return sum(
            self.macs(rank) < macs and self.params(rank) < params
            for rank in range(1, self.layer.full_rank + 1))


@dataclass(frozen=True, eq=False)
class Candidates(Costs):
    """What a planner may do with one layer: besides keeping it dense, give it
    one of the ranks that pay, rising."""
    ranks: tuple[int, ...] = ()


class Cost:
    """What a budget counts: MACs or parameters. Others derive from it.

    Args:
        metric (str): A method of :class:`Costs`, ``'macs'`` or ``'params'``.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def of(self, costs: Costs, rank: int | None) -> float:
        """Cost of a layer at a rank; None for the dense layer."""
        return getattr(costs, self.metric)(rank)

    def pays(self, costs: Costs, rank: int) -> bool:
        """Whether a layer is cheaper at a rank than dense."""
        return rank <= costs.break_even

    def ranks(self, costs: Costs, round_to: int) -> tuple[int, ...]:
        """The multiples of ``round_to`` that pay, rising."""
        return tuple(
            rank for rank in range(round_to, costs.break_even + 1, round_to)
            if self.pays(costs, rank))

    def budget(self, fraction: float, layers: Iterable[Costs]) -> float:
        """What some layers may cost if the network keeps a fraction."""
        return fraction * sum(self.of(layer, None) for layer in layers)

    def check_layers(self, layers: Sequence[Layer]) -> None:
        """Require that the cost of these layers is known; the ValueError
        names those that it is not known of."""

    def why_not(self, costs: Costs, round_to: int) -> str:
        """Why no rank of a layer pays."""
        return (f'no rank pays: break-even is at {costs.break_even + 1}'
                f', ranks are multiples of {round_to}')
