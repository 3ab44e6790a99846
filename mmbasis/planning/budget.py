# Copyright (c) mmbasis authors. All rights reserved.
"""The planner that spends one budget on the whole network."""
from typing import Optional, Union

import numpy as np

from ..registry import PLANNERS
from .allocation import allocate
from .latency import LatencyTable
from .layers import NO_TARGETS, LayerInfo
from .planners import BasePlanner, check_fraction


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
        table (str | dict, optional): Latency table of the device: its file,
            or ``dict(path=…)`` with what it must be of (``device``,
            ``backend``, ``precision``). A layer that no measured rank makes
            faster stays dense.
        loss_aware (bool, optional): Weigh directions by the gradients of the
            loss on the calibration images. By default this is done where
            ``data_aware`` is set and the model's loss is known.
        **kwargs: See :class:`BasePlanner`.
    """

    def __init__(self,
                 macs: Optional[float] = None,
                 params: Optional[float] = None,
                 latency: Optional[float] = None,
                 table: Union[None, str, dict] = None,
                 loss_aware: Optional[bool] = None,
                 **kwargs) -> None:
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
        self._latencies = None if table is None else LatencyTable.of(table)
        self.table = self._latencies and self._latencies.describe()

    def select(self, model, layers, targets=NO_TARGETS) -> None:
        super().select(model, layers, targets)
        if self._latencies is not None:
            self._latencies.check_layers([x for x in layers if x.compressible])

    def _ranks(self, layer):
        ranks = super()._ranks(layer)
        if self._latencies is None:
            return ranks
        return np.array(
            [r for r in ranks if self._latencies.is_faster(layer.name, r)],
            dtype=int)

    def _pays(self, layer, rank):
        return super()._pays(
            layer, rank) and (self._latencies is None
                              or self._latencies.is_faster(layer.name, rank))

    def _no_rank(self, layer):
        if self._latencies is None or not len(super()._ranks(layer)):
            return super()._no_rank(layer)
        return 'no rank is faster than the dense layer, by the latency table'

    def _kept(self, layer):
        return 'worth more dense than what it costs'

    @staticmethod
    def _lost(layer: LayerInfo, loss_aware: bool) -> np.ndarray:
        """What each rank from 0 to full loses."""
        if loss_aware:
            lost = layer.sensitivity.cpu().numpy()
        else:
            energy = layer.spectrum.energy.cpu().numpy()
            lost = energy / max(energy.sum(), 1e-300)
        return np.append(lost[::-1].cumsum()[::-1], 0.)

    def _cost(self, layer: LayerInfo, rank: Optional[int]) -> float:
        if self._latencies is not None:
            return self._latencies.cost(layer.name, rank)
        if self.metric == 'macs':
            return layer.macs(rank)
        return layer.params(rank, **self._extras)

    def _choose(self, layers, fixed):
        everything = list(layers) + [layer for layer, _ in fixed]
        if self._latencies is None:
            budget = self.budget * sum(self._cost(x, None) for x in everything)
        else:
            budget = self._latencies.budget(self.budget,
                                            [x.name for x in everything])
        budget -= sum(self._cost(layer, rank) for layer, rank in fixed)
        # one unit for all
        loss_aware = all(x.sensitivity is not None for x in layers)
        options, table = [], []
        for layer in layers:
            ranks = self._ranks(layer).tolist()
            lost = self._lost(layer, loss_aware)
            # None, the dense layer, comes last
            costs = [self._cost(layer, rank) for rank in (*ranks, None)]
            losses = [lost[rank] for rank in ranks] + [0.]
            options.append((np.array(costs), np.array(losses)))
            table.append((*ranks, None))
        try:
            chosen = allocate(options, budget)
        except ValueError as error:
            raise ValueError(f'BudgetPlanner: {self.metric}={self.budget:g} '
                             f'cannot be met: {error}') from None
        return [ranks[index] for ranks, index in zip(table, chosen)]
