# Copyright (c) mmbasis authors. All rights reserved.
"""Dense networks against plans, in PyTorch on the machine at hand.

Batch normalisations are folded, tensors are channels_last; on CUDA everything
is fp16 and one CUDA graph, on a CPU fp32. Dense network and plans take turns;
a row has the medians of their times, ratios, and what the device model
predicts of all layers. Detectors are measured up to their maps, without
decoding. Linear layers stay dense. Weights are random, as are the statistics
of normalisations, and plans come from the weights alone (data_aware=False):
time depends on ranks only, which spread over layers as the spectra of random
weights do, more evenly than those of trained ones.

Three minutes on an H100, and rows that the file has are kept:

    python tools/benchmarks/gpu_latency.py --out docs/results/gpu_latency
    # the detectors, and torch.compile, which takes longer
    python tools/benchmarks/gpu_latency.py --models retinanet-r50 rtmdet-s \\
        --out docs/results/gpu_latency
    python tools/benchmarks/gpu_latency.py --compile --out ...
    # a dry run on a CPU
    python tools/benchmarks/gpu_latency.py --small --batches 1 --out /tmp/gpu
"""
import argparse
import copy
import json
import os
import os.path as osp
import platform
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from datetime import datetime
from statistics import median

import mmcv.cnn
import torch
import torch.nn as nn
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from torch.nn.modules.batchnorm import _BatchNorm

import mmbasis
from mmbasis.compression import Recipe, analyze, apply_plan, make_plan
from mmbasis.deploy.layer_models import RawOutputs
from mmbasis.models import build_dense
from mmbasis.planning import Costs
from mmbasis.planning.costs import DeviceCost
from mmbasis.planning.layers import FORMS
from mmbasis.running import tensors
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically

HERE = osp.dirname(osp.abspath(__file__))
sys.path[:0] = [HERE, osp.dirname(HERE)]

from bench_utils import command  # noqa: E402
from latency_budget import batch_for, kept  # noqa: E402
from latency_table import samples_for  # noqa: E402

#: config, height and width, and those of a dry run
MODELS = {
    'resnet50':
    ('mmpretrain::resnet/resnet50_8xb32_in1k.py', (224, 224), (64, 64)),
    # its linear layers know one size
    'vgg16': ('mmpretrain::vgg/vgg16_8xb32_in1k.py', (224, 224), (224, 224)),
    'retinanet-r50': ('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py',
                      (800, 1344), (128, 128)),
    'rtmdet-s':
    ('mmdet::rtmdet/rtmdet_s_8xb32-300e_coco.py', (640, 640), (128, 128)),
}
#: device models by what is in the name of a GPU
PRESETS = {
    'h100': 'h100-fp16',
    'h200': 'h100-fp16',
    'a100': 'a100-fp16',
    '3090': 'rtx3090-fp16',
    't4': 't4-fp16',
    'xavier': 'xavier-fp16',
    'orin nx': 'orin-nx-fp16',
    'orin': 'orin-agx-fp16',
}


def preset_of(name: str) -> 'str | None':
    """The device model of a GPU, or of ``'cpu'``; None if there is none."""
    if name == 'cpu':
        return name
    return next((v for k, v in PRESETS.items() if k in name.lower()), None)


def build(config: str, shape) -> tuple:
    """A dense model with random weights, a batch for planning, and data
    samples for detectors."""
    cfg = load_config(config)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    set_random_seed(0)
    model = build_dense(cfg).eval()
    for module in model.modules():
        if isinstance(module, _BatchNorm):  # else folding would show nothing
            module.running_var.uniform_(.5, 2)
            module.running_mean.normal_(std=.1)
    samples = samples_for(cfg, shape)
    return model, batch_for(cfg, shape, samples)


