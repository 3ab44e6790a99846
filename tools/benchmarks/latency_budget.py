# Copyright (c) mmbasis authors. All rights reserved.
"""Does a budget in milliseconds give networks that are faster?

Measures a latency table, plans at half the latency, refines the table by what
that network takes, plans again, and compares in one interleaved run of ONNX
Runtime the dense model with the plans, and with plans of equal MACs: by MACs
(BudgetPlanner, as it is and with ranks rounded) and by the paper's rule
(EnergyPlanner, which does not round). The weights are random where no
checkpoint is given: time does not depend on them, the ranks do.

    python tools/benchmarks/latency_budget.py \\
        mmpretrain::resnet/resnet50_8xb32_in1k.py \\
        --input-shape 1x3x224x224 --work-dir work_dirs/latency/resnet50
    python tools/benchmarks/latency_budget.py \\
        mmdet::retinanet/retinanet_r18_fpn_1x_coco.py \\
        --input-shape 1x3x320x320 --work-dir work_dirs/latency/retinanet
"""
import argparse
import copy
import json
import os
import os.path as osp
import sys
import warnings
from collections import Counter
from datetime import datetime

import numpy as np
import onnxruntime
import torch
from bench_utils import command
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from onnx_timing import time_together
from rich.console import Console
from rich.table import Table

