# Copyright (c) mmbasis authors. All rights reserved.
"""Latencies, warm-up, quantiles, intervals."""
import random

import pytest
from jetson.stats import (
    latency_summary,
    paired_ratio,
    quantile,
    student_t95,
    unpaired_ratio,
)
from jetson.timing import timed_window, warm_up
from jetson.util import now


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time

    def spend(self, seconds):
        self.time += seconds


def test_known_latencies_are_exact():
    clock = Clock()
    durations = [0.010, 0.012, 0.011, 0.020] * 50
    todo = iter(durations)
    start, end, got = timed_window(lambda: clock.spend(next(todo)), 1.0, 10,
                                   clock)
    assert list(got) == pytest.approx(durations[:len(got)])
    assert end - start == pytest.approx(sum(got))
    assert end - start >= 1.0 > sum(got) - got[-1]


def test_least_number_of_inferences():
    clock = Clock()
    _, _, got = timed_window(lambda: clock.spend(1), 2, 7, clock)
    assert len(got) == 7


def test_real_latency_is_measured_within_two_percent():
    own = []

    def busy():
        start = now()
        while now() < start + 0.004:
            pass
        own.append(now() - start)

    _, _, got = timed_window(busy, 0.4, 50)
    # On a busy machine others get in between the readings of the clock of
    # some inferences; a quarter of them must be undisturbed.
    excess = sorted(a / b - 1 for a, b in zip(got, own))
    assert min(own) >= 0.004 and excess[0] > -1e-6
    assert excess[len(excess) // 4] < 0.02


def test_warm_up_waits_until_it_has_settled():
    clock = Clock()
    calls = []

    def infer():
        calls.append(0)
        clock.spend(0.01 * (1 + 3 * 0.98**len(calls)))

    found = warm_up(infer, 0.1, 60, clock=clock)
    assert found['settled'] and found['median_ms'] == pytest.approx(10, .05)
    assert found['count'] == len(calls) > 150


def test_warm_up_that_never_settles_ends():
    clock, wild = Clock(), random.Random(1)
    step = [0.01]

    def infer():
        step[0] *= 1.01
        clock.spend(step[0] * wild.uniform(.5, 1.5))

    found = warm_up(infer, 0.1, 3, clock=clock)
    assert not found['settled'] and found['seconds'] >= 3


def test_quantiles():
    assert quantile([1, 2, 3, 4], .5) == 2.5
    assert quantile([5], .99) == 5
    got = latency_summary([0.001 * i for i in range(1, 101)])
    assert got['p90'] == pytest.approx(90.1)
    assert got['mean'] == pytest.approx(50.5)


def test_quantile_of_student():
    assert student_t95(4) == 2.776
    assert student_t95(30) == 2.042
    assert student_t95(60) == pytest.approx(2.000, abs=0.003)
    assert student_t95(1000) == pytest.approx(1.962, abs=0.003)
    with pytest.raises(ValueError):
        student_t95(0)


def test_shared_drift_cancels_in_paired_ratios():
    base = [100, 95, 90, 85, 80]
    values = [1.5 * b for b in base]
    got = paired_ratio(values, base)
    assert got['ratio'] == pytest.approx(1.5)
    assert got['high'] - got['low'] < 1e-9
    wide = unpaired_ratio(values, base)
    assert wide['ratio'] == pytest.approx(1.5)
    assert wide['low'] < 1.35 and wide['high'] > 1.65
    assert paired_ratio([2], [1])['low'] is None


@pytest.mark.parametrize('estimate', [paired_ratio, unpaired_ratio])
def test_intervals_hold_what_they_promise(estimate):
    rng, hits = random.Random(0), 0
    for _ in range(1000):
        base = [100 * rng.lognormvariate(0, .02) for _ in range(5)]
        values = [130 * rng.lognormvariate(0, .02) for _ in range(5)]
        got = estimate(values, base)
        hits += got['low'] <= 1.3 <= got['high']
    assert 930 <= hits <= 975