class Plans:
    """Plans of one model by different planners, from one analysis."""

    def __init__(self, model, batch) -> None:
        linear = any(type(x) is nn.Linear for x in model.modules())
        self.common = dict(
            data_aware=False, exclude=['Linear'] if linear else [])
        recipe = self._recipe(type='BudgetPlanner', macs=.5, forms=FORMS)
        self.analysis = analyze(model, recipe, [batch])

    def _recipe(self, **planner):
        return Recipe.of(planner=dict(self.common, **planner))

    def make(self, **planner):
        """A plan; a ValueError if there is none."""
        return make_plan(self._recipe(**planner), self.analysis)

    def paper(self):
        """The paper's rule at half the MACs."""
        low, high = .01, 1.
        for _ in range(12):
            middle = (low + high) / 2
            plan = self.make(type='EnergyPlanner', threshold=middle)
            low, high = (low, middle) if kept(plan) > .5 else (middle, high)
        return self.make(type='EnergyPlanner', threshold=low)

    def fastest(self, **planner):
        """Half the latency, or as near to it as there is a plan."""
        for percent in range(50, 101, 5):
            try:
                return self.make(
                    type='BudgetPlanner', latency=percent / 100, **planner)
            except ValueError as error:
                if 'cannot be met' not in str(error):
                    raise
        raise ValueError('no budget can be met')

    def all(self, device: 'str | None', table: 'str | None') -> dict:
        """By name; None is the dense model."""
        plans = {
            'dense': None,
            'macs': self.make(type='BudgetPlanner', macs=.5),
            'macs, all forms, multiples of 8': self.make(
                type='BudgetPlanner', macs=.5, forms=FORMS, round_to=8),
            'paper': self.paper(),
        }
        if device is not None:
            plans['device'] = self.fastest(
                device=device, forms=FORMS, round_to=8)
        if table is not None:
            plans['table'] = self.fastest(table=table, round_to=8)
        return plans

    def predict(self, plan, device: str, batch: int) -> float:
        """Milliseconds of all layers of a model with a plan, by the device
        model."""
        cost, total = DeviceCost(device), 0.
        for layer in self.analysis.layers:
            known = self.analysis.statistics[layer.name]
            if not known.in_positions:
                continue  # not used
            known = replace(known, **{
                key: batch * getattr(known, key) for key in (
                    'weight_positions', 'out_positions', 'in_positions',
                    'middle_positions')})
            entry = plan and plan.layers.get(layer.name)
            total += cost.of(Costs(layer, known),
                             entry.ranks if entry else None)
        return float(total)


@torch.no_grad()
def fold(model: nn.Module, shape, samples) -> nn.Module:
    """Fold batch normalisations, where the model stays the same function:
    RTMDet's heads share convolutions between levels, but not these."""
    images = torch.randn(*shape, device=next(model.parameters()).device)
    reference = [*tensors(RawOutputs(model, samples)(images))]
    for name, child in list(model.named_children()):
        before = copy.deepcopy(child)
        setattr(model, name, mmcv.cnn.fuse_conv_bn(child))
        found = tensors(RawOutputs(model, samples)(images))
        if not all(
                torch.allclose(x, y, 1e-2, 1e-2 * float(y.std()))
                for x, y in zip(found, reference)):
            setattr(model, name, before)
    return model


