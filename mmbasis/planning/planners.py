# Copyright (c) mmbasis authors. All rights reserved.
"""Planners, and what they have in common: from an analysis to a plan."""
from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Mapping, Optional, Sequence, Tuple, Union

from ..registry import PLANNERS
from ..running import Targets
from ..utils.io import to_json
from ..utils.schema import (
    BOOL,
    COUNT,
    NONE,
    PATTERNS,
    Rule,
    check_all,
    dict_of,
    is_integer,
    is_number,
    shown,
)
from .costs import Cost, Costs, Form, Ranks, predicted_ms
from .layers import Exclusion, Layer, Reason, Rules, Selection, check_patterns
from .plan import CompressionPlan, DensePlan, LayerPlan
from .statistics import Analysis

#: what hardware wants channels to be multiples of (tensor cores in half
#: precision, blocks of a CPU), and channels from which that is worth the loss
ALIGNMENT, WIDE = 8, 64
#: ranks by pattern; :func:`check_ranks` looks at the ranks
BY_PATTERN = dict_of('a dict of ranks by pattern', Rule('', lambda x: True))
#: layers that are decided already, with their rank or None for dense
Decided = Sequence[Tuple[Costs, Optional[Ranks]]]
#: what :meth:`BasePlanner.choose` returns
Choice = Sequence[Union[None, int, Ranks]]


