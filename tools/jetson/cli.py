# Copyright (c) mmbasis authors. All rights reserved.
"""The commands; see ``tools/jetson_bench.py --help``."""
import io
import json
import os
import signal
import sys
import time

from . import settings as device_settings
from .arguments import build_parser
from .backends import Options
from .compare import RESULT_NAME, compare, comparison_table, load_result
from .guard import Guard
from .inputs import parse_shapes
from .layers import measure_table
from .plateaus import compare_plateaus, find_plateaus
from .plot import draw
from .probe import probe, probe_text
from .protocol import Run, Settings
from .report import aligned, number, table, write_csv
from .selftest import selftest
from .sources import choose_source
from .tegrastats import read_log
from .util import (
    BenchError,
    Interrupted,
    check_number,
    interrupt,
    to_stderr,
    write_json,
)


def _options(args):
    return Options(
        precision=args.precision,
        shapes=parse_shapes(args.input_shape),
        images=args.images,
        plugins=args.plugins,
        cache=args.cache,
        threads=args.threads,
        dla=args.dla,
        cuda_graph=args.cuda_graph,
        streams=args.streams,
        timing_cache=args.timing_cache,
        workspace_mib=args.workspace_mib,
        sysroot=args.sysroot)


def _apply_settings(guard, args):
    if args.set_nvpmodel is not None:
        device_settings.set_mode(guard, args.set_nvpmodel, args.sysroot)
    if args.jetson_clocks:
        device_settings.lock_clocks(guard, args.sysroot)


def _models(args):
    models = []
    for text in args.model:
        name, _, path = text.rpartition('=')
        name = name or os.path.splitext(os.path.basename(path))[0]
        if name in [n for n, _ in models]:
            raise BenchError('two models are called {!r}: use --model '
                             'NAME=FILE'.format(name))
        models.append((name, path))
    baseline = args.baseline or models[0][0]
    if baseline not in [n for n, _ in models]:
        raise BenchError('--baseline {}: the models are {}'.format(
            baseline, ', '.join(n for n, _ in models)))
    for name, path in models:
        if not os.path.isfile(path):
            raise BenchError('model {}: no such file as {!r}'.format(
                name, path))
    return models, baseline


def run_command(args):
    """Measures; writes result.json, result.csv, power.png or .svg."""
    models, baseline = _models(args)
    names = vars(Settings())
    settings = Settings(**{k: getattr(args, k) for k in names})
    options = _options(args)
    power, passed_over = choose_source(args.power, args.sysroot)
    if power is None:
        to_stderr('no power: ' + '; '.join(passed_over))
    out = args.out or time.strftime('bench-%Y%m%d-%H%M%S')
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as e:
        raise BenchError('--out {}: {}; choose another folder'.format(
            out, e.strerror)) from e
    path = os.path.join(out, RESULT_NAME)
    if os.path.exists(path):
        raise BenchError(
            '{} exists already: choose another --out'.format(path))
    run = Run(models, baseline, args.backend, options, settings, power,
              path, args.sysroot, to_stderr)
    with Guard() as guard:
        guard.tell(result=path)
        _apply_settings(guard, args)
        try:
            run.execute()
        finally:
            print(table(run.result))
            to_stderr('result: ' + path)
    _write_extras(run, out, args.raw)
    wrong = [
        m['name'] for m in run.result['models']
        if m['check'] and not m['check']['agrees']
    ]
    if wrong:
        raise BenchError('the outputs of {} differ from ONNX Runtime: see the '
                         'flags above'.format(', '.join(wrong)))


def _write_extras(run, out, raw):
    write_csv(os.path.join(out, 'result.csv'), run.result)
    if raw:
        trace = run.trace
        write_json(
            os.path.join(out, 'raw.json'),
            dict(
                latencies_s=[
                    dict(model=m, repeat=r, values=v)
                    for (m, r), v in run.latencies.items()
                ],
                power=trace and dict(
                    rails=trace.rails,
                    kind=trace.kind,
                    times=trace.times,
                    values=trace.values)))
    if run.trace:
        try:
            draw(run.result, run.trace, os.path.join(out, 'power'))
        except BenchError as e:
            to_stderr('no plot: {}'.format(e))


def compare_command(args):
    """Compares result files."""
    results = [load_result(p) for p in args.results]
    labels = [
        os.path.basename(os.path.dirname(os.path.abspath(p)))
        if os.path.basename(p) == RESULT_NAME else os.path.splitext(
            os.path.basename(os.path.normpath(p)))[0] for p in args.results
    ]
    if len(set(labels)) < len(labels):
        labels = ['{}#{}'.format(n, i + 1) for i, n in enumerate(labels)]
    found = compare(results, labels, args.baseline)
    if args.json:
        write_json(args.json, found)
    print(comparison_table(found))


