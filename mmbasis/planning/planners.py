# Copyright (c) mmbasis authors. All rights reserved.
"""Planners that choose each layer's rank on its own."""
from abc import ABCMeta, abstractmethod
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
import torch.nn as nn

from ..registry import PLANNERS
from ..running.graph import Targets
from .layers import NO_TARGETS, LayerInfo, LayerMatcher, choose_layers
from .plan import CompressionPlan


def check_fraction(key: str, value: float) -> float:
    """Require a number in ``(0, 1]``; the error names the key."""
    if (not isinstance(value, (int, float)) or isinstance(value, bool)
            or not 0 < value <= 1):
        raise ValueError(f'{key} must be in (0, 1], but got {value!r}')
    return float(value)


def _is_rank(value: Any) -> bool:
    return (isinstance(value, int) and not isinstance(value, bool)
            and value >= 1)


class BasePlanner(metaclass=ABCMeta):
    """Chooses the rank of each layer.

    Patterns are regular expressions that must match a whole layer name, or
    class names of a layer or of a module around it.

    Args:
        include (Sequence[str]): Patterns; where given, only these layers are
            compressed.
        exclude (Sequence[str]): Patterns of layers that stay dense.
        overrides (dict[str, int | str]): Rank by pattern, or ``'dense'``, for
            single layers; the first pattern that matches counts. These
            ranks are not rounded.
        prediction_layers (bool): Compress the layers that put out the
            predictions, too. Defaults to False.
        round_to (int): Ranks are multiples of this. Defaults to 1.
        data_aware (bool, optional): Take the basis from the covariance of the
            layer's outputs on calibration images instead of from its weights
            alone. The default depends on the planner.

    Raises:
        ValueError: If a value is out of range.
    """

    #: default of ``data_aware``
    DATA_AWARE = True
    #: whether ``LayerInfo.sensitivity`` is wanted; None: where it can be had
    loss_aware: Optional[bool] = False

    def __init__(self,
                 include: Sequence[str] = (),
                 exclude: Sequence[str] = (),
                 overrides: Optional[Dict[str, Union[int, str]]] = None,
                 prediction_layers: bool = False,
                 round_to: int = 1,
                 data_aware: Optional[bool] = None) -> None:
        if isinstance(include, str) or isinstance(exclude, str):
            raise ValueError('include and exclude are lists of patterns, but '
                             'one of them is a single string')
        if not _is_rank(round_to):
            raise ValueError(f'round_to must be a positive integer, but got '
                             f'{round_to!r}')
        for pattern, rank in (overrides or {}).items():
            if rank != 'dense' and not _is_rank(rank):
                raise ValueError(f'overrides[{pattern!r}] must be a positive '
                                 f'rank or "dense", but got {rank!r}')
        self.include = tuple(include)
        self.exclude = tuple(exclude)
        self.overrides = dict(overrides or {})
        self.prediction_layers = prediction_layers
        self.round_to = round_to
        self.data_aware = self.DATA_AWARE if data_aware is None else data_aware
        self._extras = dict(bias=False, norm=False)

    def describe(self) -> Dict[str, Any]:
        """The configuration of this planner, for the plan's record."""
        return dict(type=type(self).__name__, **vars(self))

    def select(self,
               model: nn.Module,
               layers: Sequence[LayerInfo],
               targets: Targets = NO_TARGETS) -> None:
        """Mark the layers that are not to be compressed with the reason.

        Raises:
            ValueError: If a pattern matches no layer.
        """
        matcher = choose_layers(model, layers, self.include, self.exclude,
                                self.prediction_layers, targets)
        matcher.check(list(self.overrides), 'overrides')
        self._resolve(matcher)

    def _resolve(self, matcher: LayerMatcher) -> None:
        self._overridden = _first_match(matcher, self.overrides)

    def plan(self,
             layers: Sequence[LayerInfo],
             norm: bool = False,
             bias: bool = False) -> CompressionPlan:
        """Choose ranks.

        Args:
            layers (Sequence[LayerInfo]): All layers, selected, calibrated and
                with spectra.
            norm (bool): Put a batch normalisation between the factors.
            bias (bool): Give every layer's coefficients a bias.

        Returns:
            CompressionPlan: With the reason for each layer that stays dense.

        Raises:
            ValueError: If the request cannot be met.
        """
        record = {
            k: v
            for k, v in self.describe().items() if not k.startswith('_')
        }
        self._extras = dict(bias=bias, norm=norm)
        ranks: Dict[str, int] = {}
        reasons: Dict[str, str] = {}
        free: List[LayerInfo] = []
        for layer in layers:
            override = self._overridden.get(layer.name)
            if not layer.compressible:
                continue
            if override == 'dense':
                reasons[layer.name] = 'dense by override'
            elif override is not None:
                rank = _check_rank(layer, override)
                if self._pays(layer, rank):
                    ranks[layer.name] = rank
                else:
                    reasons[layer.name] = BasePlanner._kept(self, layer)
            elif len(self._ranks(layer)) == 0:
                reasons[layer.name] = self._no_rank(layer)
            else:
                free.append(layer)
        fixed = [(layer, ranks.get(layer.name)) for layer in layers
                 if layer.name in ranks or layer.name in reasons]
        for layer, rank in zip(free, self._choose(free, fixed)):
            if rank is None:
                reasons[layer.name] = self._kept(layer)
            else:
                ranks[layer.name] = rank
        return CompressionPlan.from_ranks(
            layers, ranks, reasons, norm=norm, bias=bias, planner=record)

    def _ranks(self, layer: LayerInfo) -> np.ndarray:
        """The ranks that make a layer cheaper, rising."""
        return np.arange(self.round_to,
                         self._break_even(layer) + 1, self.round_to)

    def _break_even(self, layer: LayerInfo) -> int:
        return layer.break_even(**self._extras)

    def _pays(self, layer: LayerInfo, rank: int) -> bool:
        return rank <= self._break_even(layer)

    def _no_rank(self, layer: LayerInfo) -> str:
        return (f'no rank pays: break-even is at {self._break_even(layer) + 1}'
                f', ranks are multiples of {self.round_to}')

    def _kept(self, layer: LayerInfo) -> str:
        return ('the rank it needs is past break-even '
                f'({self._break_even(layer) + 1})')

    @abstractmethod
    def _choose(self, layers: Sequence[LayerInfo],
                fixed: Sequence) -> List[Optional[int]]:
        """Rank of each layer, None to keep it dense.

        Args:
            layers (Sequence[LayerInfo]): The layers to choose for; each has
                at least one rank that pays.
            fixed (Sequence[tuple[LayerInfo, int | None]]): The compressible
                layers that are decided already, with their ranks.
        """


