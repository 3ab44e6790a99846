# Copyright (c) mmbasis authors. All rights reserved.
"""Fine-tune compressed ResNet-56 on CIFAR-10 by several recipes.

Each run is one call of tools/train.py, with the same dense weights, images and
number of epochs; the accuracy is that of the last epoch on the test images,
which decide nothing. What is there already is not run again, and what was
interrupted is resumed.

    python tools/benchmarks/cifar_fine_tuning.py \
        data/resnet56_cifar10_jpeg.pth \
        --out docs/results/cifar_fine_tuning
"""
import argparse
import glob
import itertools
import json
import os
import os.path as osp
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import datetime
from statistics import mean

import torch
from mmengine.config import Config
from rich.console import Console
from rich.progress import track

import mmbasis
from mmbasis.compression import plan_of, read_checkpoint
from mmbasis.utils.io import write_atomically

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
PAPER = 'configs/mmpretrain/resnet56_cifar10_basis-paper.py'
OURS = 'configs/mmpretrain/resnet56_cifar10_basis-macs36.py'
HOOK = 'custom_hooks.0'


def budget(macs: float) -> dict:
    return dict(type='BudgetPlanner', macs=macs)


#: (config, options) by name. From the fourth on it is ours with one change.
RECIPES = {
    'paper': (PAPER, {}),
    'ours': (OURS, {}),
    'ours, 75 % cut': (OURS, {
        f'{HOOK}.planner': budget(.25)
    }),
    'no distillation': (OURS, {
        f'{HOOK}.distillation': False
    }),
    '512 images to calibrate': (OURS, {
        f'{HOOK}.calibration.num_batches': 4
    }),
    'the same, logits distilled alone': (OURS, {
        f'{HOOK}.calibration.num_batches':
        4,
        f'{HOOK}.distillation.terms':
        [dict(module='head.fc', type='kl', weight=.7)]
    }),
    'local reconstruction': (OURS, {
        f'{HOOK}.reconstruction': 'local'
    }),
    'ranks by energy': (OURS, {
        f'{HOOK}.planner.loss_aware': False
    }),
    'middle normalisation': (OURS, {
        f'{HOOK}.norm': True
    }),
    'orthogonality penalty': (OURS, {
        f'{HOOK}.orthogonality': dict(weight=1e-3)
    }),
    'retraction after each epoch': (OURS, {
        'custom_hooks.1':
        dict(type='mmbasis.OrthogonalityHook')
    }),
    'recalibration at the end': (OURS, {
        'custom_hooks.1':
        dict(type='mmbasis.RecalibrationHook')
    }),
    'no weight decay on bases': (OURS, {
        'optim_wrapper.paramwise_cfg':
        dict(custom_keys={'.basis.': dict(decay_mult=0.)})
    }),
    'progressive truncation': (OURS, {
        f'{HOOK}.planner':
        budget(.6),
        'custom_hooks.1':
        dict(
            type='mmbasis.ProgressiveTruncationHook',
            stages=[dict(epoch=1, planner=budget(.359))])
    }),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='the dense weights')
    parser.add_argument('--out', required=True, help='path without ending')
    parser.add_argument('--epochs', type=int, default=5)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument(
        '--recipes', nargs='+', choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time')
    parser.add_argument('--work-dir', default='work_dirs/cifar_fine_tuning')
    return parser.parse_args()


def write_config(recipe: str, seed: int, args: argparse.Namespace,
                 path: str) -> None:
    """The config of one run."""
    base, options = RECIPES[recipe]
    cfg = Config.fromfile(osp.join(ROOT, base))
    cfg.merge_from_dict(options)
    cfg.load_from = args.checkpoint
    cfg.randomness.seed = seed
    cfg.train_cfg.update(max_epochs=args.epochs, val_interval=args.epochs)
    if base == PAPER:  # its steps are at each quarter of the run
        cfg.param_scheduler.milestones = [
            round(args.epochs * k / 4) for k in (1, 2, 3)
        ]
    else:
        cfg.param_scheduler.T_max = args.epochs
    for name in ('train', 'val', 'test'):
        cfg[f'{name}_dataloader'].num_workers = 1
    cfg.custom_imports.imports.append('channels_last')
    cfg.custom_hooks.append(dict(type='ChannelsLastHook'))
    cfg.optim_wrapper.type = 'mmbasis.CPUAmpOptimWrapper'
    cfg.dump(path)


def run(recipe: str, seed: int, args: argparse.Namespace) -> dict:
    """Train; what the log says."""
    name = ''.join(c if c.isalnum() else '_' for c in recipe)
    work_dir = osp.join(args.work_dir, f'{name}_e{args.epochs}_s{seed}')
    os.makedirs(work_dir, exist_ok=True)
    config = osp.join(work_dir, 'recipe.py')
    write_config(recipe, seed, args, config)
    call = [
        sys.executable, 'tools/train.py', config, '--work-dir', work_dir,
        '--resume'
    ]
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    environment = dict(
        os.environ,
        PYTHONPATH=os.pathsep.join((ROOT, osp.dirname(__file__))),
        OMP_NUM_THREADS=str(threads),
        MKL_NUM_THREADS=str(threads))
    with open(osp.join(work_dir, 'output.log'), 'a') as log:
        subprocess.run(
            call,
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT)
    return dict(
        recipe=recipe,
        seed=seed,
        epochs=args.epochs,
        date=datetime.now().isoformat(timespec='seconds'),
        options=RECIPES[recipe][1],
        **read_logs(work_dir))


def read_logs(work_dir: str) -> dict:
    """Accuracy of the last epoch, cost, and the losses along the way: by name,
    ``loss`` being the model's own."""
    rows = []
    for path in sorted(glob.glob(osp.join(work_dir, '*/vis_data/*.json'))):
        if osp.basename(path) == 'scalars.json':
            with open(path) as file:
                rows += [json.loads(line) for line in file]
    names = sorted({key for row in rows for key in row if 'loss' in key})
    last = sorted(glob.glob(osp.join(work_dir, 'epoch_*.pth')))[-1]
    macs = plan_of(read_checkpoint(last)).totals(convs_only=True)['macs']
    return dict(
        conv_macs=macs['after'] / macs['before'],
        top1=[r for r in rows if 'accuracy/top1' in r][-1]['accuracy/top1'],
        losses={
            name: [[r['step'], round(r[name], 4)] for r in rows if name in r]
            for name in names
        })


def to_markdown(runs: list) -> str:
    lines = [
        '| recipe | epochs | conv MACs kept | top-1, last epoch | seeds | '
        'date |',
        '|---|---|---|---|---|---|'
    ]
    groups = {}
    for entry in runs:
        key = entry['recipe'], entry['epochs']
        groups.setdefault(key, []).append(entry)
    for (recipe, epochs), group in groups.items():
        top1 = [r['top1'] for r in group]
        spread = f' ± {(max(top1) - min(top1)) / 2:.2f}' if top1[1:] else ''
        lines.append(f'| {recipe} | {epochs} | {group[0]["conv_macs"]:.4f} | '
                     f'{mean(top1):.2f}{spread} | {len(group)} | '
                     f'{max(r["date"] for r in group)[:10]} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    args = parse_args()
    path = f'{args.out}.json'
    result = dict(runs=[])
    if osp.isfile(path):
        with open(path, encoding='utf-8') as file:
            result = json.load(file)
    done = {(r['recipe'], r['seed'], r['epochs']) for r in result['runs']}
    todo = [(recipe, seed)
            for seed, recipe in itertools.product(args.seeds, args.recipes)
            if (recipe, seed, args.epochs) not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [pool.submit(run, *key, args) for key in todo]
        for future in track(
                as_completed(futures), total=len(todo), console=Console()):
            result['runs'].append(future.result())
            result.update(
                date=datetime.now().isoformat(timespec='seconds'),
                machine=f'{platform.machine()}, {os.cpu_count()} cores',
                versions=dict(
                    mmbasis=mmbasis.__version__, torch=torch.__version__),
                checkpoint=osp.basename(args.checkpoint))
            order = list(RECIPES)
            result['runs'].sort(key=lambda r: (order.index(r['recipe']), r[
                'epochs'], r['seed']))
            write_atomically(path, json.dumps(result, indent=1) + '\n')
            write_atomically(f'{args.out}.md', to_markdown(result['runs']))


if __name__ == '__main__':
    main()
