# Copyright (c) mmbasis authors. All rights reserved.
"""Energy and mean power of a window, from time-stamped readings.

A reading of power holds at its time stamp; between readings it is taken to
change linearly (trapezoids). The window rarely begins or ends at a reading,
so its edges are interpolated: energy is integrated over exactly the window.
Counters of energy are interpolated the same way, and subtracted.
"""
import bisect


class Trace:
    """Readings of all rails over time.

    Args:
        rails (list[str]): names, in the order of the values.
        total (list[str] | None): rails whose sum is the total.
        kind (str): ``'power'`` (W) or ``'energy'`` (J, growing).
    """

    def __init__(self, rails, total, kind='power'):
        self.rails = rails
        self.total = total
        self.kind = kind
        self.times = []
        self.values = []

    def add(self, stamp, values):
        """Adds a reading; one that is not later than the last is dropped."""
        if not self.times or stamp > self.times[-1]:
            self.times.append(stamp)
            self.values.append(values)

    def series(self, rail):
        """Returns the values of one rail, or of the sum for ``'total'``."""
        names = self.total if rail == 'total' else [rail]
        places = [self.rails.index(n) for n in names]
        return [sum(v[i] for i in places) for v in self.values]

    def names(self):
        """Returns the rails, and ``'total'`` where there is one."""
        return self.rails + (['total'] if self.total else [])

    def power_curve(self, rail):
        """Returns times (s) and W of a rail, for plots."""
        values = self.series(rail)
        if self.kind == 'power':
            return self.times, values
        pairs = zip(self.times, self.times[1:], values, values[1:])
        return self.times[1:], [(y1 - y0) / (t1 - t0)
                                for t0, t1, y0, y1 in pairs]


def at(times, values, t):
    """Returns a value between readings, by linear interpolation.

    Before the first and after the last reading the nearest one is returned.
    """
    i = bisect.bisect_right(times, t)
    if i == 0:
        return values[0]
    if i == len(times):
        return values[-1]
    share = (t - times[i - 1]) / (times[i] - times[i - 1])
    return values[i - 1] + share * (values[i] - values[i - 1])


def integrate(times, values, start, end):
    """Integrates a piecewise linear curve over exactly a window.

    Args:
        times (list[float]): time stamps in s, growing.
        values (list[float]): W at those times.
        start, end (float): the window in s.

    Returns:
        float: J.
    """
    first = bisect.bisect_right(times, start)
    last = bisect.bisect_left(times, end)
    xs = [start] + times[first:last] + [end]
    ys = ([at(times, values, start)] + values[first:last] +
          [at(times, values, end)])
    return sum((x1 - x0) * (y0 + y1) / 2
               for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:]))


def window_energy(trace, start, end, interval_s):
    """Computes energy and power of a window.

    Args:
        trace (Trace): readings around the window.
        start, end (float): the window, s of CLOCK_MONOTONIC.
        interval_s (float): intended time between readings.

    Returns:
        dict: ``energy_j`` and ``mean_w`` per rail (and ``total``),
        ``samples`` in the window, ``rate_hz``, ``longest_gap_s`` (between
        neighbouring readings, the window's edges included), ``covered``
        (False if the readings do not reach both edges to two intervals) and
        ``complete`` (covered, and no gap above five intervals). Where they
        do not cover the window nothing is guessed: ``energy_j`` and
        ``mean_w`` are empty.
    """
    length = end - start
    times = trace.times
    first = bisect.bisect_left(times, start)
    last = bisect.bisect_right(times, end)
    result = dict(energy_j={}, mean_w={}, samples=last - first)
    result.update(_coverage(times, first, last, start, end, interval_s))
    result['rate_hz'] = result['samples'] / length
    if not result['covered']:
        return result
    for name in trace.names():
        values = trace.series(name)
        if trace.kind == 'energy':
            joules = at(times, values, end) - at(times, values, start)
        else:
            joules = integrate(times, values, start, end)
        result['energy_j'][name] = joules
        result['mean_w'][name] = joules / length
    return result


def _coverage(times, first, last, start, end, interval_s):
    """Says how well the readings ``first`` to ``last - 1`` fill a window."""
    # The readings next to the window belong to it: its edges lie between.
    around = times[max(0, first - 1):last + 1]
    if len(around) < 2:
        return dict(longest_gap_s=end - start, covered=False, complete=False)
    edges = [around[0] - start, end - around[-1]]
    gaps = [b - a for a, b in zip(around, around[1:])]
    longest = max(gaps + edges)
    covered = max(edges) <= 2 * interval_s
    return dict(
        longest_gap_s=longest,
        covered=covered,
        complete=covered and longest <= 5 * interval_s)
