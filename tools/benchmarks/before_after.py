# Copyright (c) mmbasis authors. All rights reserved.
"""What compressing ResNet-50 costs, in two checkouts of mmbasis.

224x224, random weights and images, everything that ``mmbasis.compress`` does
by default; this checkout may also be given the forms that layers take. Each
run is a process of its own; the two checkouts take turns, so that both meet
the same machine. Where others use it, too, processor time says more than the
clock:

    python tools/benchmarks/before_after.py OTHER_CHECKOUT \
        --forms output input both \
        --out docs/results/compression_cost_forms.json
"""
import argparse
import json
import os
import os.path as osp
import platform
import subprocess
from datetime import datetime
from statistics import median

import torch
from bench_utils import command, run_in_checkout

HERE = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
PROGRAM = """
import json, resource, sys, time
from collections import Counter
import torch
from mmengine.registry import MODELS, init_default_scope
import mmbasis
images, size, *forms = sys.argv[1:]
images, size = int(images), int(size)
init_default_scope('mmpretrain')
torch.manual_seed(0)
from mmpretrain.structures import DataSample
model = MODELS.build(dict(
    type='ImageClassifier',
    # a last norm of zero in each block would keep all gradients from it
    backbone=dict(type='ResNet', depth=50, zero_init_residual=False),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=2048)))
model.init_weights()
model.eval()
batches = [
    dict(inputs=torch.randint(0, 256, (size, 3, 224, 224)),
         data_samples=[DataSample().set_gt_label(i) for i in range(size)])
    for _ in range(images // size)]
planner = dict(type='BudgetPlanner', macs=.5)
if forms:
    planner.update(forms=forms)
start, cpu = time.perf_counter(), time.process_time()
plan = mmbasis.compress(model, planner, batches)
print('RESULT', json.dumps(dict(
    file=mmbasis.__file__,
    cpu_seconds=time.process_time() - cpu,
    seconds=time.perf_counter() - start,
    peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    forms=Counter(getattr(x, 'form', 'output') for x in plan.layers.values()),
    macs=plan.totals()['macs'])))
"""
#: what is compared; processor time (user and system, of all threads) first
FIGURES = ('cpu_seconds', 'seconds', 'peak_rss_mb')


def run(checkout: str, args: argparse.Namespace, forms: list) -> dict:
    """Compress once with the code of a checkout."""
    threads = str(args.threads)
    return run_in_checkout(
        PROGRAM, checkout, args.images, args.batch_size, *forms,
        OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads,
        # idle threads that spin would count as work
        OMP_WAIT_POLICY='passive')


def main() -> None:
    """Run both in turns, and compare medians."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('before', help='folder of the other checkout')
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument(
        '--forms',
        nargs='+',
        default=[],
        metavar='FORM',
        help='what layers may become in this checkout (default: its default)')
    parser.add_argument('--out', required=True, help='JSON to write')
    args = parser.parse_args()
    runs = dict(before=[], after=[])
    for _ in range(args.repeats):
        for name, checkout, forms in (('before', args.before, []),
                                      ('after', HERE, args.forms)):
            runs[name].append(run(checkout, args, forms))
            print(name, runs[name][-1])
    revisions = {
        name: subprocess.check_output(
            ['git', 'rev-parse', '--short', 'HEAD'], cwd=checkout,
            text=True).strip()
        for name, checkout in (('before', args.before), ('after', HERE))
    }
    ratios = {
        key: median(x[key] for x in runs['after']) /
        median(x[key] for x in runs['before'])
        for key in FIGURES
    }
    result = dict(
        command=command(),
        date=datetime.now().isoformat(timespec='seconds'),
        machine=f'{platform.machine()}, {os.cpu_count()} cores',
        python=platform.python_version(),
        torch=torch.__version__,
        threads=args.threads,
        load_average=os.getloadavg(),
        images=args.images,
        forms=args.forms,
        revisions=revisions,
        after_over_before=ratios,
        runs=runs)
    with open(args.out, 'w', encoding='utf-8') as file:
        file.write(json.dumps(result, indent=1) + '\n')
    print(json.dumps(ratios))


if __name__ == '__main__':
    main()
