# Copyright (c) mmbasis authors. All rights reserved.
"""What the tests share: models, fake boards, running the program."""
import json
import os
import subprocess
import sys

import numpy as np

ROOT = os.path.dirname(
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TOOLS = os.path.join(ROOT, 'tools')
PROGRAM = os.path.join(TOOLS, 'jetson_bench.py')
SHARED = os.environ.get('MMBASIS_SHARED',
                        os.path.join(os.path.dirname(ROOT), 'shared'))

if TOOLS not in sys.path:
    sys.path.insert(0, TOOLS)

# Short but complete: all steps of the protocol happen.
QUICK = [
    '--repeats', '1', '--min-seconds', '0.3', '--min-count', '5',
    '--warm-seconds', '0.1', '--max-warm-seconds', '1', '--rewarm-seconds',
    '0.05', '--idle-seconds', '0.3'
]


def conv_model(path, channels=8, size=16, layers=1, dynamic=False):
    """Writes an ONNX file of a few convolutions; returns its path."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    rng = np.random.RandomState(0)
    nodes, weights, last = [], [], 'x'
    for i in range(layers):
        shape = (channels, 3 if i == 0 else channels, 3, 3)
        weights.append(
            numpy_helper.from_array(
                rng.randn(*shape).astype(np.float32) * .1, 'w%d' % i))
        out = 'y' if i == layers - 1 else 't%d' % i
        nodes.append(
            helper.make_node(
                'Conv', [last, 'w%d' % i], [out], pads=[1, 1, 1, 1]))
        last = out
    batch = 'n' if dynamic else 1
    graph = helper.make_graph(nodes, 'g', [
        helper.make_tensor_value_info('x', TensorProto.FLOAT,
                                      [batch, 3, size, size])
    ], [
        helper.make_tensor_value_info('y', TensorProto.FLOAT,
                                      [batch, channels, size, size])
    ], weights)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', 13)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return str(path)


def small_model(path, nodes, inputs, outputs, weights=()):
    """Writes an ONNX file of any nodes; returns its path.

    ``nodes`` are (operator, inputs, outputs, attributes); ``inputs`` and
    ``outputs`` have sizes by name, or None; ``weights`` arrays by name.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def values(sizes):
        return [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, s)
            for n, s in sizes.items()
        ]

    graph = helper.make_graph(
        [helper.make_node(o, i, r, **a)
         for o, i, r, a in nodes], 'g', values(inputs), values(outputs),
        [numpy_helper.from_array(v, k) for k, v in dict(weights).items()])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', 13)])
    model.ir_version = 8
    onnx.save(model, str(path))
    return str(path)


def write(root, path, text):
    """Writes a file of a fake system."""
    path = os.path.join(str(root), path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as f:
        f.write(text)
    return path


def script(root, path, text):
    """Writes a program of a fake system."""
    path = write(root, path, '#!/bin/sh\n' + text)
    os.chmod(path, 0o755)
    return path


def program(*args, **kwargs):
    """Runs the command line; returns (status, stdout, stderr)."""
    env = dict(os.environ, **kwargs.pop('env', {}))
    done = subprocess.run(
        [kwargs.pop('python', sys.executable), PROGRAM] +
        [str(a) for a in args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        timeout=kwargs.pop('timeout', 120),
        **kwargs)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def result_of(folder):
    """Reads the result of a run."""
    with open(os.path.join(str(folder), 'result.json')) as f:
        return json.load(f)
