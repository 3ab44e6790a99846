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


def cut_off(count):
    """Says how many averages the signed-rank interval leaves out per side.

    Of ``count`` differences that are symmetric about the truth each sign is a
    toss of a coin, so the chance that the truth lies among the outermost
    averages is a matter of counting: sets of ranks with a small sum.

    Args:
        count (int): differences, 5 or more: fewer cannot give 95 %.

    Returns:
        tuple[int, float]: averages left out at each end, and the coverage
        that this gives, the one nearest to 0.95 (0.938 to 0.954).
    """
    if count > 25:  # the sum of ranks is normal by now
        centre = count * (count + 1) / 4
        spread = math.sqrt(centre * (2 * count + 1) / 6)
        return int(centre - 1.96 * spread), 0.95
    ways = [1] + [0] * (count * (count + 1) // 2)
    for rank in range(1, count + 1):
        for total in range(len(ways) - 1, rank - 1, -1):
            ways[total] += ways[total - rank]
    best, below = None, 0
    for total, way in enumerate(ways):
        below += way
        coverage = 1 - 2 * below / 2**count
        if best is None or abs(coverage - .95) < abs(best[1] - .95):
            best = total, coverage
    return best


def paired_ratio(values, base):
    """Estimates a ratio from blocks in which both models took turns.

    Each block gives the logarithm of one ratio. A drift that is straight
    within a block cancels in it; what is left changes its sign with the
    order, which is random. So the logarithms lie symmetrically about the
    truth, whatever their distribution, and from 5 blocks on the interval is
    that of Wilcoxon's signed ranks (the averages of all pairs, the outermost
    left out), the estimate that of Hodges and Lehmann (their median). It
    neither trusts in a normal distribution nor follows outliers. With 2 to 4
    blocks, too few for that, it is Student's t.

    Args:
        values, base (list[float]): positive, of equal length, one per block.

    Returns:
        dict: ``ratio``, ``low``, ``high`` (95 %; None for a single block),
        ``method``.
    """
    logs = [math.log(v / b) for v, b in zip(values, base)]
    count = len(logs)
    if count < 5:
        half = None
        if count > 1:
            half = student_t95(count - 1) * deviation(logs) / math.sqrt(count)
        return _interval(mean(logs), half, half,
                         "Student's t on log ratios of %d block(s)" % count)
    averages = sorted((logs[i] + logs[j]) / 2 for i in range(count)
                      for j in range(i, count))
    centre, skip = quantile(averages, .5), cut_off(count)[0]
    return _interval(centre, centre - averages[skip],
                     averages[-1 - skip] - centre,
                     'signed ranks of log ratios of %d blocks' % count)


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
    return _interval(centre, half, half,
                     "Welch's t on logarithms, separate runs")


# How exact logarithms and sums of them are: no interval is narrower.
_ROUNDING = 1e-12


def _interval(centre, below, above, method):
    known = below is not None
    return dict(
        ratio=math.exp(centre),
        low=math.exp(centre - below - _ROUNDING) if known else None,
        high=math.exp(centre + above + _ROUNDING) if known else None,
        method=method)
