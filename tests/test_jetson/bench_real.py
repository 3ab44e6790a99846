# Copyright (c) mmbasis authors. All rights reserved.
"""Measures the tool itself, for real, in ONNX Runtime on this machine.

1. Two runs of ``run`` on every pair of models must agree on the speed-up
   within 5 %.
2. The process that reads power must cost less than 1 % of FPS: windows with
   and without it, one after the other, compared in pairs. It reads the rails
   of a fake AGX Xavier, as many files as on the board.

It takes minutes and wants a quiet machine, so pytest does not collect it::

    python tests/test_jetson/bench_real.py \
        --pair resnet56.onnx resnet56_basis.onnx \
        --pair resnet50.onnx resnet50_basis.onnx --out real.json
"""
import argparse
import os
import shutil
import sys
import tempfile

import jetson_helpers as helpers
from jetson.backends import Options, open_session
from jetson.report import ratio
from jetson.sampler import Sampler
from jetson.stats import paired_ratio
from jetson.util import write_json
from jetson_boards import make_board

AGREEMENT = 0.05
COST = 0.01


def agreement(pair, args, folder):
    """Runs twice; returns both speed-ups and by how much they differ."""
    found = []
    for i in range(2):
        out = os.path.join(folder, 'run%d' % i)
        status, table, err = helpers.program(
            'run',
            '--model',
            'dense=' + pair[0],
            '--model',
            'basis=' + pair[1],
            '--backend',
            'onnxruntime',
            '--threads',
            args.threads,
            '--power',
            'none',
            '--repeats',
            args.repeats,
            '--min-seconds',
            args.seconds,
            '--min-count',
            '20',
            '--out',
            out,
            timeout=7200)
        if status:
            raise SystemExit(err)
        sys.stderr.write(table + '\n\n')
        result = helpers.result_of(out)
        found.append(
            dict(
                result['comparisons'][0]['fps'],
                flags=[f['text'] for f in result['flags']],
                fps=[m['summary']['fps'] for m in result['models']]))
        shutil.rmtree(out)
    difference = abs(found[0]['ratio'] / found[1]['ratio'] - 1)
    return dict(
        models=pair,
        runs=found,
        difference=difference,
        passed=difference <= AGREEMENT)


def sampler_cost(model, args, folder):
    """Returns FPS with the sampler over FPS without, from pairs."""
    session = open_session('onnxruntime', model, Options(threads=args.threads))
    root = make_board(os.path.join(folder, 'board'), 'xavier_jp4')
    session.warm_up(2, 30)
    rates, loads = {True: [], False: []}, []
    for i in range(args.pairs):
        # The order alternates, so that a drift does not favour one side.
        for on in (i % 2 == 0, i % 2 == 1):
            sampler = Sampler('sysfs', root).start() if on else None
            session.warm_up(0.3, 0.3)
            window = session.window(args.pair_seconds, 5)
            rates[on].append(window['count'] /
                             (window['end'] - window['start']))
            if sampler:
                load = sampler.stop()['load']
                loads.append(load['cpu_s'] / load['seconds'])
        sys.stderr.write('pair {} of {}\r'.format(i + 1, args.pairs))
    session.close()
    found = paired_ratio(rates[True], rates[False])
    return dict(
        found,
        model=model,
        pairs=args.pairs,
        share_of_a_core=sum(loads) / len(loads),
        passed=found['ratio'] > 1 - COST,
        shown=found['low'] is not None and found['low'] > 1 - COST)


def main():
    """Runs both measurements; fails if one does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--pair',
        nargs=2,
        action='append',
        required=True,
        metavar=('DENSE', 'BASIS'))
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--seconds', type=float, default=5)
    parser.add_argument('--pairs', type=int, default=20)
    parser.add_argument('--pair-seconds', type=float, default=3)
    parser.add_argument('--out', help='also write JSON')
    args = parser.parse_args()
    folder = tempfile.mkdtemp(prefix='bench_real_')
    try:
        agreements = [agreement(p, args, folder) for p in args.pair]
        cost = sampler_cost(args.pair[0][0], args, folder)
    finally:
        shutil.rmtree(folder)
    for a in agreements:
        print('{}: speed-up {} and {}, {:.1%} apart: {}'.format(
            os.path.basename(a['models'][1]), ratio(a['runs'][0]),
            ratio(a['runs'][1]), a['difference'],
            'holds' if a['passed'] else 'DOES NOT HOLD'))
    print('sampler: FPS with / without {}, {:.2%} of a core: {}'.format(
        ratio(cost), cost['share_of_a_core'], 'holds' if cost['shown'] else
        'holds on average, the interval is too wide to show it'
        if cost['passed'] else 'DOES NOT HOLD'))
    if args.out:
        write_json(args.out, dict(agreement=agreements, sampler=cost))
    return 0 if cost['passed'] and all(a['passed'] for a in agreements) else 1


if __name__ == '__main__':
    sys.exit(main())
