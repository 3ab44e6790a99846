# Copyright (c) mmbasis authors. All rights reserved.
"""What data-aware compression costs, against the way of the literature.

ResNet-50, 224x224, random weights and images. Times, in one run and
interleaved: the bare forward passes; ours (moments of outputs or of
pointwise inputs and, with --forms, of input channels, eigendecompositions,
bases and coefficients of all layers); input-side second moments with a
whitened SVD (unfolded inputs, Cholesky, SVD), as SVD-LLM and BALF do. Then,
once, everything that ``mmbasis.compress`` does
by default: statistics, gradients, plan and sequential reconstruction.

    python tools/benchmarks/statistics_cost.py --out statistics_cost.json
"""
import argparse
import copy
import json
import platform
import resource
import time
from datetime import datetime
from statistics import median

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope

from mmbasis.compression import Recipe, analyze, compress, make_plan
from mmbasis.layers import BasisLayer
from mmbasis.planning import BudgetPlanner, find_layers
from mmbasis.planning.layers import FORMS
from mmbasis.planning.statistics import LayerRecorder
from mmbasis.running import evaluation
from mmbasis.utils.io import write_atomically


def build() -> nn.Module:
    """ResNet-50 with the weights of its initialisation."""
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(type='ResNet', depth=50),
            neck=dict(type='GlobalAveragePooling')))
    model.init_weights()
    return model.eval()


def unfold(layer, x: torch.Tensor) -> torch.Tensor:
    """Patches of a convolution's input, shape ``(D, positions)``."""
    conv = layer.module
    x = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return x.transpose(0, 1).flatten(1)


class InputSide:
    """Second moments of unfolded inputs, ``D x D``, and a whitened SVD."""

    def __init__(self, layers) -> None:
        self.layers = layers
        self.moments = {
            layer.name: torch.zeros([layer.matrix_shape[2]] * 2)
            for layer in layers
        }

    def collect(self, model, batches) -> None:
        handles = []
        for layer in self.layers:

            def hook(module, args, output, layer=layer):
                patches = unfold(layer, args[0])
                self.moments[layer.name].addmm_(patches, patches.T)

            handles.append(layer.module.register_forward_hook(hook))
        with evaluation(model):
            for batch in batches:
                model(**batch)
        for handle in handles:
            handle.remove()

    def factorize(self) -> None:
        for layer in self.layers:
            moment = self.moments[layer.name]
            moment.diagonal().add_(1e-4 * moment.diagonal().mean())
            root = torch.linalg.cholesky(moment)
            weight = layer.kind.to_matrix(layer.module)[0].detach()
            left, values, right = torch.linalg.svd(
                weight @ root, full_matrices=False)
            # F = right^T root^-1
            torch.linalg.solve_triangular(root, right, upper=False, left=False)

    def bytes(self) -> int:
        return sum(m.numel() * m.element_size() for m in self.moments.values())


def ours(model, batches, forms) -> None:
    """Statistics, plan and factors, as :func:`mmbasis.compress` does."""
    planner = BudgetPlanner(macs=.5, forms=forms, loss_aware=False)
    recipe = Recipe.of(planner=planner)
    analysis = analyze(model, recipe, batches)
    plan = make_plan(recipe, analysis)
    for layer in analysis.layers:
        if layer.name in plan.layers:
            entry = plan.layers[layer.name]
            known = analysis.statistics[layer.name]
            basis = BasisLayer(
                layer.module,
                entry.rank,
                bias=True,
                input_rank=entry.input_rank,
                spatial=entry.spatial)
            basis.project(layer.module, known.spectrum.vectors, known.mean,
                          known.inputs, known.columns)


def everything(model, batches, forms) -> None:
    """The whole compression, on a copy."""
    planner = BudgetPlanner(macs=.5, forms=forms)
    compress(copy.deepcopy(model), planner, batches)


def our_bytes(model, forms) -> int:
    """Memory of the moments alone."""
    layers = [x for x in find_layers(model) if x.obstacle is None]
    narrow, split = (
        [x for x in layers if any(
            form in forms and not x.why_not(form) for form in some)]
        for some in (('input', 'both'), ('spatial', )))
    with LayerRecorder(layers, layers, narrow, split) as recorder:
        moments = [recorder.moments, recorder.inputs, recorder.columns]
        return sum(m.numel() * m.element_size()
                   for x in moments for m in x.values())


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def input_side(model, batches) -> int:
    layers = find_layers(model)
    method = InputSide(layers)
    method.collect(model, batches)
    method.factorize()
    return method.bytes()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--images', type=int, default=64)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument(
        '--forms', nargs='+', choices=FORMS, default=['output'])
    parser.add_argument('--out', help='JSON to write')
    args = parser.parse_args()
    model = build()
    batches = [
        dict(inputs=torch.randn(args.batch_size, 3, 224, 224))
        for _ in range(args.images // args.batch_size)
    ]

    def forward():
        with evaluation(model):
            for batch in batches:
                model(**batch)

    timed(forward)  # warm up
    times = {'forward': [], 'ours': [], 'input side': []}
    input_bytes = 0
    for _ in range(args.repeats):
        times['forward'].append(timed(forward))
        times['ours'].append(timed(ours, model, batches, args.forms))
        peak_ours = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        input_bytes = input_side(model, batches)
        times['input side'].append(time.perf_counter() - start)
    times['everything'] = [timed(everything, model, batches, args.forms)]
    peak_everything = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = {k: median(v) for k, v in times.items()}
    result = dict(
        date=datetime.now().isoformat(timespec='seconds'),
        machine=platform.processor() or platform.machine(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        images=args.images,
        forms=args.forms,
        seconds=times,
        median_seconds=seconds,
        speed_up_over_input_side=seconds['input side'] / seconds['ours'],
        ours_over_forward=seconds['ours'] / seconds['forward'],
        statistics_mb=dict(
            ours=our_bytes(model, args.forms) / 2**20,
            input_side=input_bytes / 2**20),
        peak_rss_mb=dict(
            ours=peak_ours / 2**10, everything=peak_everything / 2**10))
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        write_atomically(args.out, text + '\n')


if __name__ == '__main__':
    main()
