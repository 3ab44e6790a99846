# Copyright (c) mmbasis authors. All rights reserved.
"""``trtexec``, NVIDIA's own benchmark, where TensorRT's Python is missing.

It times itself. Its engine is built once and kept; every window is a process
of its own, whose loading and warm-up lie before the timed part. The timed part
ends when the first line after it is printed, and its length is printed, so the
window is known to about the time a line needs to arrive.
"""
import json
import os
import re
import subprocess
import tempfile

from .backends import Session
from .inputs import resolve_shape
from .trt_build import cache_path
from .trtexec_report import parse_report
from .util import BenchError, find_tool, now, run_tool

# The first line after the timed part: 7, 8.0 to 8.6, 10.
_FINISHED = re.compile(r'Host Latency|=== Trace details|Trace averages of|'
                       r'=== Performance summary|Average on \d+ runs')
_BATCH_LINE = re.compile(r'Input binding for (\S+) with dimensions (\S+) is')


class TrtexecSession(Session):
    """An engine file and the command that times it."""

    def __init__(self, command, flags, inputs, info):
        super().__init__(inputs, info)
        self._command, self._flags = command, flags

    def warm_up(self, min_seconds=1.0, max_seconds=60.0):
        """Runs once; whether it has settled shows between windows."""
        window = self.window(min_seconds, 10)
        return dict(
            settled=True,
            seconds=window['end'] - window['start'],
            count=window['count'],
            median_ms=window['latency_ms']['p50'])

    def infer(self):
        """Not possible: a process of trtexec runs many inferences."""
        raise BenchError('trtexec cannot run a single inference')

    def window(self, min_seconds, min_count):
        """Runs one process; see ``Session.window``."""
        handle, times = tempfile.mkstemp(suffix='.json')
        os.close(handle)
        try:
            command = self._command + [
                '--duration={}'.format(int(min_seconds + 0.999)),
                '--iterations={}'.format(min_count),
                '--warmUp=500',
            ]
            if '--exportTimes' in self._flags:
                command.append('--exportTimes=' + times)
            end, text = _run(command)
            return _window(end, text, _latencies(times))
        finally:
            os.remove(times)


def _run(command):
    """Returns when the timed part ended, and all output."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    lines, end = [], None
    try:
        for raw in process.stdout:
            lines.append(raw.decode('utf-8', 'replace'))
            if end is None and _FINISHED.search(lines[-1]):
                end = now()
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    text = ''.join(lines)
    if status != 0:
        raise BenchError('trtexec failed (status {}): {}'.format(
            status, _errors(text)))
    return end or now(), text


def _errors(text):
    lines = text.strip().splitlines()
    return '\n'.join([n for n in lines if '[E]' in n][-5:] or lines[-5:])


def _latencies(path):
    """Returns latencies in s from ``--exportTimes``, or None."""
    try:
        with open(path) as f:
            records = json.load(f)
        return [r['latencyMs'] * 1e-3 for r in records] or None
    except (ValueError, KeyError, TypeError):
        return None


def _window(end, text, latencies):
    report = parse_report(text)
    notes = report['warnings'] + [
        'window located by the output of trtexec, to some ms'
    ]
    summary = report['latency_ms']
    return dict(
        start=end - report['walltime_s'],
        end=end,
        latencies=latencies,
        latency_ms={
            'mean': summary.get('mean', summary.get('median')),
            'p50': summary['median'],
            'p90': summary.get('p90'),
            'p99': summary.get('p99'),
            'min': summary.get('min'),
            'max': summary.get('max'),
            'std': None
        },
        count=report['executions']
        or int(round(report['executions_per_s'] * report['walltime_s'])),
        notes=notes)


def _engine_name(tool, path, options):
    """The cache's name; trtexec's own hash stands for its version."""

    class Version:
        __version__ = 'trtexec of {} bytes'.format(os.path.getsize(tool))

    return cache_path(Version, path, options)


def load(path, options):
    """Builds (or finds) the engine and reads its input shapes.

    Args:
        path (str): ``.onnx`` or an engine.
        options (Options): see there; ``images`` is not supported.

    Raises:
        BenchError: trtexec failed; its error lines are given.
    """
    tool = find_tool('trtexec', options.sysroot)
    if options.images:
        raise BenchError('trtexec cannot read a folder of images; leave out '
                         '--images or use another back end')
    flags = run_tool([tool, '--help'])[1]
    common = [
        '--{}={}'.format(
            'staticPlugins' if '--staticPlugins' in flags else 'plugins',
            os.path.abspath(p)) for p in options.plugins
    ]
    # A nameless shape is not handed over, but must be that of the engine.
    named = sorted((k, v) for k, v in options.shapes.items() if k)
    shapes = ['--shapes=' + ','.join(
        '{}:{}'.format(k, 'x'.join(map(str, v))) for k, v in named)] \
        if named else []
    engine = path
    if path.lower().endswith('.onnx'):
        engine = _engine_name(tool, path, options)
        if not os.path.exists(engine):
            _build([tool, '--onnx=' + path] + common + shapes, flags, engine,
                   options)
    built = _run(
        [tool, '--loadEngine=' + engine, '--iterations=1', '--duration=0'] +
        common + shapes)[1]
    # Transfers are done one after another with computing, as elsewhere.
    serial = ['--exposeDMA'] if '--exposeDMA' in flags else []
    command = [tool, '--loadEngine=' + engine] + common + shapes + serial
    inputs = _inputs(built, options)
    version = re.search(r'TensorRT v(\d+)', built)
    info = dict(
        version=version.group(1) if version else None,
        engine=engine,
        plugins=options.plugins)
    return TrtexecSession(command, flags, inputs, info)


def _build(command, flags, engine, options):
    os.makedirs(os.path.dirname(engine) or '.', exist_ok=True)
    temp = '{}.{}.tmp'.format(engine, os.getpid())
    size = str(options.workspace_mib)
    command = command + [
        '--saveEngine=' + temp, '--memPoolSize=workspace:' +
        size if '--memPoolSize' in flags else '--workspace=' + size
    ]
    # --buildOnly came with 8.0, --skipInference replaced it in 10.
    command += [f for f in ('--skipInference', '--buildOnly')
                if f in flags][:1]
    if options.precision != 'fp32':
        command.append('--fp16')
    if options.precision == 'int8':
        command.append('--int8')
    _run(command)
    os.replace(temp, engine)


def _inputs(text, options):
    """Returns input shapes from the output, or from the options."""
    found = {}
    for name, sizes in _BATCH_LINE.findall(text):
        declared = [int(s) for s in sizes.split('x')]
        found[name] = resolve_shape(name, declared, options.shapes)
    found = found or dict(options.shapes)
    if not found:
        raise BenchError('this trtexec does not print the shapes of the '
                         'inputs: give --input-shape NAME:1x3x224x224')
    return found