def layers_command(args):
    """Measures a latency table."""
    with Guard() as guard:
        _apply_settings(guard, args)
        found = measure_table(args.folder, args.out, args.backend,
                              _options(args), args.rounds, args.seconds,
                              args.min_count, args.max_wait, args.sysroot,
                              to_stderr)
    rows = [['id', 'median ms', 'noise ms']]
    rows += [[str(e['id']),
              number(e['median_ms']),
              number(e['noise_ms'])] for e in found['entries']]
    print(aligned(rows))
    for f in found['flags']:
        print('FLAG {code}: {text}'.format(**f))


def replay_command(args):
    """Finds and compares the busy stretches of a recorded log."""
    check_number('period', args.period, 1e-3, 3600)
    records = read_log(args.log)
    if len(records) < 3:
        raise BenchError('{} has {} line(s) of tegrastats: too few to find a '
                         'busy stretch'.format(args.log, len(records)))
    try:
        watts = [r['power_mw'][args.rail] * 1e-3 for r in records]
    except KeyError:
        raise BenchError(
            '{} has no rail {} in every line; the first has: {}'.format(
                args.log, args.rail, ', '.join(records[0]['power_mw'])
                or 'none')) from None
    times = [i * args.period for i in range(len(watts))]
    found = find_plateaus(times, watts)
    if not found:
        raise BenchError('no busy stretch of 5 s or more on rail {} (is '
                         '--period {:g} s right?)'.format(
                             args.rail, args.period))
    if found[0]['energy_j'] <= 0:
        raise BenchError('rail {} draws no power in its first busy '
                         'stretch'.format(args.rail))
    rows = [[
        'stretch', 'start s', 'seconds', 'mean W', 'J', 'speed-up', 'J ratio'
    ]]
    for i, p in enumerate(compare_plateaus(found)):
        rows.append([
            str(i + 1), '{:.1f}'.format(p['start']),
            '{:.1f}'.format(p['seconds']), '{:.2f}'.format(p['mean_w']),
            '{:.1f}'.format(p['energy_j']),
            '{speed_up:.2f} +- {speed_up_error:.2f}'.format(**p),
            '{:.2f}'.format(p['energy_ratio'])
        ])
    print(aligned(rows))


def probe_command(args):
    """Prints what is here."""
    found = probe(args.sysroot, args.power)
    print(json.dumps(found, indent=1) if args.json else probe_text(found))


def selftest_command(args):
    """Runs the checks; fails if one does."""
    results = selftest()
    for passed, text in results:
        print('{}  {}'.format('ok  ' if passed else 'FAIL', text))
    if not all(passed for passed, _ in results):
        raise BenchError('a check failed: close other programs and try '
                         'again; figures from this machine are not to be '
                         'trusted until it passes')


_COMMANDS = dict(
    probe=probe_command,
    run=run_command,
    compare=compare_command,
    layers=layers_command,
    replay=replay_command,
    selftest=selftest_command)

_SIGNALS = ('SIGINT', 'SIGTERM', 'SIGHUP')


def _interrupt(number, frame):
    # A second signal must not cut short what the first one cleans up.
    for name in _SIGNALS:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    interrupt(signal.Signals(number).name)


def main(argv=None):
    """Runs the program; returns its exit status.

    Args:
        argv (list[str] | None): arguments; those of the process by default.

    Returns:
        int: 0; 1 for an error; 130 if interrupted.
    """
    _lenient_output()
    args = build_parser().parse_args(argv)
    for name in _SIGNALS:
        signal.signal(getattr(signal, name), _interrupt)
    try:
        _COMMANDS[args.command](args)
    except Interrupted as e:
        to_stderr('{}; what was finished is kept'.format(e))
        return 130
    except BenchError as e:
        to_stderr('error: {}'.format(e))
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # `| head` has gone: nothing to tell anyone
        return 1
    except (OSError, MemoryError) as e:  # a full disk, a missing right
        to_stderr('error: {}'.format(e if str(e) else 'out of memory'))
        return 1
    return 0


def _lenient_output():
    """A name that the terminal cannot show must not end a run (LANG=C)."""
    for name in ('stdout', 'stderr'):
        stream = getattr(sys, name)
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')
        elif stream is not None:  # Python 3.6; None where it is closed
            encoding = stream.encoding
            setattr(
                sys, name,
                io.TextIOWrapper(
                    stream.detach(),
                    encoding,
                    'backslashreplace',
                    line_buffering=True))
