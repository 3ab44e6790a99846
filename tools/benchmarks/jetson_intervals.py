# Copyright (c) mmbasis authors. All rights reserved.
"""How often the 95 % interval of jetson_bench covers the true ratio.

Runs are simulated: the order of the windows and the interval are the tool's
own, the speed of a window is the model's, times a drift, times noise that
remembers the last window, times an outlier now and then. Writes a JSON log
and a table.

    python tools/benchmarks/jetson_intervals.py --out \\
        docs/results/jetson_intervals
"""
import argparse
import json
import math
import os.path as osp
import platform
import random
import sys
import time

from bench_utils import command

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from jetson.protocol import Settings, schedule  # noqa: E402
from jetson.stats import (  # noqa: E402
    cut_off,
    deviation,
    mean,
    student_t95,
)
from jetson.summary import add_comparisons  # noqa: E402

RATIOS = {'equal': 1.0, 'unequal': 1.6}
#: what disturbs a run, in logarithms of the speed: ``drift`` per window of the
#: whole run, ``settling`` (how much is lost, over how many windows), ``noise``
#: per window with ``memory`` of the window before, ``outliers`` (share of
#: windows, mean loss), ``louder`` (times the noise of the second model)
SCENARIOS = {
    'noise': dict(noise=.005),
    'drift': dict(noise=.005, drift=-.005),
    'drift, little noise': dict(noise=.0005, drift=-.005),
    'drift, memory 0.5': dict(noise=.005, drift=-.005, memory=.5),
    'drift, memory 0.8': dict(noise=.005, drift=-.005, memory=.8),
    'drift, memory 0.95': dict(noise=.005, drift=-.005, memory=.95),
    'small outliers': dict(noise=.005, outliers=(.05, .02)),
    'large outliers': dict(noise=.005, outliers=(.1, .1)),
    'drift, memory, outliers': dict(
        noise=.005, drift=-.005, memory=.5, outliers=(.05, .1)),
    'drift, memory, many outliers': dict(
        noise=.005, drift=-.005, memory=.8, outliers=(.3, .1)),
    'settling, memory, outliers': dict(
        noise=.005, settling=(-.1, 8), memory=.5, outliers=(.05, .1)),
    'drift, one model 3 times as noisy': dict(
        noise=.002, drift=-.005, louder=3),
}
#: what no order of windows can tell from a property of the model
LIMIT = 'a lasting trouble hits one model twice as hard'
SCENARIOS[LIMIT] = dict(noise=.002, drift=-.005, memory=.8, louder=2)


def speeds(windows, rng, noise, drift=0., settling=None, memory=0.,
           outliers=(0., 1.), louder=1.):
    """Logarithms of what disturbs each window of a run.

    Args:
        windows (list[int]): The model of each window, in running order.
        rng (random.Random): Where chance comes from.
        **: See ``SCENARIOS``.

    Returns:
        list[float]: One per window.
    """
    found, last = [], rng.gauss(0, 1)
    for i, model in enumerate(windows):
        if i:
            last = memory * last + math.sqrt(1 - memory**2) * rng.gauss(0, 1)
        value = drift * i + noise * last * (louder if model else 1)
        if settling:
            value += settling[0] * (1 - math.exp(-i / settling[1]))
        if rng.random() < outliers[0]:
            value -= rng.expovariate(1 / outliers[1])
        found.append(value)
    return found


def by_tool(ratio, rng, repeats, scenario):
    """The tool's ratio and interval in one simulated run."""
    order = schedule(2, repeats, rng)
    flat = [model for block in order for model in block]
    windows = [[], []]
    for i, value in enumerate(speeds(flat, rng, **scenario)):
        fps = (ratio if flat[i] else 1.) * math.exp(value)
        windows[flat[i]].append(
            dict(block=i // len(order[0]), fps=fps, images=1, power=None,
                 latency_ms=dict(p50=1 / fps)))
    result = dict(
        baseline='a',
        models=[dict(name=n, windows=w) for n, w in zip('ab', windows)])
    add_comparisons(result)
    return result['comparisons'][0]['fps']