def _first_match(matcher: LayerMatcher, table: Dict[str, Any]) -> dict:
    """Value of the first pattern that matches, by layer name."""
    found = {}
    for name in matcher.types:
        for pattern, value in table.items():
            if matcher.match(pattern, name):
                found[name] = value
                break
    return found


def _check_rank(layer: LayerInfo, rank: int) -> int:
    if not 1 <= rank <= layer.full_rank:
        raise ValueError(f'rank {rank} given for {layer.name}: it must be in '
                         f'[1, {layer.full_rank}]')
    return rank


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

    def __init__(self, threshold: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.threshold = check_fraction('EnergyPlanner: threshold', threshold)

    def _choose(self, layers, fixed):
        chosen = []
        for layer in layers:
            rank = layer.spectrum.rank_for_energy(self.threshold)
            ranks = self._ranks(layer)
            at = np.searchsorted(ranks, rank)
            chosen.append(int(ranks[at]) if at < len(ranks) else None)
        return chosen


@PLANNERS.register_module()
class RatioPlanner(BasePlanner):
    """The same fraction of MACs in every layer.

    Args:
        ratio (float): Fraction of each layer's MACs to keep, in ``(0, 1]``.
            A layer whose smallest rank costs more gets that rank.
        **kwargs: See :class:`BasePlanner`.
    """

    def __init__(self, ratio: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.ratio = check_fraction('RatioPlanner: ratio', ratio)

    def _choose(self, layers, fixed):
        if self.ratio == 1:
            return [None] * len(layers)
        chosen = []
        for layer in layers:
            ranks = self._ranks(layer)
            fits = [
                r for r in ranks
                if layer.macs(int(r)) <= self.ratio * layer.macs()
            ]
            chosen.append(int(fits[-1] if fits else ranks[0]))
        return chosen


@PLANNERS.register_module()
class FixedPlanner(BasePlanner):
    """Ranks given by the user.

    Args:
        ranks (dict[str, int | str]): Rank by pattern, or ``'full'``; the
            first pattern that matches counts, layers without one stay dense.
            Numbers are rounded up to a multiple of ``round_to``.
        allow_dearer (bool): Accept ranks past break-even, at which the layer
            costs more than it does dense. Defaults to False.
        **kwargs: See :class:`BasePlanner`.
    """

    def __init__(self,
                 ranks: Dict[str, Union[int, str]],
                 allow_dearer: bool = False,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        if not ranks:
            raise ValueError('FixedPlanner: ranks is empty')
        for pattern, rank in ranks.items():
            if rank != 'full' and not _is_rank(rank):
                raise ValueError(f'FixedPlanner: ranks[{pattern!r}] must be a '
                                 f'positive rank or "full", but got {rank!r}')
        self.ranks = dict(ranks)
        self.allow_dearer = allow_dearer

    def select(self, model, layers, targets=NO_TARGETS) -> None:
        # whoever names a layer asks for it
        super().select(model, layers,
                       Targets(*(x - self.ranks.keys() for x in targets)))
        matcher = LayerMatcher(model, layers)
        matcher.check(list(self.ranks), 'ranks')
        self._given = _first_match(matcher, self.ranks)
        for layer in layers:
            if layer.compressible and layer.name not in self._given:
                layer.reason = 'no rank given'

    def _ranks(self, layer):
        if self.allow_dearer:
            return np.arange(1, layer.full_rank + 1)
        return super()._ranks(layer)

    def _pays(self, layer, rank):
        return self.allow_dearer or super()._pays(layer, rank)

    def _choose(self, layers, fixed):
        chosen = []
        for layer in layers:
            rank = self._given[layer.name]
            if rank == 'full':
                rank = layer.full_rank
            multiple = -(-_check_rank(layer, rank) // self.round_to)
            rank = min(multiple * self.round_to, layer.full_rank)
            chosen.append(rank if self._pays(layer, rank) else None)
        return chosen


class PlanFollower(BasePlanner):
    """Follows a plan that is there already, and takes the bases from data and
    gradients where its planner did.

    Args:
        plan (CompressionPlan): The plan.
    """

    def __init__(self, plan: CompressionPlan) -> None:
        super().__init__(
            prediction_layers=True,
            data_aware=bool(plan.planner.get('data_aware')))
        self.loss_aware = plan.planner.get('loss_aware', False)
        self._plan = plan

    def select(self, model, layers, targets=NO_TARGETS) -> None:
        super().select(model, layers, targets)
        for layer in layers:
            if layer.compressible and layer.name not in self._plan.layers:
                dense = self._plan.dense.get(layer.name)
                # layers that the planner kept dense count as they did there
                if dense is None or not dense.compressible:
                    layer.reason = dense.reason if dense else 'not in the plan'

    def plan(self, layers, norm=False, bias=False) -> CompressionPlan:
        if norm and not self._plan.norm:
            raise ValueError('norm=True is asked for, but the plan to follow '
                             'has no normalisation')
        return self._plan

    def _choose(self, layers, fixed):
        raise AssertionError('a follower chooses nothing')
