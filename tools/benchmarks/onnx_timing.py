# Copyright (c) mmbasis authors. All rights reserved.
"""Times ONNX files in turns, each turn in a process of its own that has loaded
NumPy and ONNX Runtime and nothing else.

A machine that is shared with others changes its speed for minutes, not by the
same factor for all files: on two cores of one, half a YOLOX-s took 0.49 of the
dense one at full speed and 0.53 at other times (docs/results/
machine_speed.json). So files are timed while it runs at full speed
(tools/jetson/pace.py); turns in which it did not do not count.

Benchmarks call `time_together`, which runs this file for each turn:

    echo '{"paths": ["a.onnx"], "shape": [1, 3, 224, 224], "threads": 2,
           "best_ms": null, "max_wait": 60}' \\
        | python tools/benchmarks/onnx_timing.py
"""
import json
import os.path as osp
import subprocess
import sys
import time
from typing import Any, Dict, List, Mapping, Sequence, Tuple

sys.path.insert(0, osp.dirname(osp.dirname(osp.abspath(__file__))))

from jetson.pace import TOLERANCE, Pace  # noqa: E402

#: what a turn lasts at least: runs before the timed ones, runs, seconds; short
#: beside the seconds for which a shared machine keeps its speed
WARM_UP, RUNS, SECONDS = 5, 5, .3
#: how many turns there are at most, as a multiple of those that are to count
MOST = 3


def time_together(paths: Mapping[str, str], shape: Sequence[int],
                  threads: int, turns: int,
                  max_wait: float = 60) -> Dict[str, List[float]]:
    """Latencies of ONNX files with one input, measured in turns.

    Args:
        paths (Mapping[str, str]): Files by name.
        shape (Sequence[int]): Of the input.
        threads (int): Of ONNX Runtime.
        turns (int): How many turns at full speed count. In each, all files
            are loaded and timed, one session alive at a time; the order is
            reversed from one to the next.
        max_wait (float): Seconds that a file waits for full speed; with 0 all
            turns count.

    Returns:
        dict[str, list[float]]: The median latency in each turn, ms, by name.

    Raises:
        subprocess.CalledProcessError: If a file does not run; its message is
        on stderr.
        RuntimeError: If the machine hardly ever runs at its full speed.
    """
    order, best = list(paths), None
    seen: List[Tuple[float, Dict[str, float]]] = []
    good: List[Dict[str, float]] = []
    for _ in range(MOST * turns):
        turn = _run_turn([paths[x] for x in order], shape, threads, best,
                         max_wait)
        best = turn['best_ms']
        seen.append((turn['product_ms'], dict(zip(order, turn['latencies']))))
        good = [
            x for product, x in seen
            if not max_wait or product <= TOLERANCE * best
        ]
        if len(good) == turns:
            return {name: [x[name] for x in good] for name in paths}
        order.reverse()
    raise RuntimeError(
        f'the machine ran at its full speed in {len(good)} of {len(seen)} '
        f'turns, and {turns} are needed: something else runs on it')


def _run_turn(paths: List[str], shape: Sequence[int], threads: int,
              best_ms: Any, max_wait: float) -> Dict[str, Any]:
    asked = dict(
        paths=paths,
        shape=list(shape),
        threads=threads,
        best_ms=best_ms,
        max_wait=max_wait)
    done = subprocess.run([sys.executable, __file__],
                          input=json.dumps(asked),
                          stdout=subprocess.PIPE,
                          text=True,
                          check=True)
    return json.loads(done.stdout)


def time_file(path: str, shape: Sequence[int], threads: int, pace: Pace,
              max_wait: float) -> Tuple[float, float]:
    """The median latency of a file in a session of its own, and the matrix
    product beside it, ms."""
    import numpy as np
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options,
                                           ['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    feed = {name: np.random.rand(*shape).astype(np.float32)}
    for _ in range(WARM_UP):
        session.run(None, feed)

    def latency() -> float:
        session.run(None, feed)  # the product has filled the caches
        times: List[float] = []
        while len(times) < RUNS or sum(times) < SECONDS:
            start = time.perf_counter()
            session.run(None, feed)
            times.append(time.perf_counter() - start)
        return float(np.median(times)) * 1e3

    return pace.at_full_speed(latency, max_wait)


def main() -> None:
    """One turn: read what is asked for from stdin, print what was found."""
    asked = json.load(sys.stdin)
    pace = Pace(asked['best_ms'])
    timed = [
        time_file(x, asked['shape'], asked['threads'], pace, asked['max_wait'])
        for x in asked['paths']
    ]
    latencies, products = zip(*timed)
    print(
        json.dumps(
            dict(
                latencies=latencies,
                product_ms=max(products),
                best_ms=pace.best_ms)))


if __name__ == '__main__':
    main()