def check_fraction(key: str, value: float) -> float:
    """Require a number in ``(0, 1]``; the error names the key."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f'{key} must be in (0, 1], but got {shown(value)}')
    return float(value)


def is_rank(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return is_integer(value) and value >= 1


def check_ranks(key: str, ranks: Mapping[str, int | str],
                word: str) -> dict[str, int | str]:
    """Require, by pattern, positive ranks or a word; a copy."""
    for pattern, rank in ranks.items():
        if not is_rank(rank) and not (isinstance(rank, str) and rank == word):
            raise ValueError(f'{key}[{pattern!r}] must be a positive rank or '
                             f'"{word}", but got {rank!r}')
    return dict(ranks)


def check_rank(layer: Layer, rank: Any, largest: int | None = None) -> int:
    """Require a rank that a layer can have; the ValueError names it."""
    largest = largest or layer.full_rank
    if not is_rank(rank) or rank > largest:
        raise ValueError(f'rank {rank} given for {layer.name}: it must be in '
                         f'[1, {largest}]')
    return int(rank)


def check_choice(layer: Layer, choice: int | Ranks | None) -> Ranks | None:
    """Require ranks that a layer can have; the ValueError names it."""
    ranks = Ranks.of(choice)
    if ranks is None:
        return None
    inputs, output = ranks.input, ranks.output
    if ranks.spatial:
        why = layer.why_not('spatial')
        if why or inputs is not None:
            raise ValueError(f'{layer.name}, a {type(layer.module).__name__}: '
                             + (why or 'a spatial form has no input basis'))
        return Ranks(check_rank(layer, output, layer.full_spatial_rank), None,
                     True)
    if inputs is not None:
        inputs = check_rank(layer, inputs, layer.in_channels)
        why = layer.known_kind.why_one_sided(layer.module)
        if why:
            raise ValueError(f'{layer.name}, a {type(layer.module).__name__}, '
                             f'can have no input basis: {why}')
    if output is not None or inputs is None:
        output = check_rank(layer, output, min(
            layer.full_rank, (inputs or layer.in_channels) * layer.window))
    return Ranks(output, inputs)


class BasePlanner(ABC):
    """Chooses the rank of each layer. A planner holds what it was constructed
    with and nothing else: the same analysis gives the same plan. A value out
    of range is a ValueError.

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
        round_to (int, optional): Ranks are multiples of this. By default
            planners with a budget take multiples of 8 where a side has 64
            channels or more: odd ranks cost a GPU copies and padding. The
            others take any rank.
        data_aware (bool, optional): Take the basis from the covariance of the
            layer's outputs on calibration images instead of from its weights
            alone. The default depends on the planner.
    """
    #: what arguments may be; classes that derive from it add their own
    RULES: Mapping[str, Rule] = dict(
        include=PATTERNS, exclude=PATTERNS, overrides=BY_PATTERN | NONE,
        prediction_layers=BOOL, round_to=COUNT | NONE, data_aware=BOOL | NONE)
    #: default of ``data_aware``
    DATA_AWARE = True
    #: whether ranks are by default aligned to what hardware wants
    ALIGNED = False
    #: whether sensitivities are wanted; None: where they can be had
    loss_aware: bool | None = False
    #: what makes a rank pay, and what a budget counts
    cost: Cost = Cost('macs')
    #: what a layer may become, see :class:`BudgetPlanner`
    forms: tuple[str, ...] = ('output', )
    #: why :meth:`choose` kept a layer dense
    why_dense = 'the rank it needs is past break-even ({})'
    #: the type and the arguments of the constructor, as plain data
    config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> BasePlanner:
        planner = super().__new__(cls)
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        given = dict(zip(names, args), **kwargs)
        for base in cls.__mro__:
            check_all(f'{cls.__name__}: ', vars(base).get('RULES', {}), given)
        planner.config = to_json(dict(type=cls.__name__, **given))
        return planner

    def __init__(self,
                 include: Sequence[str] = (),
                 exclude: Sequence[str] = (),
                 overrides: dict[str, int | str] | None = None,
                 prediction_layers: bool = False,
                 round_to: int | None = None,
                 data_aware: bool | None = None) -> None:
        self.overrides = check_ranks('overrides', overrides or {}, 'dense')
        #: patterns that ranks are given to
        self.named = {k for k, v in self.overrides.items() if v != 'dense'}
        self.rules = Rules(tuple(include), tuple(exclude), prediction_layers)
        self.round_to = round_to
        self.data_aware = self.DATA_AWARE if data_aware is None else data_aware

    def step(self, channels: int) -> int:
        """What the ranks of a side with so many channels are multiples of,
        by ``round_to``."""
        if self.round_to is not None:
            return self.round_to
        return ALIGNMENT if self.ALIGNED and channels >= WIDE else 1

    def describe(self) -> dict[str, Any]:
        """What the plan records of its planner: what it was constructed with,
        and whether data and loss were looked at."""
        return dict(self.config, data_aware=self.data_aware,
                    loss_aware=self.loss_aware, **self.cost.record)

    def select(self, layers: Sequence[Layer], targets: Targets) -> Selection:
        """Choose the layers to plan for; ValueError if a pattern matches
        none."""
        check_patterns(layers, list(self.overrides), 'overrides')
        # whoever names a layer asks for it
        targets = Targets(*(x - self.named for x in targets))
        selection = self.rules.select(layers, targets)
        self.cost.check_layers(selection.chosen)
        return selection

    def plan(self,
             analysis: Analysis,
             form: Form = Costs.form) -> CompressionPlan:
        """Choose ranks, or say why a layer stays dense; ValueError if what was
        asked for cannot be had."""
        reasons = {k: x.words for k, x in analysis.selection.excluded.items()}
        free: list[Costs] = []
        decided: list[tuple[Costs, Ranks | None]] = []
        for layer in analysis.selection.chosen:
            costs = Costs(layer, analysis.statistics[layer.name], form)
            costs = replace(costs, ranks=self.cost.ranks(
                costs, self.step(layer.full_rank)))
            settled = self._settle(costs)
            if settled is None:
                free.append(costs)
                continue
            rank, reasons[layer.name] = settled
            decided.append((costs, rank))
        for costs, rank in zip(free, self._chosen(free, decided)):
            reasons[costs.layer.name] = self.why_dense.format(
                costs.break_even + 1)
            decided.append((costs, rank))
        ranks = {x.layer.name: rank for x, rank in decided}
        layers = [(Costs(x, analysis.statistics[x.name], form),
                   ranks.get(x.name)) for x in analysis.layers]
        plan = CompressionPlan({}, {}, form.norm, self.describe(),
                               predicted_ms(layers, analysis.between))
        for costs, rank in layers:
            name = costs.layer.name
            if rank is not None:
                plan.layers[name] = LayerPlan.of(costs, rank)
            else:
                plan.dense[name] = DensePlan.of(costs, reasons[name],
                                                name in ranks)
        return plan

    def _settle(self, costs: Costs) -> tuple[Ranks | None, str] | None:
        """Rank or None, and reason, where there is nothing to choose."""
        override = costs.layer.look_up(self.overrides)
        if override == 'dense':
            return None, 'dense by override'
        if override is not None:
            rank = check_rank(costs.layer, override)
            past = self.cost.why_not_at(costs, rank)
            pays = self.cost.pays(costs, rank)
            return (Ranks(rank), '') if pays else (None, past)
        why_not = [costs.why_not(form) for form in self.forms]
        if all(why_not):
            return None, '; '.join(dict.fromkeys(why_not))
        if not self._can_pay(costs):
            return None, self.cost.why_not(
                costs, self.step(costs.layer.full_rank))
        return None

    def _can_pay(self, costs: Costs) -> bool:
        """Whether there is a rank at which a layer costs less than dense."""
        return bool(costs.ranks)

    def _chosen(self, free: Sequence[Costs],
                decided: Decided) -> list[Ranks | None]:
        """The ranks of :meth:`choose`, checked."""
        ranks = list(self.choose(free, decided))
        if len(ranks) != len(free):
            raise ValueError(f'{type(self).__name__}.choose() returned '
                             f'{len(ranks)} ranks for {len(free)} layers')
        return [check_choice(x.layer, rank) for x, rank in zip(free, ranks)]

    @abstractmethod
    def choose(self, free: Sequence[Costs], decided: Decided) -> Choice:
        """Choose the rank of each layer.

        Args:
            free (Sequence[Costs]): The layers to choose for; each has at
                least one rank that pays, see ``ranks``.
            decided (Sequence[tuple[Costs, Ranks | None]]): The others.

        Returns:
            Sequence[int | Ranks | None]: Ranks for each layer of ``free``: a
            number is that of the output form; None keeps it dense.
        """


@PLANNERS.register_module()
class EnergyPlanner(BasePlanner):
    """The paper's rule: in each layer the smallest rank whose cumulative
    energy reaches the same threshold (Tayyab et al., ICIP 2021).

    Args:
        threshold (float): Fraction of the energy to keep, in ``(0, 1]``.
        **kwargs: See :class:`BasePlanner`; ``data_aware`` defaults to False,
            as in the paper.
    """
    DATA_AWARE = False

    def __init__(self, threshold: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.threshold = check_fraction('EnergyPlanner: threshold', threshold)

    def choose(self, free: Sequence[Costs], decided: Decided) -> Choice:
        needed = [x.spectrum.rank_for_energy(self.threshold) for x in free]
        return [
            next((rank for rank in x.ranks if rank >= least), None)
            for x, least in zip(free, needed)
        ]


@PLANNERS.register_module()
class RatioPlanner(BasePlanner):
    """The same fraction of MACs in every layer.

    Args:
        ratio (float): Fraction of each layer's MACs to keep, in ``(0, 1]``.
            A layer whose smallest rank costs more gets that rank.
        **kwargs: See :class:`BasePlanner`.
    """
    ALIGNED = True

    def __init__(self, ratio: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ratio = check_fraction('RatioPlanner: ratio', ratio)

    def choose(self, free: Sequence[Costs], decided: Decided) -> Choice:
        if self.ratio == 1:
            return [None] * len(free)
        return [
            max((rank for rank in x.ranks
                 if x.macs(rank) <= self.ratio * x.macs()),
                default=x.ranks[0]) for x in free
        ]


class AnyCost(Cost):
    """Lets every rank pay."""

    def pays(self, costs: Costs, ranks: int | Ranks) -> Any:
        return True

    def ranks(self, costs: Costs, round_to: int) -> tuple[int, ...]:
        return tuple(range(1, costs.layer.full_rank + 1))


@PLANNERS.register_module()
class FixedPlanner(BasePlanner):
    """Ranks given by the user.

    Args:
        ranks (dict[str, int | str]): Rank by pattern, or ``'full'``; the
            first pattern that matches counts, layers without one stay dense.
            Numbers are rounded up to a multiple of ``round_to``.
        allow_costlier (bool): Accept ranks past break-even, at which the
            layer costs more than it does dense. Defaults to False.
        **kwargs: See :class:`BasePlanner`.
    """

    RULES = dict(ranks=BY_PATTERN, allow_costlier=BOOL)

    def __init__(self,
                 ranks: dict[str, int | str],
                 allow_costlier: bool = False,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not ranks:
            raise ValueError('FixedPlanner: ranks is empty')
        self.ranks = check_ranks('FixedPlanner: ranks', ranks, 'full')
        self.named |= self.ranks.keys()
        if allow_costlier:
            self.cost = AnyCost(self.cost.metric)

    def select(self, layers: Sequence[Layer], targets: Targets) -> Selection:
        check_patterns(layers, list(self.ranks), 'ranks')
        words = Exclusion(Reason.NO_RANK_GIVEN, 'no rank given')
        return super().select(layers, targets).without({
            layer.name: words
            for layer in layers if layer.look_up(self.ranks) is None
        })

    def choose(self, free: Sequence[Costs], decided: Decided) -> Choice:
        chosen = []
        for x in free:
            rank, full = x.layer.look_up(self.ranks), x.layer.full_rank
            rank = full if rank == 'full' else check_rank(x.layer, rank)
            step = self.step(full)
            rank = min(-(-rank // step) * step, full)
            chosen.append(rank if self.cost.pays(x, rank) else None)
        return chosen
