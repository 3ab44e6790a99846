# Copyright (c) mmbasis authors. All rights reserved.
"""Latency tables: what each layer costs in each form, in milliseconds.

    # small models of every distinct layer, and an index
    python tools/latency_table.py export CONFIG CHECKPOINT \\
        --input-shape 1x3x224x224 --out layers
    # here; or on a Jetson: jetson_bench.py layers layers --out table.json
    python tools/latency_table.py measure layers --out table.json --threads 2
    # plan with it
    python tools/compress.py CONFIG CHECKPOINT --latency 0.5 \\
        --table table.json
    # the network took 0.54 of the dense latency? plan again with the other
    python tools/latency_table.py refine table.json compressed.pth \\
        --measured 0.54 --out refined.json
"""
import argparse
import json
import os.path as osp
import subprocess
import sys
import warnings

from mmengine.config import DictAction
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.table import Table

from mmbasis.compression import load_weights, plan_of, read_checkpoint
from mmbasis.deploy.layer_models import export_layers
from mmbasis.models import build_dense
from mmbasis.planning import LatencyTable, refine
from mmbasis.planning.layers import FORMS
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically
from mmbasis.utils.schema import (
    COUNT,
    POSITIVE,
    WEIGHT,
    argument,
    parse_arguments,
)


def _shape(text: str) -> tuple:
    try:
        shape = tuple(int(x) for x in text.split('x'))
    except ValueError:
        shape = ()
    if len(shape) != 4 or min(shape) < 1:
        raise argparse.ArgumentTypeError(
            f'{text!r} is no shape such as 1x3x224x224')
    return shape


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    export = commands.add_parser('export', help='write the models')
    export.add_argument('config', help='config of the dense model')
    export.add_argument('checkpoint', help='its weights')
    export.add_argument(
        '--input-shape',
        type=_shape,
        required=True,
        help='of the deployed network, such as 1x3x224x224')
    export.add_argument('--out', required=True, help='folder')
    export.add_argument(
        '--forms',
        nargs='+',
        choices=FORMS,
        default=FORMS,
        help='what layers may become (default: all)')
    export.add_argument(
        '--ranks',
        type=argument(int, COUNT),
        default=8,
        help='at most, per layer and form (default 8)')
    export.add_argument(
        '--round-to',
        type=argument(int, COUNT),
        default=8,
        help='ranks are multiples of this (default 8)')
    export.add_argument(
        '--torchscript',
        action='store_true',
        help='for the PyTorch back end, instead of ONNX')
    export.add_argument('--cfg-options', nargs='+', action=DictAction)
    measure = commands.add_parser('measure', help='time them')
    measure.add_argument('folder', help='what export wrote')
    measure.add_argument('--out', required=True, help='the table (JSON)')
    measure.add_argument('--backend', default='auto')
    measure.add_argument(
        '--precision', help='of TensorRT engines; default: that of the files')
    measure.add_argument(
        '--threads', type=argument(int, COUNT), help='of CPU back ends')
    measure.add_argument('--rounds', type=argument(int, COUNT), default=3)
    measure.add_argument(
        '--seconds',
        type=argument(float, POSITIVE),
        default=.3,
        help='per round')
    measure.add_argument(
        '--max-wait',
        type=argument(float, WEIGHT),
        help='seconds per model for the full speed of a shared CPU; 0 does '
        'without (default 60)')
    refined = commands.add_parser(
        'refine', help='have it agree with a network planned by it')
    refined.add_argument('table')
    refined.add_argument('checkpoint', help='the compressed network')
    refined.add_argument(
        '--measured',
        type=argument(float, POSITIVE),
        required=True,
        help='latency, as a fraction of the dense one in the same run')
    refined.add_argument('--out', required=True, help='the new table (JSON)')
    show = commands.add_parser('show', help='print a table')
    show.add_argument('table')
    return parse_arguments(parser)


def samples_for(cfg, shape: tuple):
    """``data_samples`` that two-stage detectors ask for in every mode."""
    if cfg.get('default_scope') != 'mmdet':
        return None
    from mmdet.structures import DetDataSample
    size = tuple(shape[2:])
    meta = dict(
        img_shape=size,
        ori_shape=size,
        pad_shape=size,
        batch_input_shape=size,
        scale_factor=(1., 1.))
    return [DetDataSample(metainfo=meta) for _ in range(shape[0])]


def export(args: argparse.Namespace) -> None:
    """Write the models and the index."""
    warnings.filterwarnings('ignore')
    cfg = load_config(args.config, args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    model = build_dense(cfg)
    load_weights(model, read_checkpoint(args.checkpoint), args.checkpoint)
    model.eval()
    samples = samples_for(cfg, args.input_shape)
    count = export_layers(args.out, model, args.input_shape, samples,
                          args.ranks, args.round_to, args.torchscript,
                          Console(stderr=True).print, args.forms)
    Console().print(f'{count} models in {args.out}')


def measure_table(folder: str, out: str, *options: object) -> int:
    """Time the models of a folder by the Jetson tool; its exit status.

    It runs in a process of its own, which has not loaded PyTorch: nothing but
    the back end has threads and memory there.
    """
    program = osp.join(osp.dirname(osp.abspath(__file__)), 'jetson_bench.py')
    return subprocess.run([
        sys.executable, program, 'layers', folder, '--out', out,
        *map(str, options)
    ], stdout=subprocess.DEVNULL).returncode


def measure(args: argparse.Namespace) -> int:
    """Time the models."""
    options = []
    for key in ('backend', 'precision', 'threads', 'rounds', 'seconds',
                'max_wait'):
        if getattr(args, key) is not None:
            options += [f'--{key.replace("_", "-")}', getattr(args, key)]
    return measure_table(args.folder, args.out, *options)


def refine_table(args: argparse.Namespace) -> None:
    """Write a table that agrees with what a network took."""
    plan = plan_of(read_checkpoint(args.checkpoint))
    if plan is None:
        raise SystemExit(f'{args.checkpoint} is of a dense model: give the '
                         'compressed one')
    data = refine(args.table, plan, args.measured)
    write_atomically(args.out, json.dumps(data, indent=1))
    Console().print(args.out)


def show(args: argparse.Namespace) -> None:
    """Print what each layer costs."""
    table = LatencyTable.load(args.table)
    console = Console()
    console.print(f'{", ".join(list(table.target.values())[1:])}, '
                  f'whole model {table.model_ms} ms, outside the layers '
                  f'{table.rest():.3f} ms')
    rows = Table('layer', 'dense, ms', 'noise, ms', 'form', 'ms at ranks')
    for name, curve in table.curves.items():
        for form, grid in curve.grids.items():
            times = [
                f'{"x".join(str(r) for r in x[:2] if r)}: '
                f'{table.cost(name, x):.3f}' for x in grid.choices
            ]
            if times:
                rows.add_row(
                    name, f'{table.cost(name, None):.3f}',
                    f'{table.noise(name):.3f}', form, '  '.join(times))
    console.print(rows)


def main() -> int:
    """Run one of the commands."""
    args = parse_args()
    return {
        'export': export,
        'measure': measure,
        'refine': refine_table,
        'show': show
    }[args.command](args) or 0


if __name__ == '__main__':
    sys.exit(main())
