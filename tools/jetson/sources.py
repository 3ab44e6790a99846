# Copyright (c) mmbasis authors. All rights reserved.
"""Sources of power readings, each made from a short text such as ``sysfs``.

A source has ``rails`` (names), ``total`` (names to add, or None) and
``why`` (the reason), ``kind`` (``'power'``: readings in W; ``'energy'``:
counters in J that only grow), ``paced`` (True if ``read()`` waits for the next
reading by itself) and ``read()``, which returns (time stamp, values). Time
stamps are seconds of CLOCK_MONOTONIC. ``scope`` says what the
total covers and what it leaves out.
"""
import ctypes
import glob
import os
import re
import select
import signal
import subprocess

from . import nvml
from .rails import choose_total, find_rails, scope
from .tegrastats import parse_line, read_log
from .util import (
    BenchError,
    check_number,
    end_process,
    find_tool,
    now,
    read_int,
    read_text,
    under,
    wait_until,
)


class SourceEnded(Exception):
    """The source has nothing more to tell."""


class SysfsSource:
    """Power monitors through sysfs: the present value of every rail."""
    paced = False
    kind = 'power'

    def __init__(self, sysroot='/'):
        found = find_rails(sysroot)
        if not found:
            raise BenchError(
                'no INA3221 under {}: not a Jetson, or its driver is not '
                'loaded'.format(under(sysroot, 'sys/bus/i2c/drivers')))
        self._rails = found
        self.rails = [r.name for r in found]
        for rail in found:
            try:
                rail.read()
            except (OSError, ValueError) as e:
                raise BenchError(
                    'rail {} cannot be read: {}. On some systems only root '
                    'may: try sudo'.format(rail.name, e)) from e
        self.total, self.why = choose_total(self.rails)
        self.scope = scope(self.total)

    def read(self):
        """Returns the time in the middle of the reading, and W per rail."""
        start = now()
        values = [r.read() for r in self._rails]
        return (start + now()) / 2, values

    def close(self):
        """Nothing is held open."""


