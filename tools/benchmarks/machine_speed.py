# Copyright (c) mmbasis authors. All rights reserved.
"""Does this machine keep its speed?

Times, again and again, a copy of 64 MB, a matrix product of a few ms and ONNX
files of one input. On a machine that is shared with others the product has two
levels, minutes long, where the copy has one: half of a network is then not the
same fraction of the whole one at all times.

    python tools/benchmarks/machine_speed.py dense.onnx compressed.onnx \\
        --input-shape 1x3x640x640 --seconds 200 --out machine_speed.json
"""
import argparse
import json
import os.path as osp
import platform
import time
from typing import Any, Callable, Dict, List

import numpy as np
import onnxruntime
from bench_utils import command


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+')
    parser.add_argument(
        '--input-shape',
        type=lambda text: [int(x) for x in text.split('x')],
        required=True)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--seconds', type=float, default=200.)
    parser.add_argument('--out', required=True, help='the log (JSON)')
    return parser.parse_args()


def median_ms(run: Callable[[], Any], count: int) -> float:
    """The median time of some runs."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return round(float(np.median(times)) * 1e3, 3)


def one_row(args: argparse.Namespace) -> Dict[str, Any]:
    """One time of each, one session alive at a time."""
    source = np.random.rand(8 << 20)
    target = np.empty_like(source)
    matrix = np.random.rand(600, 600)
    row: Dict[str, Any] = dict(
        time=time.strftime('%H:%M:%S'),
        copy=median_ms(lambda: np.copyto(target, source), 7),
        product=median_ms(lambda: matrix.dot(matrix), 5))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    for path in args.files:
        session = onnxruntime.InferenceSession(path, options,
                                               ['CPUExecutionProvider'])
        name = session.get_inputs()[0].name
        feed = {name: np.random.rand(*args.input_shape).astype(np.float32)}
        median_ms(lambda s=session, x=feed: s.run(None, x), 2)
        row[osp.splitext(osp.basename(path))[0]] = median_ms(
            lambda s=session, x=feed: s.run(None, x), 5)
    return row


def main() -> None:
    """Measure until the time is over; write the log."""
    args = parse_args()
    rows: List[Dict[str, Any]] = []
    end = time.time() + args.seconds
    while time.time() < end:
        rows.append(one_row(args))
        print(*rows[-1].values(), flush=True)
    report = dict(
        date=time.strftime('%Y-%m-%d'),
        command=command(),
        machine=platform.machine(),
        numpy=np.__version__,
        onnxruntime=onnxruntime.__version__,
        rows=rows)
    with open(args.out, 'w', encoding='utf-8') as file:
        json.dump(report, file, indent=1)
        file.write('\n')


if __name__ == '__main__':
    main()
