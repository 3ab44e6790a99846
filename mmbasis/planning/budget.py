# Copyright (c) mmbasis authors. All rights reserved.
"""The planner that spends one budget on the whole network."""
from __future__ import annotations

import copy
import heapq
from typing import Any, Mapping, NamedTuple, Sequence

import numpy as np
from mmengine.logging import MMLogger

from ..registry import PLANNERS
from ..utils.schema import BOOL, NONE, TEXT, Rule, list_of, one_of
from .costs import Cost, Costs, DeviceCost, Form, Ranks
from .devices import device_at_hand
from .latency_table import LatencyTable
from .layers import FORMS
from .plan import CompressionPlan
from .planners import BasePlanner, Choice, Decided, check_fraction
from .statistics import Analysis

#: what says how long layers take, by what the budget is of
SOURCES: dict[str, list[list[str]]] = dict(
    macs=[[], ['device']], params=[[]], latency=[['table'], ['device']])
#: weights of time in the choice of options, and how much more than with none
#: a plan may lose
WEIGHTS: tuple[float, ...] = (0., .25, .5, .75, 1.)
TOLERANCE = .1
#: ranks of a side that are tried, beside those of the output form
GRID = 64


def allocate(options: Sequence[tuple[np.ndarray, np.ndarray]],
             budget: float,
             start: Sequence[int] | None = None) -> list[int]:
    """Choose one option per layer: little total loss within the budget.

    From the cheapest options on, the layer that saves most loss for its cost
    makes a step. Up to the first step that costs too much this is a walk along
    the convex hulls (Lagrangian relaxation), optimal up to there.

    Args:
        options (Sequence[tuple[ndarray, ndarray]]): Costs and losses by layer.
        budget (float): Upper bound of the sum of costs.
        start (Sequence[int], optional): Where not from the cheapest ones.

    Returns:
        list[int]: The options; a ValueError if the cheapest cost too much.
    """
    chosen = list(start or map(_cheapest, options))
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
        # less is rounding
        better, = np.nonzero((rise > 0) & (rise <= slack)
                             & (gain > 1e-9 * losses.max()))
        if len(better):
            slopes = gain[better] / rise[better]
            best = slopes.argmax()
            heapq.heappush(steps, (-slopes[best], layer, int(better[best])))
    return chosen


def _cheapest(option: tuple[np.ndarray, np.ndarray]) -> int:
    """Index of the cheapest one; of several, of that which loses least."""
    costs, losses = option
    return int(np.lexsort((losses, costs))[0])


class Options(NamedTuple):
    """What a layer may become: costs, times, losses and ranks; the dense layer
    last, with None."""
    costs: np.ndarray
    times: np.ndarray
    losses: np.ndarray
    ranks: list[Ranks | None]

    def efficient(self, weight: float) -> np.ndarray:
        """Indices of the options that lose least for a mean of cost and time,
        both relative to the dense layer, and of the cheapest one: some budgets
        allow nothing else."""
        prices = ((1 - weight) * self.costs / self.costs[-1]
                  + weight * self.times / self.times[-1])
        cheapest = _cheapest((self.costs, self.losses))
        return np.union1d(hull(prices, self.losses), cheapest)


def _spend(tables: Sequence[Options], budget: float,
           weight: float) -> list[int]:
    """Choose an option of each layer: among those that are efficient for some
    weight of time, and all others for what is left of the budget."""
    good = [x.efficient(weight) for x in tables]
    chosen = allocate([(x.costs[i], x.losses[i])
                       for x, i in zip(tables, good)], budget)
    start = [int(i[k]) for i, k in zip(good, chosen)]
    return allocate([(x.costs, x.losses) for x in tables], budget, start)


def _fastest(tables: Sequence[Options],
             plans: Sequence[list[int]]) -> list[int]:
    """Of some plans, the fastest that loses little more than the best one."""
    losses = [sum(float(x.losses[i]) for x, i in zip(tables, plan))
              for plan in plans]
    times = [sum(float(x.times[i]) for x, i in zip(tables, plan))
             for plan in plans]
    most = (1 + TOLERANCE) * min(losses)
    good = [n for n, loss in enumerate(losses) if loss <= most]
    return plans[min(good, key=lambda n: times[n])]


