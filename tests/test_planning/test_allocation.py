# Copyright (c) mmbasis authors. All rights reserved.
import itertools

import numpy as np
import pytest

from mmbasis.planning.budget import allocate


def total(options, chosen):
    costs = sum(cost[i] for (cost, _), i in zip(options, chosen))
    losses = sum(loss[i] for (_, loss), i in zip(options, chosen))
    return costs, losses


def brute_force(options, budget):
    """Least loss within the budget over all combinations."""
    return min(
        total(options, chosen)[1]
        for chosen in itertools.product(*(range(len(c)) for c, _ in options))
        if total(options, chosen)[0] <= budget)


def random_options(rng, convex):
    options = []
    for _ in range(rng.integers(1, 6)):
        size = rng.integers(1, 7)
        costs = np.cumsum(rng.integers(1, 20, size)).astype(float)
        if convex:
            # falling gains per cost, as energies of a spectrum have
            slopes = np.sort(rng.random(size))[::-1]
            gains = slopes * np.diff(costs, prepend=0)
            losses = gains.sum() - np.cumsum(gains)
        else:
            losses = rng.random(size)
        order = rng.permutation(size)
        options.append((costs[order], losses[order]))
    return options


@pytest.mark.parametrize('convex', [True, False])
@pytest.mark.parametrize('seed', range(60))
def test_close_to_brute_force(seed, convex):
    rng = np.random.default_rng(seed)
    options = random_options(rng, convex)
    least = sum(costs.min() for costs, _ in options)
    most = sum(costs.max() for costs, _ in options)
    budget = least + rng.random() * (most - least)
    chosen = allocate(options, budget)
    cost, loss = total(options, chosen)
    assert cost <= budget * (1 + 1e-9)
    # the relaxation may miss the optimum by the last step of one layer
    step = max(losses.max() - losses.min() for _, losses in options)
    if convex:
        step = max(
            np.abs(np.diff(losses[np.argsort(costs)])).max(initial=0)
            for costs, losses in options)
    best = brute_force(options, budget)
    assert best - 1e-9 <= loss <= best + step + 1e-9


@pytest.mark.parametrize('seed', range(20))
def test_exact_where_all_steps_cost_the_same(seed):
    rng = np.random.default_rng(seed)
    options = []
    for _ in range(4):
        gains = np.sort(rng.random(5))[::-1]
        options.append((np.arange(1., 6.), gains.sum() - np.cumsum(gains)))
    for budget in (4, 7, 11, 20):
        chosen = allocate(options, budget)
        assert total(options,
                     chosen)[1] == pytest.approx(brute_force(options, budget))


def test_option_above_the_hull_is_used_for_the_rest():
    # the hull goes from cost 1 to cost 9; what is left pays for cost 3
    options = [(np.array([1., 3., 9.]), np.array([10., 9., 0.]))]
    assert allocate(options, 1) == [0]
    assert allocate(options, 8.9) == [1]
    assert allocate(options, 9) == [2]


def test_dominated_options_are_never_chosen():
    options = [(np.array([1., 2., 3.]), np.array([5., 7., 5.]))]
    assert allocate(options, 100) == [0]


def test_equal_options():
    options = [(np.array([2., 2.]), np.array([3., 1.]))]
    assert allocate(options, 2) == [1]


def test_the_better_layer_gets_the_budget():
    options = [(np.array([1., 2.]), np.array([1., 0.9])),
               (np.array([1., 2.]), np.array([1., 0.1]))]
    assert allocate(options, 3) == [0, 1]
    assert allocate(options, 4) == [1, 1]
    assert allocate(options, 3.999) == [0, 1]


def test_a_step_too_expensive_does_not_stop_the_others():
    # the steepest step costs more than there is
    options = [(np.array([1., 100.]), np.array([1000., 0.])),
               (np.array([1., 2.]), np.array([1., 0.]))]
    assert allocate(options, 50) == [0, 1]


def test_no_layers():
    assert allocate([], 10.) == []


def test_budget_that_cannot_be_met():
    options = [(np.array([3., 9.]), np.array([1., 0.]))] * 2
    with pytest.raises(ValueError, match='cost 6, more than the budget of 5'):
        allocate(options, 5)
    assert allocate(options, 6) == [0, 0]