import mmbasis
from mmbasis.compression import (
    Recipe,
    analyze,
    apply_plan,
    load_weights,
    make_plan,
    read_checkpoint,
)
from mmbasis.deploy.layer_models import RawOutputs, export_layers
from mmbasis.models import build_dense
from mmbasis.planning import LatencyTable, refine
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from latency_table import _shape, measure_table, samples_for  # noqa: E402


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--checkpoint', help='default: random weights')
    parser.add_argument('--input-shape', type=_shape, required=True)
    parser.add_argument('--work-dir', required=True)
    parser.add_argument('--latency', type=float, default=.5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--ranks', type=int, default=8)
    parser.add_argument('--round-to', type=int, default=8)
    parser.add_argument('--seconds', type=float, default=.3)
    parser.add_argument('--turns', type=int, default=20)
    return parser.parse_args()


def build_model(cfg, checkpoint):
    """The dense model, in evaluation mode."""
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    set_random_seed(0)
    model = build_dense(cfg)
    if checkpoint is not None:
        load_weights(model, read_checkpoint(checkpoint), checkpoint)
    return model.eval()


def measure_layers(args, model, samples) -> LatencyTable:
    """Export and measure the table; goes on where it stopped."""
    folder = osp.join(args.work_dir, 'layers')
    path = osp.join(args.work_dir, 'table.json')
    if not osp.isfile(osp.join(folder, 'index.json')):
        export_layers(folder, model, args.input_shape, samples, args.ranks,
                      args.round_to)
    # windows that are short beside the seconds of a machine's speed
    if measure_table(folder, path, '--backend', 'onnxruntime', '--threads',
                     args.threads, '--seconds', args.seconds, '--min-count',
                     5):
        raise SystemExit(1)
    return LatencyTable.load(path)


class Plans:
    """Plans of one model by different planners: from a batch, and those of
    the paper's rule from its weights."""

    def __init__(self, model, batch) -> None:
        # the default looks at all forms; there are no annotations for a loss
        self.on_data, self.of_weights = (
            analyze(model, self._recipe(data_aware, macs=.5), [batch])
            for data_aware in (True, False))

    @staticmethod
    def _recipe(data_aware: bool, **planner) -> Recipe:
        planner = dict(dict(type='BudgetPlanner'), **planner)
        if planner['type'] == 'BudgetPlanner':
            planner['loss_aware'] = False
        return Recipe.of(planner=dict(planner, data_aware=data_aware))

    def make(self, **planner):
        """A plan; the model stays dense."""
        return make_plan(self._recipe(True, **planner), self.on_data)

    def energy_at(self, macs: float):
        """The plan of the paper's rule that keeps this fraction of MACs."""
        low, high = .01, 1.
        for _ in range(12):
            middle = (low + high) / 2
            plan = self._by_energy(middle)
            low, high = (low, middle) if kept(plan) > macs else (middle, high)
        return self._by_energy(low)

    def _by_energy(self, threshold: float):
        recipe = self._recipe(
            False, type='EnergyPlanner', threshold=threshold)
        return make_plan(recipe, self.of_weights)


def kept(plan) -> float:
    """Fraction of the MACs of the compressible layers that a plan keeps."""
    macs = plan.totals()['macs']
    return macs['after'] / macs['before']


def export(model, plan, samples, shape, path) -> None:
    """Write the ONNX file of the model with a plan, None for dense."""
    if plan is not None:
        model = copy.deepcopy(model)
        apply_plan(model, plan)
    with torch.no_grad():
        torch.onnx.export(
            RawOutputs(model, samples).eval(), (torch.randn(*shape), ),
            path,
            input_names=['input'],
            opset_version=13)


def batch_for(cfg, shape, samples) -> dict:
    """A batch of noise, as the model's preprocessor takes it."""
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    if samples is None:
        from mmpretrain.structures import DataSample
        return dict(inputs=images, data_samples=[DataSample() for _ in images])
    return dict(inputs=list(images), data_samples=samples)


def main() -> None:
    """Measure, plan, compare, report."""
    warnings.filterwarnings('ignore')
    args = parse_args()
    cfg = load_config(args.config, work_dir=args.work_dir)
    os.makedirs(args.work_dir, exist_ok=True)
    samples = samples_for(cfg, args.input_shape)
    model = build_model(cfg, args.checkpoint)
    before = os.getloadavg()
    table = measure_layers(args, model, samples)
    plans = Plans(model, batch_for(cfg, args.input_shape, samples))
    budget = dict(latency=args.latency, round_to=args.round_to)
    chosen = {
        'dense': None,
        'latency': plans.make(table=table.target['path'], **budget)
    }
    paths = {}

    def time_chosen() -> dict:
        """Latencies in ms of all plans so far, in one interleaved run."""
        for name in [x for x in chosen if x not in paths]:
            file = name.replace(', ', '-')
            paths[name] = osp.join(args.work_dir, f'{file}.onnx')
            export(model, chosen[name], samples, args.input_shape,
                   paths[name])
        return time_together(paths, args.input_shape, args.threads,
                             args.turns)

    times = time_chosen()
    refined = osp.join(args.work_dir, 'refined.json')
    fraction = np.median(times['latency']) / np.median(times['dense'])
    write_atomically(
        refined,
        json.dumps(refine(table.target['path'], chosen['latency'], fraction)))
    table = LatencyTable.load(refined)
    chosen['latency, refined'] = plans.make(table=refined, **budget)
    macs = kept(chosen['latency, refined'])
    chosen['macs'] = plans.make(macs=macs, round_to=1)
    chosen['macs, rounded'] = plans.make(macs=macs, round_to=args.round_to)
    chosen['paper'] = plans.energy_at(macs)
    times = time_chosen()
    rows = {}
    for name, plan in chosen.items():
        ranks = {} if plan is None else {
            k: v.ranks
            for k, v in plan.layers.items()
        }
        rows[name] = dict(
            macs=1. if plan is None else kept(plan),
            layers=len(ranks),
            forms=dict(Counter(x.form for x in ranks.values())),
            median_ms=float(np.median(times[name])),
            turns_ms=times[name],
            predicted_ms=table.predict(ranks),
            bytes=osp.getsize(paths[name]))
    report = dict(
        config=args.config,
        input_shape=list(args.input_shape),
        weights=args.checkpoint or 'random',
        device=table.target['device'],
        threads=args.threads,
        turns=args.turns,
        date=datetime.now().isoformat(timespec='seconds'),
        command=command(),
        versions=dict(
            mmbasis=mmbasis.__version__,
            torch=torch.__version__,
            onnxruntime=onnxruntime.__version__),
        load_average=[before, os.getloadavg()],
        budget=args.latency,
        results=rows)
    write_atomically(
        osp.join(args.work_dir, 'latency_budget.json'),
        json.dumps(report, indent=2))
    show(rows)


def show(rows: dict) -> None:
    """Print the comparison."""
    table = Table('plan', 'MACs kept', 'layers', 'median, ms', 'of dense',
                  'predicted, ms', 'predicted / measured')
    dense = rows['dense']['median_ms']
    for name, row in rows.items():
        table.add_row(name, f'{row["macs"]:.3f}', str(row['layers']),
                      f'{row["median_ms"]:.2f}',
                      f'{row["median_ms"] / dense:.3f}',
                      f'{row["predicted_ms"]:.2f}',
                      f'{row["predicted_ms"] / row["median_ms"]:.3f}')
    Console().print(table)


if __name__ == '__main__':
    main()