def in_turn(ratio, rng, repeats, scenario):
    """What the tool did before: A, B, A, B, and Student's t on the pairs."""
    found = speeds([0, 1] * repeats, rng, **scenario)
    logs = [
        math.log(ratio) + b - a for a, b in zip(found[::2], found[1::2])
    ]
    half = student_t95(repeats - 1) * deviation(logs) / math.sqrt(repeats)
    return dict(low=math.exp(mean(logs) - half),
                high=math.exp(mean(logs) + half))


def coverage(method, ratio, repeats, trials, **scenario):
    """How often an interval holds the true ratio, and its mean half width.

    Args:
        method (callable): ``by_tool`` or ``in_turn``.
        ratio (float): The true one.
        repeats (int): Blocks, or pairs.
        trials (int): Simulated runs; their seed is fixed.
        **scenario: See ``SCENARIOS``.

    Returns:
        tuple[float, float]: 0 to 1; as a share of the ratio.
    """
    rng, hits, width = random.Random(int(1000 * ratio)), 0, 0.
    for _ in range(trials):
        found = method(ratio, rng, repeats, scenario)
        hits += found['low'] <= ratio <= found['high']
        width += (found['high'] - found['low']) / 2 / ratio
    return hits / trials, width / trials


def run(trials):
    """Simulate everything; returns the log."""
    repeats = Settings().repeats
    log = dict(
        date=time.strftime('%Y-%m-%d %H:%M'),
        machine=platform.machine(),
        python=platform.python_version(),
        command=command(),
        repeats=repeats,
        counted=cut_off(repeats)[1],
        trials=trials,
        coverage={})
    for name, scenario in SCENARIOS.items():
        row = log['coverage'][name] = dict(scenario=scenario)
        for kind, ratio in RATIOS.items():
            row[kind], row['half_width'] = coverage(by_tool, ratio, repeats,
                                                    trials, **scenario)
        row['in_turn'] = coverage(in_turn, 1., 5, trials, **scenario)[0]
    return log


def markdown(log):
    """The table for people."""
    chance = 2 * math.sqrt(.05 * .95 / log['trials'])
    lines = [
        '# Does the interval of jetson_bench hold what it promises?', '',
        f'How often the 95 % interval covers the true ratio, in '
        f'{log["trials"]} simulated runs per figure, with the default of '
        f'{log["repeats"]} blocks. By counting signs it should be '
        f'{log["counted"]:.3f}, whatever disturbs the windows; a figure may '
        f'be off by {chance:.3f} by chance. Two models are equal, or one is '
        '1.6 times faster. The last column is what the tool did before: A, '
        "B, A, B, five times, and Student's t.", '',
        '| what disturbs | equal | unequal | half width, % | A, B, A, B |',
        '| --- | --- | --- | --- | --- |'
    ]
    for name, row in log['coverage'].items():
        lines.append(f'| {name} | {row["equal"]:.3f} | {row["unequal"]:.3f} '
                     f'| {100 * row["half_width"]:.2f} '
                     f'| {row["in_turn"]:.3f} |')
    lines += [
        '', 'Drift: 0.5 % of the speed per window. Memory: the correlation '
        'with the window before. Settling: 10 % lost over some 8 windows. '
        'Outliers lose 2 or 10 % on average, in 5, 10 or 30 % of the windows. '
        'The last row is a limit: the order makes up for what happens to the '
        'board, not for what happens to one model and lasts over blocks. All '
        'parameters are in the log.', ''
    ]
    lines += [
        f'- {key}: {log[key]}'
        for key in ('date', 'machine', 'python', 'command')
    ]
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--trials', type=int, default=5000)
    parser.add_argument('--out', required=True)
    args = parser.parse_args()
    log = run(args.trials)
    with open(args.out + '.json', 'w', encoding='utf-8') as file:
        json.dump(log, file, indent=1)
        file.write('\n')
    with open(args.out + '.md', 'w', encoding='utf-8') as file:
        file.write(markdown(log))


if __name__ == '__main__':
    main()
