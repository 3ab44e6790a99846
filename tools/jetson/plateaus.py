# Copyright (c) mmbasis authors. All rights reserved.
"""Finds the busy stretches of a recorded power curve, and compares them.

For logs that were recorded without this tool, such as tegrastats running
beside a program: every stretch in which a rail stays high is one job.
"""
from .energy import integrate
from .stats import quantile


def find_plateaus(times, watts, min_seconds=5.0):
    """Finds stretches in which power is high.

    The limit lies midway between the quiet and the busy level (5 % and 95 %
    quantiles). A stretch begins and ends where the line between two readings
    crosses the limit. Pauses of a single reading do not end it.

    Args:
        times (list[float]): s.
        watts (list[float]): W of one rail.
        min_seconds (float): shorter stretches are left out.

    Returns:
        list[dict]: ``start``, ``end``, ``seconds``, ``mean_w``, ``energy_j``
        of each stretch, in order; ``error_s``, the time between readings,
        is how far the length may be wrong.
    """
    ordered = sorted(watts)
    limit = (quantile(ordered, .05) + quantile(ordered, .95)) / 2
    found, start = [], None
    for i in range(1, len(times)):
        rises = watts[i - 1] < limit <= watts[i]
        falls = watts[i - 1] >= limit > watts[i]
        if not (rises or falls):
            continue
        share = (limit - watts[i - 1]) / (watts[i] - watts[i - 1])
        crossing = times[i - 1] + share * (times[i] - times[i - 1])
        if rises and start is None:
            start = crossing
        elif falls and start is not None:
            if i + 1 < len(times) and watts[i + 1] >= limit:
                continue
            found.append((start, crossing))
            start = None
    step = (times[-1] - times[0]) / (len(times) - 1)
    plateaus = []
    for start, end in found:
        if end - start >= min_seconds:
            energy = integrate(times, watts, start, end)
            plateaus.append(
                dict(
                    start=start,
                    end=end,
                    seconds=end - start,
                    mean_w=energy / (end - start),
                    energy_j=energy,
                    error_s=step))
    return plateaus


def compare_plateaus(plateaus):
    """Compares every stretch with the first, for equal amounts of work.

    Args:
        plateaus (list[dict]): see :func:`find_plateaus`; each is taken to be
            the same number of images, the first by the baseline.

    Returns:
        list[dict]: the same, with ``speed_up``, its ``speed_up_error`` (the
        most that reading both lengths can be wrong) and ``energy_ratio``.
    """
    first = plateaus[0]
    compared = []
    for p in plateaus:
        speed_up = first['seconds'] / p['seconds']
        # Half a reading at each edge: one reading in each length at worst.
        error = p['error_s'] * (1 / first['seconds'] + 1 / p['seconds'])
        compared.append(
            dict(
                p,
                speed_up=speed_up,
                speed_up_error=speed_up * error,
                energy_ratio=p['energy_j'] / first['energy_j']))
    return compared
