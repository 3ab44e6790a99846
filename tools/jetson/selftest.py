# Copyright (c) mmbasis authors. All rights reserved.
"""Checks the tool on this very device in a few seconds, without a model."""
import math
import os
import tempfile

from .energy import Trace, window_energy
from .sampler import Sampler
from .stats import latency_summary, paired_ratio
from .timing import timed_window
from .util import now, wait_until


def _energy():
    """A sine of known integral, read at uneven times."""
    trace = Trace(['a'], ['a'])
    t = 0.0
    while t < 12:
        trace.add(t, [10 + 4 * math.sin(t)])
        t += 0.05 + 0.02 * math.sin(37 * t)
    got = window_energy(trace, 1.03, 11.27, 0.05)['energy_j']['total']
    want = 10 * 10.24 - 4 * (math.cos(11.27) - math.cos(1.03))
    return abs(got / want - 1) < 1e-3, \
        'energy of a known curve: {:.3f} J, should be {:.3f} J'.format(
            got, want)


def _latency():
    """A loop that is busy for 5 ms."""

    def busy():
        end = now() + 5e-3
        while now() < end:
            pass

    start, end, latencies = timed_window(busy, 0.5, 20)
    p50 = latency_summary(latencies)['p50']
    exact = abs(sum(latencies) - (end - start)) < 1e-6
    return exact and abs(p50 / 5 - 1) < 0.02, \
        'latency of a 5 ms loop: median {:.3f} ms; latencies add up to the ' \
        'window: {}'.format(p50, exact)


def _ratio():
    """Drift that both models share must cancel."""
    base = [100.0, 98.0, 96.0, 94.0]
    got = paired_ratio([1.5 * b for b in base], base)
    exact = abs(got['ratio'] - 1.5) < 1e-9
    narrow = got['high'] - got['low'] < 1e-6
    return exact and narrow, \
        'ratio under drift: {ratio:.4f} [{low:.4f}, {high:.4f}]'.format(**got)


def _sampler():
    """The sampling process on a recorded log."""
    line = ('RAM 1/2MB CPU [1%@1] EMC_FREQ 0% GR3D_FREQ 9% GPU {0}/1 CPU 1000'
            '/1 SOC 1000/1 CV 0/0 VDDRQ 500/1 SYS5V 2500/1\n')
    handle, path = tempfile.mkstemp(suffix='.log')
    with os.fdopen(handle, 'w') as f:
        f.writelines(line.format(5000 + 20 * i) for i in range(100))
    try:
        sampler = Sampler('replay:{}:0.02'.format(path), '/', 0.02).start()
        wait_until(now() + 1)
        found = sampler.stop()
    finally:
        os.remove(path)
    times, watts = found['trace'].power_curve('GPU')
    slope = (watts[-1] - watts[0]) / (times[-1] - times[0])
    load = found['load']['cpu_s'] / found['load']['seconds']
    return abs(slope - 1) < 1e-3, \
        'sampling process: {} readings, slope {:.4f} W/s (should be 1), ' \
        'own load {:.2%} of a core'.format(len(times), slope, load)


def selftest():
    """Runs all checks.

    Returns:
        list[tuple[bool, str]]: passed, and what was found, per check.
    """
    return [check() for check in (_energy, _latency, _ratio, _sampler)]