class Run:
    """A network with fixed inputs; calling it runs it once.

    Args:
        model (nn.Module): The network, folded.
        shape (tuple[int]): Of its input.
        samples (list, optional): For detectors.
        device (torch.device): On CUDA it is captured as a graph, in fp16.
        compiles (bool): Whether ``torch.compile`` comes first.
    """

    @torch.no_grad()
    def __init__(self, model, shape, samples, device, compiles) -> None:
        cuda = device.type == 'cuda'
        kind = dict(
            device=device, dtype=torch.float16 if cuda else torch.float32,
            memory_format=torch.channels_last)
        self.network = RawOutputs(model, samples).to(**kind).eval()
        self.images = torch.randn(*shape).to(**kind)
        self.call = self.network
        if compiles:
            self.call = torch.compile(self.network)
        self.graph = self._capture() if cuda else None
        self()

    def _capture(self):
        """The CUDA graph, after a warm-up in a stream of its own."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.call(self.images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.outputs = self.call(self.images)
        return graph

    @torch.no_grad()
    def __call__(self) -> None:
        if self.graph is None:
            self.call(self.images)
        else:
            self.graph.replay()

    def time(self, count: int) -> float:
        """Milliseconds of a run, over a number of them in a row."""
        if self.graph is None:
            start = time.perf_counter()
            for _ in range(count):
                self()
            return (time.perf_counter() - start) / count * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            self()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / count


def time_together(runs: dict, seconds: float) -> dict:
    """Times in ms: in each of at least five rounds all take turns, each over
    as many runs in a row as fill a few hundredths of a second."""
    counts = {}
    for name, run in runs.items():
        run.time(1)
        counts[name] = max(1, round(20 / max(run.time(2), 1e-3)))
    times = {name: [] for name in runs}
    end = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < end or len(times[name]) < 5:
        for name, run in runs.items():
            times[name].append(run.time(counts[name]))
    return times


def measure(plans: Plans, chosen: dict, model, shape, args, compiles) -> dict:
    """The row of a model and a batch size: each plan's medians."""
    batch, samples = shape[0], args.samples
    runs = {}
    for name, plan in chosen.items():
        changed = copy.deepcopy(model)
        if plan is not None:
            apply_plan(changed, plan)
        one = (1, *shape[1:])
        changed = fold(changed, one, samples and samples[:1])
        runs[name] = Run(changed, shape, samples and samples * batch,
                         args.device, compiles)
    times = time_together(runs, args.seconds)
    predicted = {
        name: args.preset and plans.predict(plan, args.preset, batch)
        for name, plan in chosen.items()
    }
    ratios = {
        name: median(x / y for x, y in zip(found, times['dense']))
        for name, found in times.items()
    }
    return {
        name: dict(
            ms=median(times[name]),
            rounds=len(times[name]),
            of_dense=ratios[name],
            speed_up=1 / ratios[name],
            macs=1. if plan is None else kept(plan),
            layers=0 if plan is None else len(plan.layers),
            budget=plan and plan.planner.get('latency'),
            predicted_ms=predicted[name],
            predicted_of_dense=args.preset
            and predicted[name] / predicted['dense'])
        for name, plan in chosen.items()
    }


def about(args) -> dict:
    """What may not differ within a file."""
    cuda = args.device.type == 'cuda'
    return dict(
        machine=f'{platform.machine()}, {os.cpu_count()} cores',
        device=torch.cuda.get_device_name() if cuda else 'cpu',
        device_model=args.preset,
        precision='fp16, CUDA graphs' if cuda else 'fp32, no graphs',
        threads=torch.get_num_threads(),
        versions=dict(
            mmbasis=mmbasis.__version__, torch=torch.__version__,
            cuda=torch.version.cuda if cuda else None,
            python=platform.python_version()),
        small=args.small)


def load(path: str, settings: dict) -> dict:
    """The report so far; a ValueError if it is of something else."""
    if not osp.isfile(path):
        return dict(settings, rows={})
    with open(path, encoding='utf-8') as file:
        report = json.load(file)
    wrong = [k for k, v in settings.items() if report.get(k) != v]
    if wrong:
        raise ValueError(
            f'{path} was measured with another {", ".join(wrong)}: '
            f'{[report.get(k) for k in wrong]}, now '
            f'{[settings[k] for k in wrong]}; give another --out')
    return report


def revision() -> str:
    """Of this checkout, ``'unknown'`` outside of git."""
    done = subprocess.run(['git', 'describe', '--always', '--dirty'],
                          cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True)
    return done.stdout.strip() or 'unknown'


