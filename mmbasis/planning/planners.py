# Copyright (c) mmbasis authors. All rights reserved.
"""What planners have in common: from an analysis to a plan."""
from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..running import Targets
from ..utils.io import to_json
from .costs import PLAIN, Cost, Costs, Form
from .layers import Layer, check_patterns
from .plan import CompressionPlan
from .selection import Rules, Selection
from .statistics import Analysis, LayerStatistics


def check_fraction(key: str, value: float) -> float:
    """Require a number in ``(0, 1]``; the error names the key."""
    if (not isinstance(value, (int, float)) or isinstance(value, bool)
            or not 0 < value <= 1):
        raise ValueError(f'{key} must be in (0, 1], but got {value!r}')
    return float(value)


def is_rank(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return (isinstance(value, int) and not isinstance(value, bool)
            and value >= 1)


def check_ranks(key: str, ranks: Mapping[str, int | str],
                word: str) -> dict[str, int | str]:
    """Require, by pattern, positive ranks or a word; a copy."""
    for pattern, rank in ranks.items():
        if rank != word and not is_rank(rank):
            raise ValueError(f'{key}[{pattern!r}] must be a positive rank or '
                             f'"{word}", but got {rank!r}')
    return dict(ranks)


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a planner may do with one layer.

    Args:
        costs (Costs): Its MACs and parameters.
        ranks (tuple[int]): Ranks at which it would be cheaper than dense,
            rising. Keeping it dense is a candidate, too.
    """
    costs: Costs
    ranks: tuple[int, ...]

    @property
    def layer(self) -> Layer:
        return self.costs.layer

    @property
    def statistics(self) -> LayerStatistics:
        """What was measured of it."""
        return self.costs.statistics

    @cached_property
    def energy_lost(self) -> np.ndarray:
        """Fraction of the energy that each rank from 0 to full loses."""
        assert self.statistics.spectrum is not None
        energy = self.statistics.spectrum.energy.cpu().numpy()
        return lost_behind(energy / max(energy.sum(), 1e-300))


def lost_behind(directions: np.ndarray) -> np.ndarray:
    """What is lost at each rank from 0 to full, given what dropping each
    direction loses."""
    return np.append(directions[::-1].cumsum()[::-1], 0.)


#: layers that are decided already, with their rank or None for dense
Decided = Sequence[Tuple[Candidates, Optional[int]]]


class BasePlanner(ABC):
    """Chooses the rank of each layer. A planner holds what it was constructed
    with and nothing else: the same analysis gives the same plan.

    Patterns are regular expressions that must match a whole layer name, or
    class names of a layer or of a module around it.

    Args:
        include (Sequence[str]): Patterns; where given, only these layers are
            compressed.
        exclude (Sequence[str]): Patterns of layers that stay dense.
        overrides (dict[str, int | str]): Rank by pattern, or ``'dense'``, for
            single layers; the first pattern that matches counts. These
            ranks are not rounded.
        prediction_layers (bool): Compress the layers whose outputs are
            predictions or sampling offsets, too. Defaults to False.
        round_to (int): Ranks are multiples of this. Defaults to 1.
        data_aware (bool, optional): Take the basis from the covariance of the
            layer's outputs on calibration images instead of from its weights
            alone. The default depends on the planner.

    Raises:
        ValueError: If a value is out of range.
    """

    #: default of ``data_aware``
    DATA_AWARE = True
    #: whether sensitivities are wanted; None: where they can be had
    loss_aware: bool | None = False
    #: what makes a rank pay, and what a budget counts
    cost: Cost = Cost('macs')

    def __new__(cls, *args: Any, **kwargs: Any) -> BasePlanner:
        planner = super().__new__(cls)
        try:
            signature = inspect.signature(cls.__init__)
            given = signature.bind(planner, *args, **kwargs).arguments
        except TypeError:  # copying fills it in, and __init__ complains
            return planner
        config: dict[str, Any] = dict(type=cls.__name__)
        for name, value in list(given.items())[1:]:
            kind = signature.parameters[name].kind
            config.update(value if kind is inspect.Parameter.VAR_KEYWORD else
                          {name: value})
        planner.config = to_json(config)
        return planner

    #: the type and the arguments of the constructor, as plain data
    config: dict[str, Any]

    def __init__(self,
                 include: Sequence[str] = (),
                 exclude: Sequence[str] = (),
                 overrides: dict[str, int | str] | None = None,
                 prediction_layers: bool = False,
                 round_to: int = 1,
                 data_aware: bool | None = None) -> None:
        if isinstance(include, str) or isinstance(exclude, str):
            raise ValueError('include and exclude are lists of patterns, but '
                             'one of them is a single string')
        if not is_rank(round_to):
            raise ValueError(f'round_to must be a positive integer, but got '
                             f'{round_to!r}')
        self.overrides = check_ranks('overrides', overrides or {}, 'dense')
        self.rules = Rules(tuple(include), tuple(exclude), prediction_layers)
        self.round_to = round_to
        self.data_aware = self.DATA_AWARE if data_aware is None else data_aware

    def describe(self) -> dict[str, Any]:
        """What the plan records of its planner: what it was constructed with,
        and whether data and loss were looked at."""
        return dict(
            self.config,
            data_aware=self.data_aware,
            loss_aware=self.loss_aware)

    # ------------------------------------------------------------- layers
    def select(self, layers: Sequence[Layer], targets: Targets) -> Selection:
        """Choose the layers to plan for; ValueError if a pattern matches
        none."""
        check_patterns(layers, list(self.overrides), 'overrides')
        # whoever names a layer asks for it
        targets = Targets(*(x - self.named() for x in targets))
        selection = self.rules.select(layers, targets)
        self.cost.check_layers(selection.chosen)
        return selection

    def named(self) -> set[str]:
        """Patterns that ranks are given to."""
        return {k for k, v in self.overrides.items() if v != 'dense'}

    # --------------------------------------------------------------- plan
    def plan(self, analysis: Analysis, form: Form = PLAIN) -> CompressionPlan:
        """Choose ranks, or say why a layer stays dense.

        Raises:
            ValueError: If the request cannot be met.
        """
        decided: list[tuple[Candidates, int | None]] = []
        free: list[Candidates] = []
        reasons: dict[str, str] = {}
        for layer in analysis.selection.chosen:
            costs = Costs(layer, analysis.statistics[layer.name], form)
            candidates = Candidates(costs,
                                    self.cost.ranks(costs, self.round_to))
            settled = self._settle(candidates)
            if settled is None:
                free.append(candidates)
                continue
            rank, reason = settled
            decided.append((candidates, rank))
            reasons[layer.name] = reason
        for candidates, rank in zip(free, self._chosen(free, decided)):
            decided.append((candidates, rank))
            reasons[candidates.layer.name] = self.why_dense(candidates)
        ranks = {x.layer.name: r for x, r in decided if r is not None}
        return CompressionPlan.from_ranks(analysis, ranks, reasons, form,
                                          self.describe())

    def _settle(
            self,
            candidates: Candidates) -> tuple[int | None, str] | None:
        """Rank (None for dense) and reason where there is nothing to
        choose."""
        layer = candidates.layer
        override = first_match(layer, self.overrides)
        if override == 'dense':
            return None, 'dense by override'
        if override is not None:
            rank = check_rank(layer, override)
            if self.cost.pays(candidates.costs, rank):
                return rank, ''
            return None, _past_break_even(candidates)
        if not candidates.ranks:
            return None, self.cost.why_not(candidates.costs, self.round_to)
        return None

    def _chosen(self, free: Sequence[Candidates],
                decided: Decided) -> list[int | None]:
        """The ranks of :meth:`choose`, checked."""
        ranks = list(self.choose(free, decided))
        if len(ranks) != len(free):
            raise ValueError(f'{type(self).__name__}.choose() returned '
                             f'{len(ranks)} ranks for {len(free)} layers')
        return [
            rank if rank is None else check_rank(x.layer, rank)
            for x, rank in zip(free, ranks)
        ]

    def why_dense(self, candidates: Candidates) -> str:
        """Why :meth:`choose` kept a layer dense."""
        return _past_break_even(candidates)

    @abstractmethod
    def choose(self, free: Sequence[Candidates],
               decided: Decided) -> Sequence[int | None]:
        """Choose the rank of each layer.

        Args:
            free (Sequence[Candidates]): The layers to choose for; each has at
                least one rank that pays.
            decided (Sequence[tuple[Candidates, int | None]]): The others.

        Returns:
            Sequence[int | None]: A rank for each layer of ``free``; None
            keeps it dense.
        """


def _past_break_even(candidates: Candidates) -> str:
    return ('the rank it needs is past break-even '
            f'({candidates.costs.break_even + 1})')


def first_match(layer: Layer, table: Mapping[str, Any]) -> Any:
    """The value of the first pattern that matches a layer, or None."""
    return next((v for k, v in table.items() if layer.matches(k)), None)


def check_rank(layer: Layer, rank: int) -> int:
    """Require a rank that a layer can have; the ValueError names it."""
    if not isinstance(rank, Integral) or not 1 <= rank <= layer.full_rank:
        raise ValueError(f'rank {rank} given for {layer.name}: it must be in '
                         f'[1, {layer.full_rank}]')
    return int(rank)
