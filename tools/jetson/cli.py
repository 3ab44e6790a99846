# Copyright (c) mmbasis authors. All rights reserved.
"""The command line; see ``tools/jetson_bench.py --help``."""
import argparse
import json
import os
import signal
import sys
import time

from . import settings as device_settings
from .backends import NAMES, PRECISIONS, Options
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
from .util import BenchError, Interrupted, interrupt, to_stderr, write_json

_EXAMPLES = """examples:
  what is here, what is missing:
    sudo python3 jetson_bench.py probe
  dense against compressed, fp16, fixed clocks (restored afterwards):
    sudo python3 jetson_bench.py run --model dense=dense.onnx \\
        --model basis=basis.onnx --baseline dense --precision fp16 \\
        --jetson-clocks --out bench-fp16
  two runs of other days or modes:
    python3 jetson_bench.py compare bench-fp16 bench-fp32
  latency table for planning:
    sudo python3 jetson_bench.py layers layers/ --precision fp16 \\
        --out xavier_fp16.json
  a log of tegrastats recorded beside another program:
    python3 jetson_bench.py replay tegrastats.log --rail GPU
"""


def build_parser():
    """Returns the parser of all commands."""
    parser = argparse.ArgumentParser(
        description='FPS, latency, power and energy on NVIDIA Jetson.',
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    commands.required = True
    p = commands.add_parser('probe', help='what is here, what is missing')
    _system_arguments(p)
    p.add_argument('--json', action='store_true', help='for programs')
    _run_parser(commands)
    p = commands.add_parser('compare', help='two or more result files')
    p.add_argument('results', nargs='+', help='result.json, or its folder')
    p.add_argument('--baseline', help='RESULT/MODEL (default: the first)')
    p.add_argument('--json', metavar='FILE', help='also write JSON')
    p = commands.add_parser('layers', help='latency tables for planning')
    p.add_argument('folder', help='with index.json and ONNX files')
    p.add_argument('--out', required=True, help='the table (JSON)')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--seconds', type=float, default=0.3, help='per round')
    p.add_argument('--min-count', type=int, default=20, help='per round')
    _engine_arguments(p)
    _settings_arguments(p)
    p.add_argument('--sysroot', default='/', help=argparse.SUPPRESS)
    p = commands.add_parser('replay', help='a recorded tegrastats log')
    p.add_argument('log')
    p.add_argument('--rail', default='GPU')
    p.add_argument(
        '--period',
        type=float,
        default=1.0,
        help='seconds between lines (default 1)')
    commands.add_parser('selftest', help='checks clocks and sampling here')
    return parser


def _run_parser(commands):
    p = commands.add_parser('run', help='measure one or more models')
    p.add_argument(
        '--model',
        action='append',
        required=True,
        metavar='NAME=FILE',
        help='may be given several times')
    p.add_argument('--baseline', help='name (default: the first model)')
    p.add_argument('--out', help='folder (default: bench-DATE-TIME)')
    p.add_argument(
        '--raw',
        action='store_true',
        help='also write all latencies and power readings')
    for name, default, text in (('repeats', 7,
                                 'blocks of two windows per model'),
                                ('min-seconds', 4.0,
                                 'least length of a window'),
                                ('min-count', 20,
                                 'least number of inferences in a window'),
                                ('warm-seconds', 2.0,
                                 'least warm-up'), ('max-warm-seconds', 60.0,
                                                    'longest warm-up'),
                                ('rewarm-seconds', 0.5,
                                 'warm-up before every window'),
                                ('idle-seconds', 10.0,
                                 'idle power before and after'),
                                ('sample-hz', 10.0,
                                 'power readings per second')):
        p.add_argument(
            '--' + name,
            type=type(default),
            default=default,
            help='{} (default {})'.format(text, default))
    _engine_arguments(p)
    _settings_arguments(p)
    _system_arguments(p)


def _engine_arguments(p):
    p.add_argument('--backend', default='auto', choices=('auto', ) + NAMES)
    p.add_argument('--precision', default='fp32', choices=PRECISIONS)
    p.add_argument('--input-shape', action='append', metavar='NAME:1x3x32x32')
    p.add_argument('--images', metavar='FOLDER', help='instead of random data')
    p.add_argument('--plugins', action='append', default=[], metavar='LIB.so')
    p.add_argument('--cache', default='engines', help='built engines')
    p.add_argument('--threads', type=int, help='of CPU back ends')
    p.add_argument(
        '--workspace-mib',
        type=int,
        default=1024,
        help='for choosing kernels in TensorRT (default 1024)')


def _settings_arguments(p):
    p.add_argument(
        '--set-nvpmodel',
        type=int,
        metavar='MODE',
        help='power mode; the present one is restored')
    p.add_argument(
        '--jetson-clocks',
        action='store_true',
        help='fix clocks at their maximum; restored afterwards')


def _system_arguments(p):
    p.add_argument(
        '--power',
        default='auto',
        help='auto, none, sysfs, '
        'tegrastats, nvml[:INDEX], rapl, replay:FILE[:PERIOD_S]')
    p.add_argument('--sysroot', default='/', help=argparse.SUPPRESS)


def _options(args):
    return Options(
        precision=args.precision,
        shapes=parse_shapes(args.input_shape),
        images=args.images,
        plugins=args.plugins,
        cache=args.cache,
        threads=args.threads,
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
    return models, baseline


def run_command(args):
    """Measures; writes result.json, result.csv, power.png or .svg."""
    models, baseline = _models(args)
    power, passed_over = choose_source(args.power, args.sysroot)
    if power is None:
        to_stderr('no power: ' + '; '.join(passed_over))
    out = args.out or time.strftime('bench-%Y%m%d-%H%M%S')
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, RESULT_NAME)
    if os.path.exists(path):
        raise BenchError(
            '{} exists already: choose another --out'.format(path))
    names = vars(Settings())
    settings = Settings(**{k: getattr(args, k) for k in names})
    run = Run(models, baseline, args.backend, _options(args), settings, power,
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
                              args.min_count, args.sysroot, to_stderr)
    rows = [['id', 'median ms', 'noise ms']]
    rows += [[str(e['id']),
              number(e['median_ms']),
              number(e['noise_ms'])] for e in found['entries']]
    print(aligned(rows))
    for f in found['flags']:
        print('FLAG {code}: {text}'.format(**f))


def replay_command(args):
    """Finds and compares the busy stretches of a recorded log."""
    records = read_log(args.log)
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
        raise BenchError('no busy stretch on rail {}'.format(args.rail))
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
    return 0
