# Copyright (c) mmbasis authors. All rights reserved.
"""The planner that spends one budget on the whole network."""
from __future__ import annotations

import heapq
from typing import Any, Sequence

import numpy as np

from ..registry import PLANNERS
from .costs import Cost, Costs, LatencyTable
from .planners import BasePlanner, Decided, Ranks, check_fraction


def allocate(options: Sequence[tuple[np.ndarray, np.ndarray]],
             budget: float) -> list[int]:
    """Choose one option per layer: little total loss within the budget.

    From the cheapest options on, the layer that saves most loss for its cost
    makes a step. Up to the first step that costs too much this is a walk along
    the convex hulls (the Lagrangian relaxation), optimal up to that step.

    Args:
        options (Sequence[tuple[ndarray, ndarray]]): Costs and losses of each
            layer's options, in any order.
        budget (float): Upper bound of the sum of costs.

    Returns:
        list[int]: Index of the chosen option of each layer.

    Raises:
        ValueError: If even the cheapest options exceed the budget.
    """
    chosen = [int(np.lexsort((losses, costs))[0]) for costs, losses in options]
    spent = sum(costs[now] for (costs, _), now in zip(options, chosen))
    slack = budget * (1 + 1e-9) - spent
    if slack < 0:
        raise ValueError(f'the smallest ranks cost {spent:.6g}, more than the '
                         f'budget of {budget:.6g}')
    steps = [(-np.inf, layer, now) for layer, now in enumerate(chosen)]
    while steps:
        _, layer, target = heapq.heappop(steps)
        costs, losses = options[layer]
        if costs[target] - costs[chosen[layer]] <= slack:
            slack -= costs[target] - costs[chosen[layer]]
            chosen[layer] = target
        rise = costs - costs[chosen[layer]]
        gain = losses[chosen[layer]] - losses
        better, = np.nonzero((rise > 0) & (rise <= slack) & (gain > 0))
        if len(better):
            slopes = gain[better] / rise[better]
            best = slopes.argmax()
            heapq.heappush(steps, (-slopes[best], layer, int(better[best])))
    return chosen


@PLANNERS.register_module()
class BudgetPlanner(BasePlanner):
    """Least loss within a budget for the whole network.

    What a layer loses at a rank is the sum over the directions that are
    dropped: of the increase of the task loss (``loss_aware``) or of their
    share of the layer's energy. The sum over layers is minimised under the
    budget, with "keep the layer dense" as one of the options.

    Args:
        macs (float, optional): Fraction of the MACs of the compressible
            layers to keep, in ``(0, 1]``.
        params (float, optional): The same of their parameters.
        latency (float, optional): Fraction of the whole model's latency, as
            ``table`` has it. Exactly one of the three is given.
        table (str | dict, optional): Latency table: its file, or
            ``dict(path=…)`` with what :meth:`LatencyTable.check` requires. A
            layer that no measured rank makes faster stays dense.
        loss_aware (bool, optional): Weigh directions by the gradients of the
            loss on the calibration images. By default this is done where
            ``data_aware`` is set and the model's loss is known.
        **kwargs: See :class:`BasePlanner`.
    """
    why_dense = 'worth more dense than what it costs'

    def __init__(self,
                 macs: float | None = None,
                 params: float | None = None,
                 latency: float | None = None,
                 table: str | dict | None = None,
                 loss_aware: bool | None = None,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if loss_aware and not self.data_aware:
            raise ValueError('BudgetPlanner: loss_aware=True needs '
                             'data_aware=True')
        self.loss_aware = loss_aware if self.data_aware else False
        given = dict(macs=macs, params=params, latency=latency)
        fractions = [(k, v) for k, v in given.items() if v is not None]
        if len(fractions) != 1 or (latency is None) != (table is None):
            raise ValueError(
                'BudgetPlanner takes exactly one of macs and params, or '
                f'latency with its table, but got {given}, table={table!r}')
        self.metric, fraction = fractions[0]
        self.budget = check_fraction(f'BudgetPlanner: {self.metric}', fraction)
        self.cost = Cost(self.metric)
        if table is not None:
            table = dict(path=table) if isinstance(table, str) else table
            self.cost = LatencyTable.load(**table)

    def choose(self, free: Sequence[Costs], decided: Decided) -> Ranks:
        of = self.cost.of
        counted = [*free, *(x for x, _ in decided)]
        budget = self.cost.budget(self.budget, counted)
        budget -= sum(of(x, rank) for x, rank in decided)
        # None, the dense layer, comes last
        table = [(*x.ranks, None) for x in free]
        options = [(np.array([of(x, rank) for rank in ranks]),
                    np.append(losses[list(x.ranks)], 0.))
                   for x, ranks, losses in zip(free, table, _losses(free))]
        try:
            chosen = allocate(options, budget)
        except ValueError as error:
            raise ValueError(f'BudgetPlanner: {self.metric}={self.budget:g} '
                             f'cannot be met: {error}') from None
        return [ranks[index] for ranks, index in zip(table, chosen)]


def _losses(free: Sequence[Costs]) -> list[np.ndarray]:
    """What each rank from 0 to full loses, in one unit for all layers: where
    the sensitivity is unknown, the share of energy times what layers of known
    sensitivity typically lose in all."""
    known = [x.statistics.sensitivity for x in free]
    totals = [float(x.sum()) for x in known if x is not None and x.any()]
    unit = np.median(totals) if totals else 1.
    losses = []
    for x, sensitivity in zip(free, known):
        if sensitivity is None:
            energy = x.spectrum.energy
            sensitivity = unit * energy / energy.sum().clamp_min(1e-300)
        # of all the directions that are dropped
        lost = sensitivity.cpu().numpy()[::-1].cumsum()[::-1]
        losses.append(np.append(lost, 0.))
    return losses
