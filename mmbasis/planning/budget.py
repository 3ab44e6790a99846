# Copyright (c) mmbasis authors. All rights reserved.
"""The planner that spends one budget on the whole network."""
from __future__ import annotations

import heapq
from typing import Any, Sequence

import numpy as np
from mmengine.logging import MMLogger

from ..registry import PLANNERS
from .costs import Cost, Costs, DeviceCost, Form, Ranks
from .devices import device_at_hand
from .latency_table import LatencyTable
from .plan import CompressionPlan
from .planners import BasePlanner, Choice, Decided, check_fraction
from .statistics import Analysis

#: what a layer may become
FORMS = ('output', 'input', 'both')
#: ranks of a side that are tried, beside those of the output form
GRID = 64


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


def check_forms(forms: Sequence[str], cost: Cost) -> tuple[str, ...]:
    """Require a list of forms that a cost knows; the ValueError says it."""
    if isinstance(forms, str) or not set(forms) <= set(FORMS) or not forms:
        raise ValueError(f'BudgetPlanner: forms is a list of '
                         f'{", ".join(FORMS)}, but got {forms!r}')
    if tuple(forms) != FORMS[:1] and not cost.knows_inputs:
        raise ValueError('BudgetPlanner: a latency table knows the output '
                         f'form only, but got forms={forms!r}')
    return tuple(forms)


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
        latency (float, optional): Fraction of the latency: of the whole
            model, as ``table`` has it, or of the compressible layers, as
            ``device`` predicts it. Exactly one of the three is given.
        table (str | dict, optional): Latency table: its file, or
            ``dict(path=…)`` with what :meth:`LatencyTable.check` requires. A
            layer that no measured rank makes faster stays dense.
        device (str, optional): A model of a device instead of a table, such as
            ``'xavier-fp16'``: see :mod:`mmbasis.planning.devices`. A layer
            that would not be faster stays dense.
        forms (Sequence[str], optional): What a layer may become: ``'output'``
            (basis filters and 1x1 coefficients, the paper), ``'input'`` (a 1x1
            basis of the input channels in front), ``'both'``. Defaults to all
            of them where data are looked at; a latency table, and a planner
            without data, know the first only.
        loss_aware (bool, optional): Weigh directions by the gradients of the
            loss on the calibration images. By default this is done where
            ``data_aware`` is set and the model's loss is known.
        **kwargs: See :class:`BasePlanner`.
    """
    ALIGNED = True
    why_dense = 'worth more dense than what it costs'

    def __init__(self,
                 macs: float | None = None,
                 params: float | None = None,
                 latency: float | None = None,
                 table: str | dict | None = None,
                 device: str | None = None,
                 forms: Sequence[str] | None = None,
                 loss_aware: bool | None = None,
                 **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if loss_aware and not self.data_aware:
            raise ValueError('BudgetPlanner: loss_aware=True needs '
                             'data_aware=True')
        self.loss_aware = loss_aware if self.data_aware else False
        given = dict(macs=macs, params=params, latency=latency)
        fractions = [(k, v) for k, v in given.items() if v is not None]
        sources = [x for x in (table, device) if x is not None]
        if len(fractions) != 1 or len(sources) != (latency is not None):
            raise ValueError(
                'BudgetPlanner takes exactly one of macs and params, or '
                f'latency with its table or device, but got {given}, '
                f'table={table!r}, device={device!r}')
        self.metric, fraction = fractions[0]
        self.budget = check_fraction(f'BudgetPlanner: {self.metric}', fraction)
        self.cost = Cost(self.metric)
        if device is not None:
            self.cost = DeviceCost(device)
        if table is not None:
            table = dict(path=table) if isinstance(table, str) else table
            self.cost = LatencyTable.load(**table)
        knows_inputs = self.cost.knows_inputs and self.data_aware
        if forms is None:
            forms = FORMS if knows_inputs else FORMS[:1]
        self.forms = check_forms(forms, self.cost)

    def _can_pay(self, costs: Costs) -> bool:
        nothing = np.zeros(costs.layer.full_rank + 1)
        return any(
            self.cost.pays(costs, ranks).any()
            for form, (ranks, lost) in self._forms(costs, nothing).items()
            if form in self.forms and len(lost))

    def choose(self, free: Sequence[Costs], decided: Decided) -> Choice:
        of = self.cost.of
        counted = [*free, *(x for x, _ in decided)]
        budget = self.cost.budget(self.budget, counted)
        budget -= sum(of(x, ranks) for x, ranks in decided)
        tables = [self._options(x, lost) for x, lost in zip(free, _lost(free))]
        try:
            chosen = allocate([x[:2] for x in tables], budget)
        except ValueError as error:
            raise ValueError(f'BudgetPlanner: {self.metric}={self.budget:g} '
                             f'cannot be met: {error}') from None
        return [ranks[index] for (*_, ranks), index in zip(tables, chosen)]

    def plan(self,
             analysis: Analysis,
             form: Form = Costs.form) -> CompressionPlan:
        plan = super().plan(analysis, form)
        if self.metric != 'latency':
            warn_if_slower(plan, self.metric, self.budget)
        return plan

    def _options(
        self, x: Costs, sensitivity: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[Ranks | None]]:
        """Costs, losses and ranks of what a layer may become, given what
        dropping each direction of its output loses; the dense layer last."""
        cost, loss, found = [], [], []
        forms = self._forms(x, _behind(sensitivity))
        for form, (ranks, lost) in forms.items():
            if form in self.forms and len(lost):
                pays = self.cost.pays(x, ranks)
                cost.append(self.cost.of(x, ranks)[pays])
                loss.append(lost[pays])
                sides = (0 * lost if side is None else side for side in ranks)
                found.append(np.stack([*sides])[:, pays].astype(int))
        cost.append([self.cost.of(x, None)])
        loss.append([0.])
        found.append(np.zeros((2, 1), int))
        costs, losses = np.concatenate(cost), np.concatenate(loss)
        front = _front(costs, losses)
        options: list[Ranks | None] = [
            Ranks(output or None, inputs or None) if output or inputs else None
            for output, inputs in np.concatenate(found, 1)[:, front].T.tolist()
        ]
        return costs[front], losses[front], options

    def _forms(self, x: Costs,
               lost: np.ndarray) -> dict[str, tuple[Ranks, np.ndarray]]:
        """Ranks in each form, and what they lose, given what ranks of the
        output from 0 on lose."""
        outputs = np.array(x.ranks, int)
        forms = dict(output=(Ranks(outputs), lost[outputs]))
        if x.statistics.inputs is not None:
            # in one unit: without any input there is no output
            shares = x.statistics.inputs.shares.cpu().numpy()
            narrow = lost[0] * _behind(shares)
            inputs = self._grid(x.layer.in_channels)
            forms['input'] = (Ranks(None, inputs), narrow[inputs])
            outputs, inputs = (side.ravel() for side in np.meshgrid(
                self._grid(x.layer.full_rank), inputs))
            # more basis filters than they have weights add nothing
            some = outputs <= inputs * x.layer.window
            outputs, inputs = outputs[some], inputs[some]
            forms['both'] = (Ranks(outputs, inputs),
                             lost[outputs] + narrow[inputs])
        return forms

    def _grid(self, size: int) -> np.ndarray:
        """Ranks up to a size, at most ``GRID`` of them, each a multiple of
        :meth:`step`."""
        step = self.step(size)
        step *= -(-size // (GRID * step))
        return np.arange(step, size + 1, step)


def warn_if_slower(plan: CompressionPlan, metric: str,
                   fraction: float) -> None:
    """Warn of a plan for a budget that is predicted to be slower than the
    dense layers on the machine at hand, where that is one of the presets."""
    here = device_at_hand()
    times = plan.predicted_ms.get(here.name) if here else None
    if here and times and times['after'] > times['before']:
        MMLogger.get_current_instance().warning(
            'With %s=%g the layers are predicted to take %.2f times as long '
            "as dense on this machine (%s). BudgetPlanner(latency=%g, "
            "device='%s') keeps layers dense that would get slower", metric,
            fraction, times['after'] / times['before'], here.name, fraction,
            here.name)


def _behind(values: np.ndarray) -> np.ndarray:
    """Sums of all values from an index on, for each index and the end."""
    return np.append(values[::-1].cumsum()[::-1], 0.)


def _front(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the options that no other one beats, by rising cost."""
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(losses[order])
    return order[np.append(True, best[1:] < best[:-1])]


def _lost(free: Sequence[Costs]) -> list[np.ndarray]:
    """What dropping each direction of the output loses, in one unit for all
    layers: where the sensitivity is unknown, the share of energy times what
    layers of known sensitivity typically lose in all."""
    known = [x.statistics.sensitivity for x in free]
    totals = [float(x.sum()) for x in known if x is not None and x.any()]
    unit = np.median(totals) if totals else 1.
    losses = []
    for x, sensitivity in zip(free, known):
        if sensitivity is None:
            energy = x.spectrum.energy
            sensitivity = unit * energy / energy.sum().clamp_min(1e-300)
        losses.append(sensitivity.cpu().numpy())
    return losses