def _names_table(value: Any) -> bool:
    """Whether a value says which latency table, and perhaps of what."""
    if not isinstance(value, Mapping):
        return value is None or isinstance(value, str)
    return {'path'} <= set(value) <= {
        'path', 'backend', 'precision', 'device'} and all(
            isinstance(x, str) or key != 'path' and x is None
            for key, x in value.items())


def check_forms(forms: Sequence[str], cost: Cost) -> tuple[str, ...]:
    """Require forms that a cost knows; the ValueError says which."""
    if not forms:
        raise ValueError(f'BudgetPlanner: forms must be a list of '
                         f'{", ".join(FORMS)}, but it is empty')
    missing = [x for x in forms if x not in cost.forms]
    if missing:
        raise ValueError(
            f'BudgetPlanner: forms={forms!r}, but the latency table was '
            f'measured without {", ".join(missing)}: it has '
            f'{", ".join(cost.forms)}. Leave forms out, or export and measure '
            'the table again by tools/latency_table.py')
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
            layers to keep, in ``(0, 1]``. MACs stand for time, but hardware
            runs some ranks and forms slowly for their MACs. So, of several
            plans within the budget that lose at most a tenth more than the
            one that loses least, the fastest on ``device`` is taken.
        params (float, optional): The same of their parameters.
        latency (float, optional): Fraction of the latency: of the whole
            model, as ``table`` has it, or of the compressible layers, as
            ``device`` predicts it. Exactly one of the three is given.
        table (str | dict, optional): Latency table: its file, or
            ``dict(path=…)`` with what :meth:`LatencyTable.check` requires. A
            layer that no measured rank makes faster stays dense.
        device (str, optional): A model of a device instead of a table, such as
            ``'xavier-fp16'``: see :mod:`mmbasis.planning.devices`. A layer
            that would not be faster stays dense. With ``macs`` it is
            ``'cpu'`` by default.
        forms (Sequence[str], optional): What a layer may become: ``'output'``
            (basis filters and 1x1 coefficients, the paper), ``'input'`` (a 1x1
            basis of the input channels in front), ``'both'``, ``'spatial'``
            (k x 1, then 1 x k). Defaults to all of them, with a latency table
            to those that it has; without data to the first. With a
            normalization behind the basis none is spatial.
        loss_aware (bool, optional): Weigh directions by the gradients of the
            loss on the calibration images. By default this is done where
            ``data_aware`` is set and the model's loss is known.
        **kwargs: See :class:`BasePlanner`.
    """
    RULES = dict(
        table=Rule('a file, or dict(path=…, backend=…, precision=…, device=…)',
                   _names_table), device=TEXT | NONE,
        forms=list_of(f'a list of {", ".join(FORMS)}', one_of(*FORMS)) | NONE,
        loss_aware=BOOL | NONE)
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
        sources = [k for k, v in dict(table=table, device=device).items()
                   if v is not None]
        if len(fractions) != 1 or sources not in SOURCES[fractions[0][0]]:
            raise ValueError(
                'BudgetPlanner takes exactly one of macs and params, or '
                'latency with its table or device (macs may have a device, '
                f'too), but got {given}, table={table!r}, device={device!r}')
        self.metric, fraction = fractions[0]
        self.budget = check_fraction(f'BudgetPlanner: {self.metric}', fraction)
        self.cost = Cost(self.metric)
        if latency is not None and device is not None:
            self.cost = DeviceCost(device)
        if table is not None:
            table = dict(path=table) if isinstance(table, str) else table
            self.cost = LatencyTable.load(**table)
        #: of plans that are about as good, the fastest by this is taken
        self.time, self.weights = self.cost, WEIGHTS[:1]
        if macs is not None:
            self.time = DeviceCost('cpu' if device is None else device)
            self.weights = WEIGHTS
        if forms is None:
            forms = self.cost.forms if self.data_aware else FORMS[:1]
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
        fixed = sum(of(x, ranks) for x, ranks in decided)
        if fixed > budget * (1 + 1e-9):
            raise ValueError(self._too_dear(budget, fixed, decided))
        budget -= fixed
        tables = [self._options(x, lost) for x, lost in zip(free, _lost(free))]
        try:
            plans = [_spend(tables, budget, weight) for weight in self.weights]
        except ValueError as error:
            raise ValueError(f'BudgetPlanner: {self.metric}={self.budget:g} '
                             f'cannot be met: {error}') from None
        best = _fastest(tables, plans)
        return [x.ranks[index] for x, index in zip(tables, best)]

    def _too_dear(self, budget: float, fixed: float,
                  decided: Decided) -> str:
        """Why a budget cannot be met whatever becomes of the other layers."""
        head = f'BudgetPlanner: {self.metric}={self.budget:g} cannot be met: '
        if budget < 0:
            return head + 'what is not compressed takes longer alone'
        words = [f'{x.layer.name} ({(self._settle(x) or ("", ""))[1]})'
                 for x, _ in decided[:3]]
        return (f'{head}{len(decided)} layers whose ranks are decided already '
                f'cost {fixed:.6g}, more than the budget of {budget:.6g}: '
                f'{", ".join(words)}')

    def plan(self,
             analysis: Analysis,
             form: Form = Costs.form) -> CompressionPlan:
        network = [Costs(x, analysis.statistics[x.name], form)
                   for x in analysis.layers]
        planner = copy.copy(self)
        planner.cost = self.cost.within(
            [x for x in network if x.is_measured], analysis.between)
        plan = super(BudgetPlanner, planner).plan(analysis, form)
        if self.metric != 'latency':
            warn_if_slower(plan, self.metric, self.budget)
        return plan

    def _options(self, x: Costs, sensitivity: np.ndarray) -> Options:
        """What a layer may become, given what dropping each direction of its
        output loses."""
        rows, found = [], []
        forms = self._forms(x, _behind(sensitivity))
        for form, (ranks, lost) in forms.items():
            if form in self.forms and len(lost):
                pays = self.cost.pays(x, ranks)
                row = self.cost.of(x, ranks), self.time.of(x, ranks), lost
                rows.append(np.stack(row)[:, pays])
                sides = (0 * lost + (0 if side is None else side)
                         for side in ranks)
                found.append(np.stack([*sides])[:, pays].astype(int))
        dense = self.cost.of(x, None), self.time.of(x, None), 0.
        rows.append(np.array(dense)[:, None])
        found.append(np.zeros((3, 1), int))
        options = [
            Ranks(output or None, inputs or None, bool(spatial))
            if output or inputs else None
            for output, inputs, spatial in np.concatenate(found, 1).T.tolist()
        ]
        cost, time, loss = np.concatenate(rows, 1)
        return Options(cost, time, loss, options)

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
        if x.statistics.columns is not None and not x.why_not('spatial'):
            shares = x.statistics.columns.shares.cpu().numpy()
            ranks = self._grid(x.layer.full_spatial_rank, x.layer.full_rank)
            forms['spatial'] = (Ranks(ranks, None, True),
                                lost[0] * _behind(shares)[ranks])
        return forms

    def _grid(self, size: int, channels: int | None = None) -> np.ndarray:
        """Ranks up to a size, at most ``GRID`` of them, each a multiple of
        :meth:`step` for so many channels (the size by default)."""
        step = self.step(channels or size)
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
            'With %s=%g the network is predicted to take %.2f times as long '
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


def hull(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the options on the lower convex hull, by rising cost: at
    some price of the loss, each is the best one."""
    found: list[int] = []
    for new in _front(costs, losses):
        while len(found) > 1:
            first, last = found[-2:]
            slope = (losses[first] - losses[last]) * (costs[new] - costs[last])
            if slope > (losses[last] - losses[new]) * (
                    costs[last] - costs[first]):
                break
            found.pop()
        found.append(int(new))
    return np.array(found)


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