def markdown(report: dict) -> str:
    """A table of all rows."""
    head = ['model', 'batch', 'plan', 'MACs kept', 'layers', 'ms', 'of dense',
            'speed-up', 'predicted, ms', 'predicted of dense']
    lines = [head, ['---'] * len(head)]
    for key, row in report['rows'].items():
        model, batch, way = key.split('|')
        name = model + ', compiled' * (way == 'compiled')
        if 'failed' in row:
            lines.append([name, batch, f'failed: {row["failed"]}',
                          *[''] * (len(head) - 3)])
            continue
        for plan, x in row['plans'].items():
            lines.append([
                name, batch, plan + (
                    f' (latency {x["budget"]:g})' if x['budget'] else ''),
                f'{x["macs"]:.3f}', x['layers'], f'{x["ms"]:.3f}',
                f'**{x["of_dense"]:.3f}**', f'{x["speed_up"]:.2f}',
                *('–' if x[k] is None else f'{x[k]:.3f}'
                  for k in ('predicted_ms', 'predicted_of_dense'))
            ])
    facts = [f'- {k}: {v}' for k, v in report.items() if k != 'rows']
    facts += [f'- {key}: {row["date"]}, revision {row["revision"]}, '
              f'`{row["command"]}`' for key, row in report['rows'].items()]
    return '\n'.join([
        '# Dense networks against plans, in PyTorch', '',
        'How it was measured: `tools/benchmarks/gpu_latency.py`. Of dense: '
        'median over rounds of the ratio to the dense network of the same '
        'round. Predicted: the layers, by the device model.', '',
        *(f'| {" | ".join(map(str, line))} |' for line in lines), '',
        *facts]) + '\n'


def save(report: dict, out: str) -> None:
    """Write JSON and Markdown."""
    write_atomically(f'{out}.json', json.dumps(report, indent=1) + '\n')
    write_atomically(f'{out}.md', markdown(report))


def run_model(name: str, todo: list, report: dict, args) -> None:
    """Measure the missing rows of a model; save after each."""
    config, size, small = MODELS[name]
    size = small if args.small else size
    model, batch = build(config, (1, 3, *size))
    args.samples = batch['data_samples'] if 'mmdet' in config else None
    model.to(args.device)
    plans = Plans(model, batch)
    chosen = plans.all(args.preset, args.tables.get(name))
    for key in todo:
        _, count, way = key.split('|')
        row = dict(
            image=list(size),
            date=datetime.now().isoformat(timespec='seconds'),
            revision=revision(), command=command())
        try:
            row['plans'] = measure(plans, chosen, model,
                                   (int(count), 3, *size), args,
                                   way == 'compiled')
        except Exception as error:  # of the compiler, or of the memory
            lines = f'{type(error).__name__}: {error}'.split('\n')
            row['failed'] = lines[0][:200].replace('|', '/')
        report['rows'][key] = row
        save(report, args.out)
        print(f'{key}: {row.get("failed", "done")}', flush=True)
        if args.device.type == 'cuda':
            torch.cuda.empty_cache()


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=MODELS,
                        default=['resnet50', 'vgg16'])
    parser.add_argument('--batches', nargs='+', type=int, default=[1, 32])
    parser.add_argument('--compile', action='store_true',
                        help='measure with torch.compile, too')
    parser.add_argument('--table', nargs='+', default=[], metavar='NAME=FILE',
                        help='latency tables of models')
    parser.add_argument('--device-model', help='instead of what suits')
    parser.add_argument('--seconds', type=float, default=2.,
                        help='for each plan (default 2)')
    parser.add_argument('--small', action='store_true', help='small images')
    parser.add_argument('--out', required=True, help='path without suffix')
    args = parser.parse_args(argv)
    args.device = torch.device(
        'cuda' if torch.cuda.is_available() else 'cpu')
    name = torch.cuda.get_device_name() if args.device.type == 'cuda' else (
        'cpu')
    args.preset = args.device_model or preset_of(name)
    args.tables = dict(x.split('=', 1) for x in args.table)
    return args


def main(argv=None) -> None:
    """Measure what is missing."""
    warnings.filterwarnings('ignore')
    args = parse_args(argv)
    report = load(f'{args.out}.json', about(args))
    ways = ['plain', 'compiled'] if args.compile else ['plain']
    for name in args.models:
        keys = [f'{name}|{batch}|{way}'
                for way in ways for batch in args.batches]
        # what failed is tried again
        todo = [k for k in keys if 'plans' not in report['rows'].get(k, {})]
        if todo:
            run_model(name, todo, report, args)


if __name__ == '__main__':
    main()
