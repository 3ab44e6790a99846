# Copyright (c) mmbasis authors. All rights reserved.
"""What a training step of ResNet-56 on CIFAR launches, in two checkouts.

On a GPU such steps are bound by launches, not by arithmetic. So this counts,
in whole steps (preprocessing, forward, backward, optimizer), the ATen
operators that are dispatched: all of them, those that are no views, and those
that wait for a number (``.item()``, ``bool(tensor)``). Optimizers are
``foreach``, as they are on a GPU by default. Seconds are those of a CPU, of
forward and backward alike. Weights and images are random: counts and time
hardly depend on them.

Each run is a process of its own; the checkouts take turns, so that both meet
the same machine:

    python tools/benchmarks/step_cost.py OTHER_CHECKOUT \\
        --out docs/results/step_cost
"""
import argparse
import json
import os
import os.path as osp
import platform
import subprocess
from datetime import datetime
from statistics import median

from bench_utils import command, run_in_checkout

HERE = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
#: rows: what is trained, and whether in mixed precision
ROWS = ('dense', 'basis', 'basis, teacher', 'basis, teacher, orthogonality',
        'basis, teacher, bfloat16')
PROGRAM = """
import json, sys, time
from collections import Counter
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample
from torch.utils._python_dispatch import TorchDispatchMode
import mmbasis
from mmbasis.models import BasisModel
from mmbasis.optim import CPUAmpOptimWrapper

row, size, steps, large = sys.argv[1], *map(int, sys.argv[2:5])
init_default_scope('mmpretrain')
torch.manual_seed(0)
net = MODELS.build(dict(
    type='ImageClassifier', backbone=dict(type='mmbasis.CifarResNet',
    depth=56), neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
    data_preprocessor=dict(type='ClsDataPreprocessor', mean=[125.] * 3,
    std=[60.] * 3, num_classes=10)))
net.init_weights()


def batch(size):
    return dict(
        inputs=torch.randint(0, 256, (size, 3, 32, 32), dtype=torch.uint8),
        data_samples=[DataSample().set_gt_label(i % 10) for i in range(size)])


model = net
if row != 'dense':
    teach = 'teacher' in row and dict(terms=[
        dict(module='head.fc', type='kl', weight=.7),
        dict(module='backbone.layer[1-3]', type='mse', weight=10.)])
    orthogonality = dict(weight=1e-3) if 'orthogonality' in row else None
    model = BasisModel(net, distillation=teach, orthogonality=orthogonality,
        planner=dict(type='BudgetPlanner', macs=.359, data_aware=False))
    model.has_weights = True
    model.compress([batch(8)])
model.train()
wrapper = CPUAmpOptimWrapper if 'bfloat16' in row else OptimWrapper
optim = wrapper(torch.optim.SGD(
    model.parameters(), lr=1e-3, momentum=.9, nesterov=True, foreach=True))


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        view = any(x.alias_info is not None and not x.alias_info.is_write
                   for x in returns)
        self.found['operators'] += 1
        launches = not view and not any(
            x in str(function) for x in ('empty', 'profiler'))
        self.found['launches'] += launches
        self.found['waits'] += '_local_scalar_dense' in str(function)
        return function(*args, **(kwargs or {}))


def counted(data):
    model.train_step(data, optim)
    with Count() as count:
        model.train_step(data, optim)
    return dict(count.found)


counts = {str(n): counted(batch(n)) for n in {size, large}}
data, seconds, busy = batch(size), [], []
for step in range(steps + 3):
    start, cpu = time.perf_counter(), time.process_time()
    model.train_step(data, optim)
    if step >= 3:
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - cpu)
print('RESULT', json.dumps(dict(
    file=mmbasis.__file__, counts=counts, seconds=seconds, busy=busy,
    torch=torch.__version__)))
"""


def run(checkout: str, row: str, args: argparse.Namespace) -> dict:
    """Take some steps with the code of a checkout."""
    return run_in_checkout(PROGRAM, checkout, row, args.batch_size, args.steps,
                           args.large)


def measure(checkouts: dict, args: argparse.Namespace) -> dict:
    """Counts, and medians of the steps of all repeats, in milliseconds."""
    runs: dict = {}
    for _ in range(args.repeats):
        for row in ROWS:
            for name, checkout in checkouts.items():
                runs.setdefault((row, name), []).append(
                    run(checkout, row, args))
                print(row, name, flush=True)
    return {
        row: {
            name: dict(
                counts=runs[row, name][0]['counts'],
                **{
                    f'{key}_ms': round(1e3 * median(
                        x for one in runs[row, name] for x in one[key]), 1)
                    for key in ('seconds', 'busy')
                }) for name in checkouts
        }
        for row in ROWS
    }


def markdown(result: dict, args: argparse.Namespace) -> str:
    """The table, before and after side by side."""
    head = ['training', f'operators, batch {args.batch_size}', 'launches',
            'waits', f'launches, batch {args.large}',
            f'ms, batch {args.batch_size}', 'CPU ms']
    lines = [head, ['---'] * len(head)]
    for row, found in result['rows'].items():
        cells = []
        for x in found.values():
            small = x['counts'][str(args.batch_size)]
            large = x['counts'][str(args.large)]
            cells.append([
                *(small[k] for k in ('operators', 'launches', 'waits')),
                large['launches'], x['seconds_ms'], x['busy_ms']
            ])
        lines.append([row, *(' → '.join(map(str, x)) for x in zip(*cells))])
    about = [f'{k}: {v}' for k, v in result.items() if k != 'rows']
    return '\n'.join([
        '# What a training step launches', '',
        'ResNet-56, basis with 0.359 of the MACs; the teacher is compared in '
        'the logits and in three stages. What is counted: '
        '`tools/benchmarks/step_cost.py`. Before → after. Rows whose code is '
        'the same (dense) show how much of the times is noise.', '',
        *(f'| {" | ".join(map(str, line))} |' for line in lines), '',
        *(f'- {line}' for line in about)]) + '\n'


def main() -> None:
    """Count and time both in turns."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('before', help='folder of the other checkout')
    parser.add_argument('--revision', help='of it, if it is no repository')
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--large', type=int, default=128)
    parser.add_argument('--steps', type=int, default=15)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out', required=True, help='path without suffix')
    args = parser.parse_args()
    checkouts = dict(before=args.before, after=HERE)
    revisions = {
        name: name == 'before' and args.revision or subprocess.check_output(
            ['git', 'describe', '--always', '--dirty'], cwd=checkout,
            text=True).strip()
        for name, checkout in checkouts.items()
    }
    rows = measure(checkouts, args)
    result = dict(
        date=datetime.now().isoformat(timespec='seconds'),
        machine=f'{platform.machine()}, {os.cpu_count()} cores',
        python=platform.python_version(),
        command=command(),
        threads=os.environ.get('OMP_NUM_THREADS', 'default'),
        revisions=revisions,
        rows=rows)
    with open(args.out + '.json', 'w', encoding='utf-8') as file:
        file.write(json.dumps(result, indent=1) + '\n')
    with open(args.out + '.md', 'w', encoding='utf-8') as file:
        file.write(markdown(result, args))


if __name__ == '__main__':
    main()
