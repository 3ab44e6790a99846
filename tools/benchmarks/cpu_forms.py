# Copyright (c) mmbasis authors. All rights reserved.
"""Convolutions of ONNX Runtime on this machine, for roofline.py: how long the
forms of a layer take against the dense layer, predicted and measured."""
import dataclasses
import time
from statistics import median

import numpy as np

from mmbasis.planning.devices import Convolution, device

# channels, side and window; rank and input rank of forms
MEASURED = {
    (64, 56, 3): [(16, None), (13, None), (None, 16), (32, 32)],
    (128, 28, 3): [(48, None), (45, None), (None, 48), (64, 64), (16, None)],
    (256, 14, 3): [(112, None), (109, None), (None, 112), (144, 144)],
    (512, 7, 3): [(224, None), (221, None), (None, 224), (304, 304)],
    (256, 14, 1): [(96, None), (93, None)],
    (1024, 14, 1): [(256, None), (253, None)],
}


def onnx_session(channels, side, window, rank, input_rank, repeat=4):
    """ONNX Runtime on one core, a form of a layer several times in a row, so
    that changing the layout at both ends weighs little."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    nodes, weights, random = [], [], np.random.default_rng(0)

    def conv(outputs, inputs, size):
        weight = random.standard_normal((outputs, inputs, size, size)) * .01
        name = f'w{len(nodes)}'
        weights.append(numpy_helper.from_array(weight.astype('f'), name))
        nodes.append(
            helper.make_node('Conv', [f't{len(nodes)}', name],
                             [f't{len(nodes) + 1}'], pads=[size // 2] * 4))

    for _ in range(repeat):
        if input_rank:
            conv(input_rank, channels, 1)
        conv(rank or channels, input_rank or channels, window)
        if rank:
            conv(channels, rank, 1)
    shape = [1, channels, side, side]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name in ('t0', f't{len(nodes)}')
    ]
    model = helper.make_model(
        helper.make_graph(nodes, 'form', ends[:1], ends[1:], weights),
        opset_imports=[helper.make_opsetid('', 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, ['CPUExecutionProvider'])
    image = random.standard_normal(shape).astype('f')
    return lambda: session.run(None, {'t0': image})


def measure(rounds=100):
    """Time of forms over dense on this machine, predicted and measured in
    processor time (others use the machine), taking turns."""
    keys = [(*layer, *form) for layer, ranks in MEASURED.items()
            for form in [(None, None), *ranks]]
    sessions = {key: onnx_session(*key) for key in keys}
    times = {key: [] for key in keys}
    for _ in range(rounds):
        for key, run in sessions.items():
            start = time.thread_time()
            run()
            times[key].append(time.thread_time() - start)
    board = dataclasses.replace(device('cpu'), processors=1, peak=48e9)
    rows = []
    for channels, side, window, rank, input_rank in keys:
        if not (rank or input_rank):
            dense = median(times[channels, side, window, None, None])
            continue
        layer = Convolution(channels, channels, window**2, side**2, side**2)
        form = layer.kernels(rank, input_rank)
        rows.append(dict(
            channels=channels, side=side, window=window, rank=rank,
            input_rank=input_rank,
            macs=round(sum(x.macs for x in form) / layer.kernels()[0].macs, 2),
            predicted=round(
                float(board.time(form) / board.time(layer.kernels())), 2),
            measured=round(median(
                times[channels, side, window, rank, input_rank]) / dense, 2)))
    return rows
