# Copyright (c) mmbasis authors. All rights reserved.
"""What half the MACs, and half the predicted time, give in ONNX Runtime.

Plans with default settings at half the MACs, with the output form alone, and
with half the time by the device model of a CPU (no table), beside the dense
model, in one interleaved run. Weights are random where no checkpoint is given,
and so are the images: time does not depend on them, the ranks do. There are no
annotations, so ranks are chosen by energy.

    python tools/benchmarks/onnx_latency.py --out docs/results/onnx_latency
"""
import argparse
import json
import os.path as osp
import platform
import tempfile
import warnings
from datetime import datetime

import numpy as np
import onnxruntime
import torch
from latency_budget import (
    batch_for,
    build_model,
    export,
    kept,
    samples_for,
)
from onnx_timing import time_together
from rich.console import Console

from mmbasis.compression import Recipe, analyze, make_plan
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically

#: config and input of each model
MODELS = dict(
    resnet50=('mmpretrain::resnet/resnet50_8xb32_in1k.py', (1, 3, 224, 224)),
    rtmdet_s=('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', (1, 3, 640, 640)),
    yolox_s=('mmdet::yolox/yolox_s_8xb8-300e_coco.py', (1, 3, 640, 640)),
)
#: planners by the name of their row; None is the dense model
PLANNERS = {
    'dense': None,
    'half the MACs, default': dict(macs=.5),
    'half the MACs, output form': dict(macs=.5, forms=['output']),
    'half the MACs, any rank': dict(macs=.5, round_to=1),
    'half the time by the device model': dict(latency=.5, device='cpu'),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--models', nargs='+', choices=list(MODELS), default=list(MODELS))
    parser.add_argument('--checkpoint', help='of the one model; else random')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--turns', type=int, default=10)
    parser.add_argument('--size', type=int, help='of images; for a dry run')
    parser.add_argument('--out', required=True, help='.json and .md to write')
    args = parser.parse_args()
    if args.checkpoint and len(args.models) > 1:
        parser.error('--checkpoint is of one model: name it in --models')
    return args


def recipe_of(**planner) -> Recipe:
    """A recipe that ranks by energy."""
    return Recipe.of(
        planner=dict(planner, type='BudgetPlanner', loss_aware=False))


def measure(name: str, args: argparse.Namespace) -> dict:
    """The rows of one model."""
    config, shape = MODELS[name]
    if args.size:
        shape = (*shape[:2], args.size, args.size)
    cfg = load_config(config, work_dir='work_dirs')
    samples = samples_for(cfg, shape)
    model = build_model(cfg, args.checkpoint)
    batch = batch_for(cfg, shape, samples)
    # the default looks at all forms, the other planners at some
    analysis = analyze(model, recipe_of(macs=.5), [batch])
    rows, paths = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (row, planner) in enumerate(PLANNERS.items()):
            plan = None
            rows[row] = dict(macs=1., layers=0, predicted=1.)
            if planner is not None:
                plan = make_plan(recipe_of(**planner), analysis)
                time = plan.predicted_ms['cpu']
                forms = [x.form for x in plan.layers.values()]
                rows[row] = dict(
                    macs=kept(plan),
                    layers=len(forms),
                    forms={x: forms.count(x) for x in sorted(set(forms))},
                    predicted=time['after'] / time['before'])
            paths[row] = osp.join(folder, f'{number}.onnx')
            export(model, plan, samples, shape, paths[row])
        times = time_together(paths, shape, args.threads, args.turns)
    dense = np.median(times['dense'])
    for row, values in times.items():
        rows[row].update(
            median_ms=float(np.median(values)),
            turns_ms=values,
            of_dense=float(np.median(values) / dense))
    return dict(config=config, input_shape=list(shape), rows=rows)


def to_markdown(report: dict) -> str:
    """One table of all models."""
    lines = ['| model | plan | MACs kept | layers | predicted, of dense | '
             'measured, of dense | ms |', '|---' * 7 + '|']
    for name, one in report['models'].items():
        for plan, row in one['rows'].items():
            lines.append(
                f'| {name} | {plan} | {row["macs"]:.3f} | {row["layers"]} | '
                f'{row["predicted"]:.3f} | {row["of_dense"]:.3f} | '
                f'{row["median_ms"]:.1f} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Plan, export and measure; print and write the report."""
    warnings.filterwarnings('ignore')
    args = parse_args()
    report = dict(
        date=datetime.now().isoformat(timespec='seconds'),
        machine=platform.machine(),
        threads=args.threads,
        turns=args.turns,
        torch=torch.__version__,
        onnxruntime=onnxruntime.__version__,
        weights=args.checkpoint or 'random',
        models={})
    for name in args.models:
        report['models'][name] = measure(name, args)
        write_atomically(f'{args.out}.json', json.dumps(report, indent=1))
        write_atomically(f'{args.out}.md', to_markdown(report))
    Console().print(to_markdown(report))


if __name__ == '__main__':
    main()
