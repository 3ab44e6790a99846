# Copyright (c) mmbasis authors. All rights reserved.
"""Planners that choose the rank of each layer on its own."""
from abc import abstractmethod
from typing import Dict, Optional, Sequence, Set, Tuple, Union

import numpy as np

from ..registry import PLANNERS
from ..running import Targets
from .costs import Cost, Costs
from .layers import Exclusion, Layer, Reason, check_patterns
from .planners import (
    BasePlanner,
    Candidates,
    Decided,
    check_fraction,
    check_rank,
    check_ranks,
    first_match,
)
from .selection import Selection


class _LayerPlanner(BasePlanner):
    """Chooses the rank of each layer on its own."""

    def choose(self, free: Sequence[Candidates],
               decided: Decided) -> Sequence[Optional[int]]:
        return [self.choose_one(candidates) for candidates in free]

    @abstractmethod
    def choose_one(self, candidates: Candidates) -> Optional[int]:
        """The rank of a layer; None keeps it dense."""


@PLANNERS.register_module()
class EnergyPlanner(_LayerPlanner):
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

    def choose_one(self, candidates: Candidates) -> Optional[int]:
        assert candidates.statistics.spectrum is not None
        rank = candidates.statistics.spectrum.rank_for_energy(self.threshold)
        at = int(np.searchsorted(candidates.ranks, rank))
        return candidates.ranks[at] if at < len(candidates.ranks) else None


@PLANNERS.register_module()
class RatioPlanner(_LayerPlanner):
    """The same fraction of MACs in every layer.

    Args:
        ratio (float): Fraction of each layer's MACs to keep, in ``(0, 1]``.
            A layer whose smallest rank costs more gets that rank.
        **kwargs: See :class:`BasePlanner`.
    """

    def __init__(self, ratio: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.ratio = check_fraction('RatioPlanner: ratio', ratio)

    def choose_one(self, candidates: Candidates) -> Optional[int]:
        if self.ratio == 1:
            return None
        macs = candidates.costs.macs
        fits = [r for r in candidates.ranks if macs(r) <= self.ratio * macs()]
        return fits[-1] if fits else candidates.ranks[0]


class AnyCost(Cost):
    """Lets every rank pay."""

    def pays(self, costs: Costs, rank: int) -> bool:
        return True

    def ranks(self, costs: Costs, round_to: int) -> Tuple[int, ...]:
        return tuple(range(1, costs.layer.full_rank + 1))


@PLANNERS.register_module()
class FixedPlanner(_LayerPlanner):
    """Ranks given by the user.

    Args:
        ranks (dict[str, int | str]): Rank by pattern, or ``'full'``; the
            first pattern that matches counts, layers without one stay dense.
            Numbers are rounded up to a multiple of ``round_to``.
        allow_costlier (bool): Accept ranks past break-even, at which the
            layer costs more than it does dense. Defaults to False.
        **kwargs: See :class:`BasePlanner`.
    """

    def __init__(self,
                 ranks: Dict[str, Union[int, str]],
                 allow_costlier: bool = False,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        if not ranks:
            raise ValueError('FixedPlanner: ranks is empty')
        self.ranks = check_ranks('FixedPlanner: ranks', ranks, 'full')
        if allow_costlier:
            self.cost = AnyCost(self.cost.metric)

    def select(self, layers: Sequence[Layer], targets: Targets) -> Selection:
        check_patterns(layers, list(self.ranks), 'ranks')
        words = Exclusion(Reason.NO_RANK_GIVEN, 'no rank given')
        return super().select(layers, targets).without({
            layer.name: words
            for layer in layers if first_match(layer, self.ranks) is None
        })

    def named(self) -> Set[str]:
        return super().named() | self.ranks.keys()

    def choose_one(self, candidates: Candidates) -> Optional[int]:
        layer = candidates.layer
        rank = first_match(layer, self.ranks)
        if rank == 'full':
            rank = layer.full_rank
        multiple = -(-check_rank(layer, rank) // self.round_to)
        rank = min(multiple * self.round_to, layer.full_rank)
        return rank if self.cost.pays(candidates.costs, rank) else None
