# Copyright (c) mmbasis authors. All rights reserved.
"""Forms of layers in ONNX Runtime on one core of this machine, for
roofline.py: time over that of the dense layer or network, predicted and
measured in processor time (others use the machine), taking turns."""
import dataclasses
import time
from statistics import median

import numpy as np

from mmbasis.planning.devices import device
from mmbasis.planning.kernels import Convolution

# channels, side and window; rank and input rank of forms
LAYERS = {
    (64, 56, 3): [(16, None), (13, None), (None, 16), (32, 32)],
    (128, 28, 3): [(48, None), (45, None), (None, 48), (64, 64), (16, None)],
    (256, 14, 3): [(112, None), (109, None), (None, 112), (144, 144)],
    (512, 7, 3): [(224, None), (221, None), (None, 224), (304, 304)],
    (256, 14, 1): [(96, None), (93, None)],
    (1024, 14, 1): [(256, None), (253, None)],
}
DENSE = (None, None)


class Graph:
    """An ONNX graph with random weights, written op by op."""

    def __init__(self):
        self.nodes, self.weights = [], []
        self.random = np.random.default_rng(0)

    def add(self, op, *inputs, **attributes):
        from onnx import helper
        name = f'{op}{len(self.nodes)}'
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        return name

    def conv(self, x, inputs, outputs, size, stride=1):
        from onnx import numpy_helper
        names = [f'w{len(self.nodes)}', f'b{len(self.nodes)}']
        window = [size] * 2 if isinstance(size, int) else size
        scale = (inputs * window[0] * window[1])**-.5
        for name, shape in zip(names, ((outputs, inputs, *window),
                                       (outputs, ))):
            self.weights.append(
                numpy_helper.from_array(
                    (self.random.standard_normal(shape) * scale).astype('f'),
                    name))
        return self.add(
            'Conv', x, *names, pads=[side // 2 for side in window] * 2,
            strides=[stride] * 2)

    def form(self, x, layer, rank, input_rank):
        size = round(layer.window**.5)
        stride = round((layer.in_positions / layer.out_positions)**.5)
        inputs = layer.in_channels
        if input_rank:
            x, inputs = self.conv(x, inputs, input_rank, 1), input_rank
        x = self.conv(x, inputs, rank or layer.out_channels, size, stride)
        return self.conv(x, rank, layer.out_channels, 1) if rank else x

    def runner(self, shape, output):
        import onnxruntime
        from onnx import TensorProto, helper
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
            for name, size in (('x', shape), (output, None))
        ]
        model = helper.make_model(
            helper.make_graph(self.nodes, 'g', ends[:1], ends[1:],
                              self.weights),
            opset_imports=[helper.make_opsetid('', 13)],
            ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, ['CPUExecutionProvider'])
        image = self.random.standard_normal(shape).astype('f')
        return lambda: session.run(None, {'x': image})


def in_a_row(layer, form, repeat=4):
    """A form several times, so that changing the layout at both ends weighs
    little."""
    graph, x = Graph(), 'x'
    for _ in range(repeat):
        x = graph.form(x, layer, *form)
    side = round(layer.in_positions**.5)
    return graph.runner([1, layer.in_channels, side, side], x)


def resnet50(layers, plan):
    graph, parts = Graph(), iter(zip(layers, plan))

    def conv(x):
        layer, form = next(parts)
        return graph.form(x, layer, *form)

    x = graph.add('Relu', conv('x'))
    x = graph.add(
        'MaxPool', x, kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])
    for blocks in (3, 4, 6, 3):
        for index in range(blocks):
            y = graph.add('Relu', conv(graph.add('Relu', conv(x))))
            y = conv(y)
            x = graph.add(
                'Relu', graph.add('Add', y,
                                  x if index else conv(x)))
    return graph.runner([1, 3, 224, 224], graph.add('GlobalAveragePool', x))


def compare(runners, layers, plans, rounds):
    """Rows of plans against the first one, which is dense."""
    times = {name: [] for name in runners}
    for _ in range(rounds):
        for name, run in runners.items():
            start = time.thread_time()
            run()
            times[name].append(time.thread_time() - start)
    board = dataclasses.replace(device('cpu'), processors=1, peak=128e9)
    rows = {}
    for name, plan in plans.items():
        parts = [layer.kernels(*form) for layer, form in zip(layers, plan)]
        rows[name] = np.array([
            sum(kernel.macs for part in parts for kernel in part),
            sum(board.time(part) for part in parts),
            median(times[name])
        ])
    dense = next(iter(rows.values()))
    return {
        name: dict(
            zip(('macs', 'predicted', 'measured'),
                (row / dense).round(3).tolist()))
        for name, row in list(rows.items())[1:]
    }


def measure_layers(rounds=100):
    rows = {}
    for (channels, side, window), forms in LAYERS.items():
        layer = Convolution(channels, channels, window**2, side**2, side**2)
        head = f'{channels} channels, {side}x{side}, {window}x{window}'
        plans = {'dense': [DENSE]}
        for rank, inner in forms:
            plans[f'{head}, rank {rank or "-"}, input rank {inner or "-"}'] = [
                (rank, inner)]
        runners = {k: in_a_row(layer, plan[0]) for k, plan in plans.items()}
        rows.update(compare(runners, [layer], plans, rounds))
    return rows


def measure_resnet50(layers, plans, rounds=12):
    runners = {name: resnet50(layers, plan) for name, plan in plans.items()}
    return compare(runners, layers, plans, rounds)
