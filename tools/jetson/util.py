# Copyright (c) mmbasis authors. All rights reserved.
"""Small things that every part needs: errors, files, clock, progress."""
import contextlib
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import time

# CLOCK_MONOTONIC, the clock of the sampler too: the same in all processes.
now = time.monotonic


def wait_until(stamp):
    """Sleeps until a time of CLOCK_MONOTONIC, in s; not busily."""
    left = stamp - now()
    if left > 0:
        time.sleep(left)


class BenchError(Exception):
    """A failure that the user can act on; its text says how."""


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; no ``except Exception`` may swallow it."""


_signals = dict(held=0, pending=None)


def interrupt(name):
    """Raises :class:`Interrupted`, now or at the end of a held part.

    Args:
        name (str): of the signal.
    """
    if _signals['held']:
        _signals['pending'] = name
    else:
        raise Interrupted('stopped by {}'.format(name))


@contextlib.contextmanager
def holding_signals():
    """Holds interrupts back for a short while.

    For importing large packages: their C code swallows exceptions or turns
    them into others.
    """
    _signals['held'] += 1
    try:
        yield
    finally:
        _signals['held'] -= 1
        if _signals['pending'] and not _signals['held']:
            name, _signals['pending'] = _signals['pending'], None
            interrupt(name)


def check_number(name, value, low, high, whole=False):
    """Refuses a number that makes no sense.

    Args:
        name (str): of the argument, such as ``'min_seconds'``.
        value (int | float): what was given.
        low, high (float): the range, both ends included.
        whole (bool): it must be an integer.

    Returns:
        int | float: the value.

    Raises:
        BenchError: not a number (NaN either), or out of range.
    """
    good = isinstance(value, int if whole else (int, float)) and \
        not isinstance(value, bool) and math.isfinite(value) and \
        low <= value <= high
    if not good:
        raise BenchError('--{} {}: expected a {}number from {:g} to '
                         '{:g}'.format(
                             name.replace('_', '-'), value,
                             'whole ' if whole else '', low, high))
    return value


def read_text(path):
    """Returns the stripped text of a small file, or None if unreadable.

    Args:
        path (str): file; sysfs and device-tree files may end in a NUL byte.
    """
    try:
        with open(path, 'rb') as f:
            return f.read().decode('utf-8', 'replace').strip('\0 \n\t')
    except OSError:
        return None


def read_int(path):
    """Returns the integer that a file holds, or None."""
    try:
        return int(read_text(path))
    except (TypeError, ValueError):
        return None


def under(sysroot, *parts):
    """Joins an absolute path to the root of the (real or fake) system."""
    return os.path.join(sysroot, *[p.lstrip('/') for p in parts])


def write_bytes(path, data):
    """Writes a file so that a reader never sees half of it.

    Args:
        path (str): where to write; its folder must exist.
        data (bytes): the whole content.

    Raises:
        BenchError: it cannot be written.
    """
    temp = '{}.{}.tmp'.format(path, os.getpid())
    try:
        with open(temp, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temp, path)
    except OSError as e:
        raise BenchError('cannot write {}: {}'.format(path,
                                                      e.strerror)) from e
    finally:
        if os.path.exists(temp):
            os.remove(temp)


def write_atomic(path, text):
    """Writes a text as :func:`write_bytes` does."""
    write_bytes(path, text.encode('utf-8', 'backslashreplace'))


def write_json(path, value):
    """Writes a value as JSON, atomically; NaN and infinity are refused."""
    text = json.dumps(value, indent=1, sort_keys=False, allow_nan=False)
    write_atomic(path, text + '\n')


def read_json(path, what):
    """Reads a JSON file.

    Args:
        path (str): file.
        what (str): what it should be, for the message.

    Raises:
        BenchError: the file is missing or is not JSON.
    """
    try:
        with open(path, encoding='utf-8') as f:
            return json.load(f)
    except OSError as e:
        raise BenchError('cannot read {} {}: {}'.format(
            what, path, e.strerror)) from e
    except (ValueError, RecursionError) as e:
        raise BenchError('{} is not a {}: {}'.format(path, what, e)) from e


def sha256(path):
    """Returns the SHA-256 of a file as hex digits.

    Raises:
        BenchError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as f:
            for block in iter(lambda: f.read(1 << 20), b''):
                digest.update(block)
    except OSError as e:
        raise BenchError('cannot read {}: {}'.format(path, e.strerror)) from e
    return digest.hexdigest()


def find_tool(name, sysroot='/'):
    """Returns the path of a system program, or None.

    Under a fake root only that root is searched, so that a test can never
    change the machine it runs on.
    """
    places = ['usr/sbin', 'usr/bin', 'usr/src/tensorrt/bin']
    for place in places:
        path = under(sysroot, place, name)
        if os.access(path, os.X_OK):
            return path
    return shutil.which(name) if sysroot == '/' else None


def run_tool(command, timeout=60):
    """Runs a program with no input and returns (exit status, all output).

    Args:
        command (list[str]): program and arguments.
        timeout (float): seconds.

    Returns:
        tuple[int, str]: status and text; a program that cannot be started or
        does not end in time gives status -1 and the reason.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout)
    except subprocess.TimeoutExpired:
        return -1, 'no answer within {:g} s'.format(timeout)
    except OSError as e:
        return -1, str(e)
    return done.returncode, done.stdout.decode('utf-8', 'replace')


def end_process(process, patience=3):
    """Ends a process for certain: SIGTERM, then SIGKILL.

    Args:
        process (subprocess.Popen): may have ended already.
        patience (float): s that it has for an orderly end.
    """
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def duration_text(seconds):
    """Returns seconds for people, such as ``'2 min 05 s'``."""
    seconds = int(round(max(0, seconds)))
    if seconds < 60:
        return '{} s'.format(seconds)
    if seconds < 3600:
        return '{} min {:02d} s'.format(seconds // 60, seconds % 60)
    return '{} h {:02d} min'.format(seconds // 3600, seconds % 3600 // 60)


class Progress:
    """Tells a listener what is going on and how long it will take.

    Args:
        total_seconds (float | None): expected length of all steps, if known.
        listener (callable): receives one line of text per step.
    """

    def __init__(self, total_seconds=None, listener=None):
        self.remaining = total_seconds
        self.listener = listener or (lambda line: None)

    def step(self, text, seconds=0):
        """Announces a step that is expected to take ``seconds``."""
        left = ''
        if self.remaining is not None:
            left = '  [about {} left]'.format(duration_text(self.remaining))
            self.remaining = max(0, self.remaining - seconds)
        self.listener(text + left)


def to_stderr(line):
    """The command line's listener; results alone go to stdout."""
    sys.stderr.write(line + '\n')
    sys.stderr.flush()
