# Copyright (c) mmbasis authors. All rights reserved.
"""Ranks under a budget: a multiple-choice knapsack."""
from typing import List, Sequence, Tuple

import numpy as np

Options = Tuple[np.ndarray, np.ndarray]


def _pareto(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the options that nothing beats, by rising cost."""
    order = np.lexsort((losses, costs))
    best = np.minimum.accumulate(losses[order])
    return order[np.append(True, best[1:] < best[:-1])]


def _hull(costs: np.ndarray, losses: np.ndarray) -> List[int]:
    """Lower convex hull of points of rising cost and falling loss."""
    hull: List[int] = []
    for point in range(len(costs)):
        while len(hull) > 1:
            a, b = hull[-2:]
            # drop b if it lies on or above the line from a to the new point
            if ((losses[b] - losses[a]) * (costs[point] - costs[a])
                    >= (losses[point] - losses[a]) * (costs[b] - costs[a])):
                hull.pop()
            else:
                break
        hull.append(point)
    return hull


def allocate(options: Sequence[Options], budget: float) -> List[int]:
    """Choose one option per layer: least total loss within the budget.

    Walking along the convex hulls of the layers' options in order of their
    slopes (the Lagrangian relaxation) is optimal up to the last step.

    Args:
        options (Sequence[tuple[ndarray, ndarray]]): Costs and losses of each
            layer's options, in any order.
        budget (float): Upper bound of the sum of costs.

    Returns:
        list[int]: Index of the chosen option of each layer.

    Raises:
        ValueError: If even the cheapest options exceed the budget.
    """
    fronts = [_pareto(*option) for option in options]
    costs = [option[0][front] for option, front in zip(options, fronts)]
    losses = [option[1][front] for option, front in zip(options, fronts)]
    spent = sum(cost[0] for cost in costs)
    slack = budget * (1 + 1e-9) - spent
    if slack < 0:
        raise ValueError(f'the smallest ranks cost {spent:.6g}, more than the '
                         f'budget of {budget:.6g}')

    chosen, slack = _along_hulls(costs, losses, slack)
    _spend_rest(costs, losses, chosen, slack)
    return [int(front[index]) for front, index in zip(fronts, chosen)]


def _along_hulls(costs: List[np.ndarray], losses: List[np.ndarray],
                 slack: float) -> Tuple[List[int], float]:
    """Take the steps of all hulls, steepest first, up to the first that costs
    more than there is; the choice, and what is left of the budget."""
    steps = []
    for layer, (cost, loss) in enumerate(zip(costs, losses)):
        hull = _hull(cost, loss)
        for a, b in zip(hull, hull[1:]):
            gain = (loss[a] - loss[b]) / (cost[b] - cost[a])
            steps.append((-gain, layer, b))
    chosen = [0] * len(costs)
    for _, layer, target in sorted(steps):
        extra = costs[layer][target] - costs[layer][chosen[layer]]
        if extra > slack:
            break
        chosen[layer], slack = target, slack - extra
    return chosen, slack


def _spend_rest(costs: List[np.ndarray], losses: List[np.ndarray],
                chosen: List[int], slack: float) -> None:
    """Take single options for what is left, the largest gain first."""
    while True:
        best_gain, best = 0., None
        for layer, (cost, loss) in enumerate(zip(costs, losses)):
            now = chosen[layer]
            target = int(np.searchsorted(cost, cost[now] + slack, 'right')) - 1
            gain = loss[now] - loss[target]
            if gain > best_gain:
                best_gain, best = gain, (layer, target)
        if best is None:
            return
        layer, target = best
        slack -= costs[layer][target] - costs[layer][chosen[layer]]
        chosen[layer] = target
