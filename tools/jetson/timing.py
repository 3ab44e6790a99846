# Copyright (c) mmbasis authors. All rights reserved.
"""Warm-up and timed windows of one model.

``infer`` is a call that runs one inference and returns when its result is in
the memory of the host.
"""
from array import array

from .stats import quantile
from .util import now


def warm_up(infer,
            min_seconds=1.0,
            max_seconds=60.0,
            tolerance=0.02,
            clock=now):
    """Runs until the median latency has settled.

    Latencies are grouped into windows of at least ten inferences and a
    twentieth of ``max_seconds`` or 0.25 s, whichever is shorter. It has
    settled when the medians of the last three windows differ by less than
    ``tolerance``.

    Args:
        infer (callable): one inference.
        min_seconds, max_seconds (float): limits of the warm-up.
        tolerance (float): as a share of the median.
        clock (callable): returns s.

    Returns:
        dict: ``settled`` (bool), ``seconds``, ``count``, ``median_ms`` of
        the last window.
    """
    length = min(0.25, max_seconds / 20)
    start = clock()
    medians, count = [], 0
    while True:
        window, begin = [], clock()
        while len(window) < 10 or clock() - begin < length:
            t = clock()
            infer()
            window.append(clock() - t)
        count += len(window)
        medians.append(quantile(sorted(window), .5))
        last = medians[-3:]
        settled = (
            len(last) == 3 and max(last) - min(last) <= tolerance * min(last))
        seconds = clock() - start
        if (settled and seconds >= min_seconds) or seconds >= max_seconds:
            return dict(
                settled=settled,
                seconds=seconds,
                count=count,
                median_ms=medians[-1] * 1e3)


def timed_window(infer, min_seconds, min_count, clock=now):
    """Times inferences one after the other.

    Nothing else happens in the loop, and the clock is read once per
    inference, so that the latencies add up to the window.

    Args:
        infer (callable): one inference.
        min_seconds (float): the window lasts at least this long …
        min_count (int): … and holds at least so many inferences.
        clock (callable): returns s.

    Returns:
        tuple[float, float, array]: start and end on ``clock``, and the
        latencies in s; end - start is their sum.
    """
    latencies = array('d')
    start = before = clock()
    least = start + min_seconds
    while before < least or len(latencies) < min_count:
        infer()
        after = clock()
        latencies.append(after - before)
        before = after
    return start, before, latencies
