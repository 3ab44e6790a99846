# Copyright (c) mmbasis authors. All rights reserved.
"""Times ONNX files in turns, each turn in a process of its own that has loaded
NumPy and ONNX Runtime and nothing else.

A machine that is shared with others changes its speed for minutes, not by the
same factor for all files: on two cores of one, half a ResNet-50 took 0.49 of
the dense one at one minute and 0.57 ten minutes later. So files that are to be
compared take turns, over a time that is longer than that where it can be.

Benchmarks call `time_together`, which runs this file for each turn:

    echo '{"paths": ["a.onnx"], "shape": [1, 3, 224, 224], "threads": 2}' \\
        | python tools/benchmarks/onnx_timing.py
"""
import json
import subprocess
import sys
import time
from typing import Dict, List, Mapping, Sequence

#: what a turn lasts at least: runs before the timed ones, runs, seconds
WARM_UP, RUNS, SECONDS = 5, 10, .3


def time_together(paths: Mapping[str, str], shape: Sequence[int],
                  threads: int, turns: int) -> Dict[str, List[float]]:
    """Latencies of ONNX files with one input, measured in turns.

    Args:
        paths (Mapping[str, str]): Files by name.
        shape (Sequence[int]): Of the input.
        threads (int): Of ONNX Runtime.
        turns (int): How often each file is loaded and timed. Each turn is a
            process, and the order is reversed from one to the next. One
            session is alive at a time: beside the waiting threads of others,
            some files take up to twice as long, as chance has it.

    Returns:
        dict[str, list[float]]: The median latency in each turn, ms, by name.

    Raises:
        subprocess.CalledProcessError: If a file does not run; its message is
        on stderr.
    """
    order = list(paths)
    times: Dict[str, List[float]] = {name: [] for name in order}
    for _ in range(turns):
        asked = dict(
            paths=[paths[name] for name in order],
            shape=list(shape),
            threads=threads)
        done = subprocess.run([sys.executable, __file__],
                              input=json.dumps(asked),
                              stdout=subprocess.PIPE,
                              text=True,
                              check=True)
        for name, latency in zip(order, json.loads(done.stdout)):
            times[name].append(latency)
        order.reverse()
    return times


def one_turn(path: str, shape: Sequence[int], threads: int) -> float:
    """The median latency of a file in a session of its own, ms."""
    import numpy as np
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options,
                                           ['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    feed = {name: np.random.rand(*shape).astype(np.float32)}
    times: List[float] = []
    for _ in range(WARM_UP):
        session.run(None, feed)
    while len(times) < RUNS or sum(times) < SECONDS:
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def main() -> None:
    """One turn: read what is asked for from stdin, print the latencies."""
    asked = json.load(sys.stdin)
    print(
        json.dumps([
            one_turn(path, asked['shape'], asked['threads'])
            for path in asked['paths']
        ]))


if __name__ == '__main__':
    main()
