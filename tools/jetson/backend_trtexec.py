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
from .trtexec_report import parse_inputs, parse_report, parse_version
from .util import (
    BenchError,
    end_process,
    find_tool,
    now,
    read_json,
    run_tool,
)

# The first line after the timed part. "Warmup completed" is printed with the
# report, after all queries; the others are there without it.
_FINISHED = re.compile(r'Warmup completed|Timing trace has|Host Latency|'
                       r'=== Trace details|Trace averages of|'
                       r'=== Performance summary|Average on \d+ runs')


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

    def trial(self):
        """Loading has run it."""

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
            return _window(end, parse_report(text), times)
        finally:
            os.remove(times)

    def layers(self, count):
        """Times the layers; see ``Session.layers``."""
        handle, path = tempfile.mkstemp(suffix='.json')
        os.close(handle)
        try:
            _run(self._command + [
                '--iterations={}'.format(count), '--duration=0',
                '--exportProfile=' + path
            ])
            # The first record is the number of inferences.
            return [
                dict(name=r['name'], ms=r['averageMs'])
                for r in read_json(path, 'profile of trtexec')[1:]
            ]
        except (KeyError, TypeError) as e:
            raise BenchError('trtexec wrote another profile than expected '
                             '({}: {})'.format(type(e).__name__, e)) from e
        finally:
            os.remove(path)


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
        end_process(process)
        process.stdout.close()
    text = ''.join(lines)
    if status != 0 or '&&&& FAILED' in text:
        raise BenchError('trtexec failed (status {}): {}'.format(
            status, _errors(text)))
    return end or now(), text


def _errors(text):
    lines = text.strip().splitlines()
    return '\n'.join([n for n in lines if '[E]' in n][-5:] or lines[-5:])


def _latencies(path, count):
    """Returns latencies in s from ``--exportTimes``, or None.

    TensorRT before 8.5 writes the warm-up, too: the last ``count`` are those
    of the timed part.
    """
    try:
        with open(path) as f:
            records = json.load(f)
        return [r['latencyMs'] * 1e-3 for r in records][-count:] or None
    except (ValueError, KeyError, TypeError):
        return None


def _window(end, report, times):
    notes = report['warnings'] + [
        'window located by the output of trtexec, to some ms'
    ]
    count = report['executions'] or int(
        round(report['executions_per_s'] * report['walltime_s']))
    latencies = _latencies(times, count)
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
        count=count,
        notes=notes)


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
        '{}:{}'.format(_quoted(k), 'x'.join(map(str, v)))
        for k, v in named)] if named else []
    # A DLA engine must be loaded to its core, too.
    common += ['--useDLACore={}'.format(options.dla), '--allowGPUFallback'] \
        if options.dla is not None else []
    engine, precision = path, options.precision_of(path)
    if path.lower().endswith('.onnx'):
        # trtexec's own size stands for its version.
        engine = cache_path('trtexec of %d bytes' % os.path.getsize(tool),
                            path, options, precision)
        if not os.path.exists(engine):
            _build([tool, '--onnx=' + path] + common + shapes, flags, engine,
                   options, precision)
    load = [tool, '--loadEngine=' + engine] + common + shapes
    built = _run(load + ['--iterations=1', '--duration=0'])[1]
    info = dict(
        version=parse_version(built),
        precision=precision,
        engine=engine,
        plugins=options.plugins,
        **options.engine_settings())
    return TrtexecSession(load + _running(flags, options), flags,
                          _inputs(built, options), info)


def _running(flags, options):
    """Returns the arguments of a timed run."""
    # Transfers are done one after another with computing, as elsewhere.
    wanted = ['--exposeDMA'] if '--exposeDMA' in flags else []
    if options.cuda_graph:
        wanted.append('--useCudaGraph')
    if options.streams > 1:
        # --streams until 8.6
        name = '--infStreams' if '--infStreams' in flags else '--streams'
        wanted.append('{}={}'.format(name, options.streams))
    return wanted


def _build(command, flags, engine, options, precision):
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
    if options.timing_cache:
        command.append('--timingCacheFile=' + options.timing_cache)
    text = _run(command + _typing(flags, options, precision))[1]
    if not os.path.exists(temp):
        raise BenchError('trtexec wrote no engine and told no error: ' +
                         _errors(text))
    os.replace(temp, engine)


def _typing(flags, options, precision):
    """Returns the arguments for a precision."""
    if precision == 'fp32':
        return []
    if options.precision is None and '--stronglyTyped' in flags:
        return ['--stronglyTyped']  # the file alone decides
    wanted = ['--fp16', '--int8'] if precision == 'int8' else \
        ['--' + precision]
    missing = [f for f in wanted if f not in flags]
    if missing and options.precision is not None:
        raise BenchError('this trtexec has no {}, it takes the precision from '
                         'the file: export the model in {} and leave out '
                         '--precision'.format(missing[0], precision))
    return [f for f in wanted if f in flags]


def _quoted(name):
    # trtexec splits its list at these; since 8.0 a name may be quoted.
    return "'{}'".format(name) if set(name) & set(':,') else name


def _inputs(text, options):
    """Returns input shapes from the output, or from the options."""
    printed, overridden = parse_inputs(text)
    for name, sizes in overridden.items():
        # An open batch becomes 1 with every back end; trtexec makes 1 of all.
        if '' in options.shapes or 1 in sizes[1:]:
            raise BenchError(
                'input {0} has open sizes, of which trtexec makes {1}: give '
                '--input-shape {0}:1x3x224x224, with this name'.format(
                    name, 'x'.join(map(str, sizes))))
    found = {
        name: resolve_shape(name, sizes, options.shapes)
        for name, sizes in printed.items()
    } or dict(options.shapes)
    if not found:
        raise BenchError('this trtexec does not print the shapes of the '
                         'inputs: give --input-shape NAME:1x3x224x224')
    return found
