# Copyright (c) mmbasis authors. All rights reserved.
"""Latencies, warm-up, quantiles, intervals."""
import math
import random

import pytest
from jetson.protocol import schedule
from jetson.stats import (
    cut_off,
    latency_summary,
    paired_ratio,
    quantile,
    student_t95,
    unpaired_ratio,
)
from jetson.summary import add_comparisons
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
        base = [100 * rng.lognormvariate(0, .02) for _ in range(7)]
        values = [130 * rng.lognormvariate(0, .02) for _ in range(7)]
        got = estimate(values, base)
        hits += got['low'] <= 1.3 <= got['high']
    assert 930 <= hits <= 975


@pytest.mark.parametrize('count, skip, coverage', [
    (5, 0, 1 - 2 / 32),
    (7, 2, 1 - 6 / 128),
    (10, 8, 1 - 50 / 1024),
])
def test_signed_ranks_against_the_table(count, skip, coverage):
    """Critical values of Wilcoxon's test, two-sided 5 %."""
    assert cut_off(count) == (skip, pytest.approx(coverage))


def test_signed_ranks_of_many_blocks():
    assert cut_off(25)[1] == pytest.approx(.95, abs=.002)
    assert cut_off(30)[0] == 137  # of published tables


def test_outliers_move_neither_ratio_nor_interval():
    logs = [.01 * i for i in range(-3, 4)]
    base = [1.0] * 7
    got = paired_ratio([math.exp(x) for x in logs], base)
    assert got['ratio'] == pytest.approx(1) and 'signed ranks' in got['method']
    assert got['low'] == pytest.approx(math.exp(-.02))
    wild = paired_ratio([math.exp(x) for x in logs[:-1] + [5.]], base)
    assert wild['ratio'] == pytest.approx(1, abs=.01)
    assert wild['high'] > 2 > 1.02 > wild['ratio']


@pytest.mark.parametrize('count', [1, 2, 3, 5])
def test_order_of_windows(count):
    blocks = schedule(count, 7, random.Random(1))
    assert len(blocks) == 7
    for i, block in enumerate(blocks):
        assert block == block[::-1] and sorted(block) == sorted(
            list(range(count)) * 2)
        if i % 2:
            assert block[:count] == blocks[i - 1][:count][::-1]
    firsts = {
        schedule(2, 1, random.Random(i))[0][0]
        for i in range(20)
    }
    assert firsts == {0, 1}


@pytest.mark.parametrize('shape', [
    lambda k: math.exp(-.005 * k), lambda k: 1 - .005 * k,
    lambda k: 1 - .1 * (1 - math.exp(-k / 8))
])
@pytest.mark.parametrize('models', [2, 3])
def test_equal_models_that_drift_are_equal(models, shape):
    """Without any noise: 0.9950 [0.9950, 0.9950] must not come again."""
    for seed in range(20):
        windows, k = [[] for _ in range(models)], 0
        for b, block in enumerate(schedule(models, 7, random.Random(seed))):
            for place in block:
                windows[place].append(
                    dict(block=b, fps=shape(k), power=None, images=1,
                         latency_ms=dict(p50=1 / shape(k))))
                k += 1
        result = dict(baseline='0', models=[
            dict(name=str(i), windows=w) for i, w in enumerate(windows)])
        add_comparisons(result)
        for entry in result['comparisons']:
            for key in ('fps', 'latency_p50'):
                found = entry[key]
                assert found['low'] <= 1 <= found['high']
                assert found['ratio'] == pytest.approx(1, abs=.005)


def test_unfinished_blocks_are_left_out():
    def window(block, fps):
        return dict(block=block, fps=fps, power=None, images=1,
                    latency_ms=dict(p50=1 / fps))

    base = [window(0, 10), window(0, 10), window(1, 99)]
    result = dict(baseline='a', models=[
        dict(name='a', windows=base),
        dict(name='b', windows=[window(0, 20), window(0, 20)])])
    add_comparisons(result)
    found = result['comparisons'][0]['fps']
    assert found['ratio'] == pytest.approx(2) and found['low'] is None
    result['models'][1]['windows'].pop()
    add_comparisons(result)
    assert result['comparisons'] == []
