# Copyright (c) mmbasis authors. All rights reserved.
"""Reads the power source in a process of its own.

A thread would share the interpreter with the loop that is timed. The process
is this file, started as a program; it writes lines to a file (or any text
stream) and ends when its standard input closes, so it cannot outlive the
benchmark, however that ends.

Lines: ``H json`` (head: rails, total, kind), ``S stamp values`` (a reading),
``W stamp json`` (watched clock files), ``E stamp text`` (a failed reading),
``L json`` (last: its own load). Stamps are s of CLOCK_MONOTONIC.
"""
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

if __name__ == '__main__':  # started as a program: find the package
    sys.path.insert(
        0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jetson.energy import Trace  # noqa: E402
from jetson.sources import SourceEnded, open_source, patience  # noqa: E402
from jetson.util import (  # noqa: E402
    BenchError,
    now,
    read_int,
    wait_until,
)

# Clocks change seldom; reading them with every sample would only cost time.
_WATCH_EVERY_S = 0.25


class Sampler:
    """Starts, reads and ends the sampling process.

    Args:
        spec (str): a text for ``sources.open_source``.
        sysroot (str): root of the system.
        interval_s (float): time between readings.
        watch (dict[str, str]): name -> file with an integer, such as the
            present clock of the GPU.

    Raises:
        BenchError: from :meth:`start`, if the source does not open.
    """

    def __init__(self, spec, sysroot='/', interval_s=0.1, watch=None):
        self.interval_s = interval_s
        self._job = dict(
            spec=spec,
            sysroot=sysroot,
            interval_s=interval_s,
            watch=watch or {})
        self._process = None
        self._file = None
        self._read_to = 0
        self._found = dict(
            head=None, trace=None, watched=[], errors=[], load=None)
        self.head = None

    def start(self):
        """Starts the process and waits for its first line."""
        # Without a name, so that nothing stays behind, whatever happens.
        self._file = tempfile.TemporaryFile(  # noqa: SIM115
            prefix='jetson_power_')
        self._process = subprocess.Popen(
            [sys.executable,
             os.path.abspath(__file__),
             json.dumps(self._job)],
            stdin=subprocess.PIPE,
            stdout=self._file,
            stderr=subprocess.PIPE,
            # Ctrl-C reaches the whole group; it must not end the sampler
            # before the benchmark has read it.
            start_new_session=True)
        limit = now() + 20
        while self.head is None:
            if self._process.poll() is not None or now() > limit:
                text = self._process.stderr.read() if \
                    self._process.poll() is not None else b'no answer'
                self.stop()
                raise BenchError('the power sampler did not start: ' +
                                 text.decode('utf-8', 'replace').strip())
            wait_until(now() + 0.02)
            self.head = self.read()['head']
        self.interval_s = self.head['interval_s']
        return self

    def read(self):
        """Returns all that was recorded so far.

        Returns:
            dict: ``head``; ``trace`` (:class:`energy.Trace` or None);
            ``watched`` (list of (stamp, dict)); ``errors`` (list of (stamp,
            text)); ``load`` (dict of the last line, or None); ``alive``.
        """
        alive = self.alive()  # asked first: what it wrote last is not missed
        # The position in the file belongs to the writer: pread leaves it.
        handle = self._file.fileno()
        size = os.fstat(handle).st_size - self._read_to
        data = os.pread(handle, size, self._read_to)
        data = data[:data.rfind(b'\n') + 1]  # the last may be half written
        self._read_to += len(data)
        for line in data.decode().splitlines():
            _take(line, self._found)
        return dict(self._found, alive=alive)

    def alive(self):
        """Tells whether the process runs."""
        return self._process is not None and self._process.poll() is None

    def stop(self):
        """Ends the process; returns :meth:`read` with its own load."""
        if self._process is not None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=5 + patience(self.interval_s))
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stderr.close()
        result = self.read() if self._file else None
        if self._file:
            self._file.close()
            self._file = None
        return result


def _take(line, result):
    """Puts one line of the process into the result of ``read``."""
    tag, _, rest = line.partition(' ')
    if tag == 'S' and result['trace'] is not None:
        numbers = [float(v) for v in rest.split()]
        result['trace'].add(numbers[0], numbers[1:])
    elif tag == 'H':
        head = result['head'] = json.loads(rest)
        result['trace'] = Trace(head['rails'], head['total'], head['kind'])
    elif tag == 'W':
        stamp, _, text = rest.partition(' ')
        result['watched'].append((float(stamp), json.loads(text)))
    elif tag == 'E':
        stamp, _, text = rest.partition(' ')
        result['errors'].append((float(stamp), text))
    elif tag == 'L':
        result['load'] = json.loads(rest)


def _head(source, job):
    return dict(
        rails=source.rails,
        total=source.total,
        why=source.why,
        kind=source.kind,
        interval_s=getattr(source, 'interval_s', job['interval_s']),
        scope=source.scope)


def sample(job, out, stopped):
    """Reads a source until told to stop: the body of the process.

    Args:
        job (dict): ``spec``, ``sysroot``, ``interval_s``, ``watch``.
        out (file): receives the lines.
        stopped (callable): returns True when it is time to end.
    """
    source = open_source(job['spec'], job['sysroot'], job['interval_s'])
    out.write('H {}\n'.format(json.dumps(_head(source, job))))
    out.flush()
    start, due, next_watch, count = now(), now(), now(), 0
    cpu = time.process_time()
    try:
        while not stopped():
            try:
                stamp, values = source.read()
                out.write('S {:.6f} {}\n'.format(
                    stamp, ' '.join('%.6f' % v for v in values)))
                count += 1
            except SourceEnded as e:
                out.write('E {:.6f} {}\n'.format(now(), e))
                break
            except (OSError, ValueError, BenchError) as e:
                # A rail may vanish for a moment; the gap is reported.
                out.write('E {:.6f} {}\n'.format(now(), e))
            if job['watch'] and now() >= next_watch:
                seen = {k: read_int(p) for k, p in job['watch'].items()}
                out.write('W {:.6f} {}\n'.format(now(), json.dumps(seen)))
                next_watch = now() + _WATCH_EVERY_S
            out.flush()
            if not source.paced:
                # Late readings are skipped, not made up for in a burst.
                due = max(due + job['interval_s'], now())
                wait_until(due)
    finally:
        source.close()
        out.write('L {}\n'.format(
            json.dumps(
                dict(
                    readings=count,
                    seconds=now() - start,
                    cpu_s=time.process_time() - cpu))))
        out.flush()


def main():
    """Runs as a process: the job is the only argument."""
    ended = threading.Event()

    def wait_for_end():
        # Not sys.stdin: its lock would be held while the process ends.
        os.read(0, 1)
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    try:
        sample(json.loads(sys.argv[1]), sys.stdout, ended.is_set)
    except BenchError as e:
        sys.exit(str(e))


if __name__ == '__main__':
    main()
