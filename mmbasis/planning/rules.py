# Copyright (c) mmbasis authors. All rights reserved.
"""Planners that choose the rank of each layer on its own."""
from typing import Dict, Optional, Sequence, Tuple, Union

from ..registry import PLANNERS
from ..running import Targets
from .costs import Candidates, Cost, Costs
from .layers import Exclusion, Layer, Reason, Selection, check_patterns
from .planners import (
    BasePlanner,
    Decided,
    check_fraction,
    check_rank,
    check_ranks,
    first_match,
)


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

    def choose(self, free: Sequence[Candidates],
               decided: Decided) -> Sequence[Optional[int]]:
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

    def __init__(self, ratio: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.ratio = check_fraction('RatioPlanner: ratio', ratio)

    def choose(self, free: Sequence[Candidates],
               decided: Decided) -> Sequence[Optional[int]]:
        if self.ratio == 1:
            return [None] * len(free)
        return [
            max((rank for rank in x.ranks
                 if x.macs(rank) <= self.ratio * x.macs()),
                default=x.ranks[0]) for x in free
        ]


class AnyCost(Cost):
    """Lets every rank pay."""

    def pays(self, costs: Costs, rank: int) -> bool:
        return True

    def ranks(self, costs: Costs, round_to: int) -> Tuple[int, ...]:
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

    def __init__(self,
                 ranks: Dict[str, Union[int, str]],
                 allow_costlier: bool = False,
                 **kwargs) -> None:
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
            for layer in layers if first_match(layer, self.ranks) is None
        })

    def choose(self, free: Sequence[Candidates],
               decided: Decided) -> Sequence[Optional[int]]:
        chosen = []
        for x in free:
            rank, full = first_match(x.layer, self.ranks), x.layer.full_rank
            rank = full if rank == 'full' else check_rank(x.layer, rank)
            rank = min(-(-rank // self.round_to) * self.round_to, full)
            chosen.append(rank if self.cost.pays(x, rank) else None)
        return chosen
