# Copyright (c) mmbasis authors. All rights reserved.
"""Compare ways of compressing ResNet-56 on CIFAR-10, without training.

All start from the same weights and calibration images (from the training
split) and are tested on the same test images at the same budgets. Results are
written after each run; what is there already is not run again.

    python tools/benchmarks/cifar_methods.py \
        configs/mmpretrain/resnet56_cifar10.py resnet56.pth \
        --out docs/results/cifar_no_training
"""
import argparse
import copy
import itertools
import json
import os
import os.path as osp
import platform
import time
from contextlib import ExitStack, contextmanager
from datetime import datetime
from unittest.mock import patch

import torch
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from rich.console import Console
from rich.progress import track

import mmbasis
from mmbasis.compression import layer_regression, load_weights, read_checkpoint
from mmbasis.datasets import calibration_dataloader
from mmbasis.factorization import reduced_rank_regression
from mmbasis.planning import BudgetPlanner
from mmbasis.running import SumWatch
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically
from mmbasis.utils.runner import evaluate
from mmbasis.visualization import plot_curves

#: images in a calibration batch
BATCH = 64
LOCAL = dict(reconstruction='local', recalibration=False)
PLAIN = dict(recalibration=False)
#: the paper's form, and any rank
OUTPUT = dict(forms=['output'], round_to=1)
PAPER = dict(OUTPUT, data_aware=False, equal=True)
#: name: (planner, how to compress, ingredients of reconstruction that are
#: switched off). From the third to the recalibration each adds one thing to
#: the one before; then come the forms, alone and together.
METHODS = {
    'the paper: weights, equal energy': (PAPER, LOCAL, ()),
    'the paper + recalibration': (PAPER, dict(LOCAL, recalibration=True), ()),
    'data, energy budget (BALF)': (dict(OUTPUT, loss_aware=False), LOCAL, ()),
    'loss-aware budget': (OUTPUT, LOCAL, ()),
    '+ sequential': (OUTPUT, PLAIN, ('inputs', 'metric', 'sums')),
    '+ regression on inputs': (OUTPUT, PLAIN, ('metric', 'sums')),
    '+ metric of gradients': (OUTPUT, PLAIN, ('sums', )),
    '+ shortcuts made up for': (OUTPUT, PLAIN, ()),
    '+ automatic recalibration': (OUTPUT, {}, ()),
    'input form alone': (dict(forms=['input'], round_to=1), {}, ()),
    'both sides alone': (dict(forms=['both'], round_to=1), {}, ()),
    'all forms, any rank': (dict(round_to=1), {}, ()),
    'all forms (default)': (dict(), {}, ()),
}


@contextmanager
def without(ingredients):
    """Reconstruction without some of what it does; no options in mmbasis."""
    with ExitStack() as stack:
        if 'inputs' in ingredients:
            stack.enter_context(
                patch.object(layer_regression, 'SAMPLES_PER_WEIGHT', 1e9))
        if 'metric' in ingredients:
            stack.enter_context(
                patch.object(layer_regression, 'reduced_rank_regression',
                             lambda *args: reduced_rank_regression(*args[:4])))
        if 'sums' in ingredients:
            stack.enter_context(
                patch.object(SumWatch, '_at_sum', lambda *_: None))
        yield


class EqualEnergyPlanner(BudgetPlanner):
    """The paper's rule at a given cost: the energy threshold, the same in all
    layers, that just meets the budget."""

    def choose(self, free, decided):
        budget = self.budget * sum(x.macs() for x in free)

        def ranks(threshold):
            return [
                min(x.spectrum.rank_for_energy(threshold), x.ranks[-1])
                for x in free
            ]

        low, high = 0., 1.
        for _ in range(50):
            middle = (low + high) / 2
            cost = sum(x.macs(r) for x, r in zip(free, ranks(middle)))
            low, high = (middle, high) if cost <= budget else (low, middle)
        return ranks(low)


def make_planner(settings: dict, budget: float):
    settings = dict(settings)
    kind = EqualEnergyPlanner if settings.pop('equal', 0) else BudgetPlanner
    return kind(macs=budget, **settings)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', required=True, help='path without ending')
    parser.add_argument(
        '--budgets',
        nargs='+',
        type=float,
        default=[.15, .25, .359, .5, .6],
        help='fractions of the MACs of all convolutions')
    parser.add_argument(
        '--methods', nargs='+', choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        '--images',
        type=int,
        default=512,
        help='for calibration, with those that are held out for choices')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--threads', type=int)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    cfg = load_config(args.config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    load_weights(model, read_checkpoint(args.checkpoint), args.checkpoint)
    path = f'{args.out}.json'
    result = dict(runs=[])
    if osp.isfile(path):
        with open(path, encoding='utf-8') as file:
            result = json.load(file)
    result.update(
        date=datetime.now().isoformat(timespec='seconds'),
        machine=f'{platform.machine()}, {os.cpu_count()} cores',
        versions=dict(mmbasis=mmbasis.__version__, torch=torch.__version__),
        checkpoint=osp.basename(args.checkpoint),
        images=args.images)
    if 'dense' not in result:
        result['dense'] = evaluate(cfg, copy.deepcopy(model))
    done = {(r['method'], r['budget'], r['seed']) for r in result['runs']}
    todo = [
        key
        for key in itertools.product(args.methods, args.budgets, args.seeds)
        if key not in done
    ]
    cfg.train_dataloader.batch_size = BATCH
    for name, budget, seed in track(todo, console=Console()):
        set_random_seed(seed)
        loader = calibration_dataloader(cfg, seed)
        settings, ways, off = METHODS[name]
        # automatic recalibration holds one batch out
        batches = args.images // BATCH - ('recalibration' not in ways)
        compressed = copy.deepcopy(model)
        start = time.time()
        with without(off):
            plan = mmbasis.compress(compressed, make_planner(settings, budget),
                                    loader, batches, **ways)
        seconds = time.time() - start
        macs = plan.totals(convs_only=True)['macs']
        result['runs'].append(
            dict(
                method=name,
                budget=budget,
                seed=seed,
                seconds=round(seconds, 1),
                conv_macs=macs['after'] / macs['before'],
                metrics=evaluate(cfg, compressed)))
        write_atomically(path, json.dumps(result, indent=1) + '\n')
    write_atomically(f'{args.out}.md', to_markdown(result))
    plot_curves(
        curves(result), f'{args.out}.png', 'MACs of convolutions kept',
        'top-1 / %')


def curves(result: dict) -> dict:
    """Mean accuracy over seeds by method and budget."""
    table = {}
    for run in result['runs']:
        row = table.setdefault(run['method'], {})
        row.setdefault(run['budget'],
                       []).append(run['metrics']['accuracy/top1'])
    return {
        name: {
            b: sum(v) / len(v)
            for b, v in sorted(table[name].items())
        }
        for name in METHODS if name in table
    }


def to_markdown(result: dict) -> str:
    table = curves(result)
    budgets = sorted({b for row in table.values() for b in row})
    lines = [
        '| method | ' + ' | '.join(f'{b:g}' for b in budgets) + ' |',
        '|---' * (len(budgets) + 1) + '|'
    ]
    for name, row in table.items():
        cells = (f'{row[b]:.2f}' if b in row else '' for b in budgets)
        lines.append(f'| {name} | ' + ' | '.join(cells) + ' |')
    dense = result['dense']['accuracy/top1']
    return '\n'.join(lines) + f'\n\nDense: {dense:.2f}.\n'


if __name__ == '__main__':
    main()
