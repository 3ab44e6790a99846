# Copyright (c) mmbasis authors. All rights reserved.
"""Quantiles and intervals, without numpy so that a bare Python can check."""
import math

# Two-sided 95 % quantiles of Student's t for 1 to 30 degrees of freedom.
_T95 = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042
]


def student_t95(freedom):
    """Returns the two-sided 95 % quantile of Student's t.

    Args:
        freedom (float): degrees of freedom, 1 or more; broken ones (Welch)
            are rounded down, which widens the interval.
    """
    whole = int(freedom)
    if whole < 1:
        raise ValueError('needs at least one degree of freedom')
    if whole <= len(_T95):
        return _T95[whole - 1]
    return 1.96 + 2.4 / whole  # within 0.003 of the table's continuation


def mean(values):
    """Returns the arithmetic mean."""
    return math.fsum(values) / len(values)


def deviation(values):
    """Returns the standard deviation of a sample (n - 1), 0 for one value."""
    if len(values) < 2:
        return 0.0
    m = mean(values)
    return math.sqrt(math.fsum((v - m)**2 for v in values) / (len(values) - 1))


def quantile(ordered, share):
    """Returns a quantile of sorted values, linear between neighbours.

    Args:
        ordered (list[float]): sorted, not empty.
        share (float): 0 to 1.
    """
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def latency_summary(seconds):
    """Summarises latencies.

    Args:
        seconds (iterable[float]): one per inference, in s.

    Returns:
        dict: ``mean``, ``std``, ``min``, ``p50``, ``p90``, ``p99``, ``max``
        in ms.
    """
    ms = sorted(s * 1e3 for s in seconds)
    return dict(
        mean=mean(ms),
        std=deviation(ms),
        min=ms[0],
        p50=quantile(ms, .5),
        p90=quantile(ms, .9),
        p99=quantile(ms, .99),
        max=ms[-1])


def paired_ratio(values, base):
    """Estimates a ratio from interleaved repeats.

    Repeat ``i`` of the model and of the baseline were measured one after the
    other, so that slow drifts (temperature) cancel in ``values[i] /
    base[i]``. The logarithms of these ratios are taken as normal; their mean
    has a Student-t interval with n - 1 degrees of freedom.

    Args:
        values, base (list[float]): positive, of equal length.

    Returns:
        dict: ``ratio`` (geometric mean), ``low``, ``high`` (95 %; None for a
        single repeat), ``method``.
    """
    logs = [math.log(v / b) for v, b in zip(values, base)]
    centre, half = mean(logs), None
    if len(logs) > 1:
        half = (
            student_t95(len(logs) - 1) * deviation(logs) /
            math.sqrt(len(logs)))
    return _interval(centre, half, 'paired t on log ratios')


def unpaired_ratio(values, base):
    """Estimates a ratio between separate runs (Welch's t on logarithms).

    Args:
        values, base (list[float]): positive; lengths may differ.

    Returns:
        dict: as :func:`paired_ratio`.
    """
    a, b = [math.log(v) for v in values], [math.log(v) for v in base]
    centre, half = mean(a) - mean(b), None
    if len(a) > 1 and len(b) > 1:
        va, vb = deviation(a)**2 / len(a), deviation(b)**2 / len(b)
        half = 0.0
        if va + vb > 0:
            freedom = (va + vb)**2 / (
                va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
            half = student_t95(max(1, freedom)) * math.sqrt(va + vb)
    return _interval(centre, half, "Welch's t on logarithms, separate runs")


def _interval(centre, half, method):
    return dict(
        ratio=math.exp(centre),
        low=None if half is None else math.exp(centre - half),
        high=None if half is None else math.exp(centre + half),
        method=method)
