# Copyright (c) mmbasis authors. All rights reserved.
"""Time of 3x3 layers in all forms at the same MACs, over that of the dense
layer, for spatial_form.py: in ONNX Runtime on one core of this machine, in
processor time (others use the machine), taking turns; and by the models of
devices."""
import time
from statistics import median

from cpu_forms import Graph

from mmbasis.planning.devices import device
from mmbasis.planning.kernels import Kernel

#: channels and side of the layers of ResNet-50
LAYERS = ((64, 56), (128, 28), (256, 14), (512, 7))
BUDGETS = (.25, .5)
DEVICES = ('cpu', 'xavier-fp32', 'xavier-fp16', 'orin-nx-fp16', 't4-fp16',
           'h100-fp16')
#: ranks are multiples of this
ALIGNED = 8
#: a layer runs so often in a row, so that layouts at both ends weigh little
REPEAT = 4


def parts(form, channels, budget):
    """Window and output channels of each convolution of a form."""
    macs = budget * 9 * channels**2

    def rank(cost):
        return max(ALIGNED, round(macs / cost / ALIGNED) * ALIGNED)

    one, row, column, square = (1, 1), (1, 3), (3, 1), (3, 3)
    side = rank(10 * channels)
    # of equal ranks on both sides: 9 R^2 + 2 C R
    both = rank((channels**2 + 9 * macs)**.5 + channels)
    spatial = rank(6 * channels)
    return {
        'output': [(square, side), (one, channels)],
        'input': [(one, side), (square, channels)],
        'both': [(one, both), (square, both), (one, channels)],
        'spatial': [(column, spatial), (row, channels)],
        'dense': [(square, channels)],
    }[form]


def kernels(convs, channels, positions):
    """The kernels of the device model."""
    found = []
    for window, outputs in convs:
        found.append(Kernel(channels, outputs, positions, positions,
                            window[0] * window[1]))
        channels = outputs
    return found


def runner(convs, channels, side):
    """A function that runs the layer some times in a row."""
    graph, x = Graph(), 'x'
    for _ in range(REPEAT):
        inputs = channels
        for window, outputs in convs:
            x, inputs = graph.conv(x, inputs, outputs, window), outputs
    return graph.runner([1, channels, side, side], x)


def measure_times(rounds=100):
    """Rows of forms: MACs and times over those of the dense layer."""
    forms, rows = ('dense', 'output', 'input', 'both', 'spatial'), []
    for channels, side in LAYERS:
        for budget in BUDGETS:
            convs = {form: parts(form, channels, budget) for form in forms}
            runners = {form: runner(x, channels, side)
                       for form, x in convs.items()}
            times = {form: [] for form in forms}
            for _ in range(rounds):
                for form, run in runners.items():
                    start = time.thread_time()
                    run()
                    times[form].append(time.thread_time() - start)
            found = {}
            for form in forms:
                made = kernels(convs[form], channels, side**2)
                found[form] = dict(
                    macs=sum(x.macs for x in made),
                    onnxruntime=median(times[form]),
                    **{x: device(x).time(made) for x in DEVICES})
            for form in forms[1:]:
                rows.append(dict(
                    channels=channels, side=side, budget=budget, form=form,
                    ranks=[x for _, x in convs[form][:-1]],
                    **{key: round(float(value / found['dense'][key]), 3)
                       for key, value in found[form].items()}))
    return rows
