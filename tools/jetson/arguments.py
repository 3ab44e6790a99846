# Copyright (c) mmbasis authors. All rights reserved.
"""The arguments of the command line."""
import argparse

from .backends import NAMES, PRECISIONS
from .extras import STAGES

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


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and where to read more."""

    def error(self, message):
        self.exit(2, 'error: {}; see {} --help\n'.format(message, self.prog))


def build_parser():
    """Returns the parser of all commands."""
    parser = _Parser(
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
    p.add_argument(
        '--max-wait',
        type=float,
        default=60,
        help='seconds per model for the full speed of a shared CPU; 0 does '
        'without (default 60)')
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
    p.add_argument(
        '--check',
        action='store_true',
        help="compare the engine's outputs with ONNX Runtime's")
    p.add_argument(
        '--profile',
        action='store_true',
        help='also time each layer, after the windows')
    p.add_argument(
        '--stages',
        choices=STAGES,
        help='also time reading --images, and this after the engine')
    _engine_arguments(p)
    _settings_arguments(p)
    _system_arguments(p)


def _engine_arguments(p):
    p.add_argument('--backend', default='auto', choices=('auto', ) + NAMES)
    p.add_argument(
        '--precision',
        choices=PRECISIONS,
        help='of engines that are built here (default: that of the file)')
    p.add_argument('--input-shape', action='append', metavar='NAME:1x3x32x32')
    p.add_argument('--images', metavar='FOLDER', help='instead of random data')
    p.add_argument('--plugins', action='append', default=[], metavar='LIB.so')
    p.add_argument('--cache', default='engines', help='built engines')
    p.add_argument('--threads', type=int, help='of CPU back ends')
    p.add_argument(
        '--dla', type=int, metavar='CORE', help='accelerator, then the GPU')
    p.add_argument(
        '--cuda-graph', action='store_true', help='launch layers as a whole')
    p.add_argument(
        '--streams', type=int, default=1, help='inferences at the same time')
    p.add_argument(
        '--timing-cache', metavar='FILE', help='makes building faster')
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