class TegrastatsSource:
    """A running ``tegrastats``; for systems without readable sysfs files.

    It may print nothing, stall, or ignore SIGTERM: no call waits for it
    without a limit, and it never outlives the reader.

    Args:
        sysroot (str): root of the system.
        interval_s (float): time between its lines.
    """
    paced = True
    kind = 'power'

    def __init__(self, sysroot='/', interval_s=0.1):
        tool = find_tool('tegrastats', sysroot)
        if tool is None:
            raise BenchError('tegrastats is not installed here')
        self._patience = patience(interval_s)
        self._process = subprocess.Popen(
            [tool, '--interval',
             str(max(1, int(interval_s * 1000)))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            preexec_fn=_end_with_parent)
        self._text = b''
        try:
            self.rails = list(self._next(4 + self._patience)[1])
            if not self.rails:
                raise BenchError('tegrastats shows no power rail on this '
                                 'system; older releases show them only to '
                                 'root')
        except (SourceEnded, ValueError) as e:
            self.close()
            raise BenchError('{}: {}; try it by hand, perhaps with '
                             'sudo'.format(tool, e)) from None
        except BaseException:
            self.close()
            raise
        self.total, self.why = choose_total(self.rails)
        self.scope = scope(self.total)

    def _next(self, seconds):
        limit = now() + seconds
        while True:
            line, end, rest = self._text.partition(b'\n')
            if not end:
                self._fill(limit, seconds)
                continue
            self._text = rest
            try:
                record = parse_line(line.decode('utf-8', 'replace'))
            except BenchError:
                if now() > limit:
                    raise ValueError(
                        'tegrastats prints something else: {!r}'.format(
                            line[:80])) from None
                continue
            return now(), {k: v * 1e-3 for k, v in record['power_mw'].items()}

    def _fill(self, limit, seconds):
        pipe = self._process.stdout
        if not select.select([pipe], [], [], max(0, limit - now()))[0]:
            raise ValueError(
                'tegrastats printed no line in {:.1f} s'.format(seconds))
        text = os.read(pipe.fileno(), 1 << 16)
        if not text:
            raise SourceEnded('tegrastats ended')
        # Without an end of line it is no tegrastats: keep memory bounded.
        self._text = (self._text + text)[-1 << 20:]

    def read(self):
        """Waits for the next line; returns its arrival, and W per rail.

        Raises:
            ValueError: no line came in time, or a rail is not in it.
        """
        stamp, power = self._next(self._patience)
        try:
            return stamp, [power[r] for r in self.rails]
        except KeyError as e:
            raise ValueError(
                'tegrastats no longer shows rail {}'.format(e)) from e

    def close(self):
        """Ends tegrastats, by force if need be."""
        end_process(self._process, 1)
        self._process.stdout.close()


def patience(interval_s):
    """Returns how long a reading may take before it counts as failed, s."""
    return max(1.0, 3 * interval_s)


_libc = ctypes.CDLL(None)  # before forking: loading takes locks


def _end_with_parent():
    # PR_SET_PDEATHSIG of Linux: it ends with a reader that is killed, too.
    _libc.prctl(1, signal.SIGKILL)


class ReplaySource:
    """A recorded tegrastats log, one line every ``period_s`` from the start.

    The time stamps are those of the recording, not of the reader, so that what
    is replayed is exactly what was recorded.
    """
    paced = True
    kind = 'power'

    def __init__(self, path, period_s=1.0):
        check_number('power replay period', period_s, 1e-3, 3600)
        records = read_log(path)
        self.rails = list(records[0]['power_mw'])
        if not self.rails:
            raise BenchError('the first line of {} shows no power rail: '
                             'record it as root'.format(path))
        self.total, self.why = choose_total(self.rails)
        self.scope = scope(self.total) + \
            ' (recorded; the log says nothing about this machine)'
        self._lines = [[r['power_mw'].get(n) for n in self.rails]
                       for r in records]
        self.interval_s = period_s
        self._start = now()
        self._next = 0

    def read(self):
        """Returns the next line that is due, or waits for it."""
        if self._next >= len(self._lines):
            raise SourceEnded('the recorded log ended')
        stamp = self._start + self._next * self.interval_s
        values = self._lines[self._next]
        self._next += 1
        wait_until(stamp)
        if None in values:
            raise ValueError('a rail is missing in line {}'.format(self._next))
        return stamp, [v * 1e-3 for v in values]

    def close(self):
        """Nothing is held open."""


class RaplSource:
    """Energy counters of Intel and AMD processors (powercap)."""
    paced = False
    kind = 'energy'
    scope = ('power of the processor packages by RAPL; memory, disks, fans '
             'and the power supply are not measured')

    def __init__(self, sysroot='/'):
        base = under(sysroot, 'sys/class/powercap')
        self._counters = []
        self.rails = []
        for zone in sorted(glob.glob(os.path.join(base, 'intel-rapl:*'))):
            name = read_text(os.path.join(zone, 'name'))
            # intel-rapl:0 is a package; :0:0 (core) is a part of it; a psys
            # zone contains the packages.
            if os.path.basename(zone).count(':') > 1 or \
                    not (name or '').startswith('package'):
                continue
            path = os.path.join(zone, 'energy_uj')
            if read_int(path) is None:
                raise BenchError('{} is not readable; since 2020 only root '
                                 'may: try sudo'.format(path))
            limit = read_int(os.path.join(zone, 'max_energy_range_uj'))
            self._counters.append(Counter(path, limit or 1 << 32))
            self.rails.append(name)
        if not self.rails:
            raise BenchError('no RAPL packages under {}'.format(base))
        self.total, self.why = self.rails, 'all processor packages'

    def read(self):
        """Returns the time, and J per package since the first reading."""
        return now(), [c.read() for c in self._counters]

    def close(self):
        """Nothing is held open."""


class Counter:
    """A counter of microjoules that starts again at ``limit``."""

    def __init__(self, path, limit):
        self.path, self.limit = path, limit
        self.last, self.sum = None, 0

    def read(self):
        """Returns J since the first reading.

        Raises:
            OSError, ValueError: the counter cannot be read any more.
        """
        with open(self.path) as f:
            value = int(f.read())
        if self.last is not None:
            self.sum += (value - self.last) % self.limit
        self.last = value
        return self.sum * 1e-6


def open_source(spec, sysroot='/', interval_s=0.1):
    """Makes the source that a text describes.

    Args:
        spec (str): ``sysfs``, ``tegrastats``, ``nvml`` or ``nvml:INDEX``,
            ``rapl``, ``replay:FILE`` or ``replay:FILE:PERIOD_S``.
        sysroot (str): root of the system.
        interval_s (float): time between readings.

    Raises:
        BenchError: there is no such source here; the text says why.
    """
    name, colon, rest = spec.partition(':')
    if spec == 'sysfs':
        return SysfsSource(sysroot)
    if spec == 'tegrastats':
        return TegrastatsSource(sysroot, interval_s)
    if spec == 'rapl':
        return RaplSource(sysroot)
    if name == 'nvml':
        if colon and not re.match('[0-9]{1,4}$', rest):
            raise BenchError('--power nvml:{}: not the index of a GPU, such '
                             'as nvml:0'.format(rest))
        return nvml.NvmlSource(int(rest or 0))
    if name == 'replay':
        path, period = rest, 1.0
        if not os.path.exists(path) and ':' in rest:
            path, _, text = rest.rpartition(':')
            try:
                period = float(text)
            except ValueError:
                path = rest
        if not path:
            raise BenchError('--power {}: name the log, replay:FILE or '
                             'replay:FILE:PERIOD_S'.format(spec))
        return ReplaySource(path, period)
    raise BenchError(
        'unknown power source {!r}; known: auto, none, sysfs, '
        'tegrastats, nvml[:INDEX], rapl, replay:FILE[:PERIOD_S]'.format(spec))


def choose_source(spec, sysroot='/'):
    """Finds the best source that works.

    Args:
        spec (str): ``auto``, ``none`` or a text for :func:`open_source`.
        sysroot (str): root of the system; NVML is asked only on the real one.

    Returns:
        tuple[str | None, list[str]]: the text of a source that was opened
        and closed again, and why the better ones were passed over.

    Raises:
        BenchError: a source was asked for by name and does not work.
    """
    if spec == 'none':
        return None, ['power measurement was switched off']
    candidates = [spec]
    if spec == 'auto':
        candidates = ['sysfs', 'tegrastats']
        candidates += ['nvml', 'rapl'] if sysroot == '/' else ['rapl']
    reasons = []
    for candidate in candidates:
        try:
            open_source(candidate, sysroot).close()
            return candidate, reasons
        except BenchError as e:
            if spec != 'auto':
                raise
            reasons.append('{}: {}'.format(candidate, e))
    return None, reasons
