# Copyright (c) mmbasis authors. All rights reserved.
"""Is a spatial form (k x 1, then 1 x k) worth being one more candidate?

For each 3x3 convolution of a trained ResNet, by the second moments of real
activations: what each form loses at the same MACs, see spatial_fits.py. Then
the accuracy of the network with the same fraction in each of these layers: one
after the other is fitted to the outputs of the dense network (centred
regression, no loss, no shortcuts, no recalibration). And times, see
spatial_times.py. Numbers are written as they come; what is there already is
not run again.

    python tools/benchmarks/spatial_form.py \
        configs/mmpretrain/resnet56_cifar10.py resnet56.pth \
        --out docs/results/spatial_form
"""
import argparse
import copy
import json
import os
import os.path as osp
import platform
from datetime import datetime

import torch
import torch.nn as nn
import torch.nn.functional as F
from bench_utils import command
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from spatial_fits import COEFFICIENTS, EITHER_ORDER, FORMS, Layer
from spatial_tables import to_markdown
from spatial_times import measure_times

import mmbasis
from mmbasis.compression import load_weights, read_checkpoint
from mmbasis.compression.pipeline import take_batches
from mmbasis.datasets import calibration_dataloader
from mmbasis.models.backbones import CifarBasicBlock
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically
from mmbasis.utils.runner import evaluate

BUDGETS = (.15, .25, .36, .5)
#: share of the mean variance that pulls weights to those of before
RIDGE = 1e-3
BATCH = 64


def patches(module, x):
    """What the weights see, with a 1 below: ``(D + 1, positions)``."""
    x = F.unfold(x, 3, 1, module.padding, module.stride)
    x = x.transpose(0, 1).flatten(1).double()
    return torch.cat([x, torch.ones_like(x[:1])])


def centred(moment):
    """Mean and covariance of samples, given their second moment with a 1 at
    the end."""
    moment = moment / moment[-1, -1]
    mean = moment[:-1, -1:]
    return mean, moment[:-1, :-1] - mean @ mean.T


def stem(model, images):
    """What the first block takes, batch by batch."""
    net = model.backbone
    return [net.relu(net.bn1(net.conv1(x))) for x in images]


def blocks_of(model):
    return [(name, x) for name, x in model.named_modules()
            if isinstance(x, CifarBasicBlock)]


def watched(module, block, inputs):
    """Inputs and outputs of a layer inside a block, batch by batch, and the
    outputs of the block."""
    for x in inputs:
        seen = []
        handle = module.register_forward_hook(
            lambda _, args, y, seen=seen: seen.extend([args[0], y]))
        y = block(x)
        handle.remove()
        yield (*seen, y)


def layers_of(model, images):
    """The 3x3 layers by name, with covariances of their patches."""
    inputs, found = stem(model, images), {}
    for name, block in blocks_of(model):
        for part in ('conv1', 'conv2'):
            module, moment, outputs = getattr(block, part), 0., []
            for x, _, y in watched(module, block, inputs):
                samples = patches(module, x)
                moment = moment + samples @ samples.T
                outputs.append(y)
            found[f'{name}.{part}'] = Layer(
                module.weight.double(), centred(moment)[1], module.stride[0])
        inputs = outputs
    return found


def compress(teacher, images, form, budget):
    """The network with all layers in a form, and the MACs that are kept of
    these layers."""
    model, dense, kept = copy.deepcopy(teacher), 0, 0
    truth, inputs = stem(teacher, images), stem(model, images)
    for (_, reference), (_, block) in zip(blocks_of(teacher),
                                          blocks_of(model)):
        for part in ('conv1', 'conv2'):
            module, moment, after = getattr(block, part), 0., []
            wanted = watched(getattr(reference, part), reference, truth)
            for (x, *_), (_, y, out) in zip(watched(module, block, inputs),
                                            wanted):
                samples = torch.cat(
                    [y.transpose(0, 1).flatten(1).double(),
                     patches(module, x)])
                moment = moment + samples @ samples.T
                after.append(out)
            cost = fit(module, moment, form, budget)
            positions = y[0, 0].numel()
            dense += module.weight.numel() * positions
            kept += cost * positions
        inputs = [block(x) for x in inputs]
        truth = after
    return model, kept / dense


def fit(module, moment, form, budget):
    """Fit a layer to joint moments of what it should return and its patches;
    its MACs for one position."""
    count = module.out_channels
    mean, covariance = centred(moment)
    second, cross = covariance[count:, count:], covariance[:count, count:]
    ridge = RIDGE * second.diagonal().mean() * torch.eye(len(second)).double()
    prior = module.weight.double().flatten(1)
    weight = torch.linalg.solve(second + ridge, (cross + prior @ ridge).T).T
    layer = Layer(weight.view_as(module.weight), second, module.stride[0])
    _, ranks, weight = layer.fit(form, budget)
    weight = weight.reshape(count, -1)
    module.weight.copy_(weight.view_as(module.weight))
    bias = mean[:count] - weight @ mean[count:]
    module.bias = nn.Parameter(bias.flatten().float())
    return layer.cost(form, ranks)


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--out', required=True, help='path without ending')
    parser.add_argument('--images', type=int, default=256)
    parser.add_argument('--budgets', nargs='*', type=float, default=[.25, .36],
                        help='fractions in the whole network')
    parser.add_argument('--forms', nargs='*', choices=FORMS, default=FORMS)
    return parser.parse_args()


class Log:
    """Numbers in a file; what is there already is not computed again."""

    def __init__(self, path, **facts):
        self.path, self.result = path, {}
        if osp.isfile(path):
            with open(path, encoding='utf-8') as file:
                self.result = json.load(file)
        self.result.update(facts)

    def once(self, part, name, compute):
        rows = self.result.setdefault(part, {})
        if name not in rows:
            rows[name] = compute()
            print(datetime.now().strftime('%H:%M:%S'), part, name, flush=True)
            write_atomically(self.path, json.dumps(self.result) + '\n')


def errors(layer):
    found = {}
    for budget in BUDGETS:
        fits = {x: layer.fit(x, budget)
                for x in (*FORMS, EITHER_ORDER, COEFFICIENTS)}
        found[str(budget)] = {k: x and x[:2] for k, x in fits.items()}
    return dict(channels=[layer.inputs, layer.outputs], stride=layer.stride,
                errors=found)


@torch.no_grad()
def main():
    args = parse_args()
    torch.set_num_threads(1)
    cfg = load_config(args.config)
    init_default_scope(cfg.default_scope)
    set_random_seed(0)
    model = MODELS.build(cfg.model).eval()
    load_weights(model, read_checkpoint(args.checkpoint), args.checkpoint)
    cfg.train_dataloader.batch_size = BATCH
    batches = take_batches(calibration_dataloader(cfg, 0),
                           args.images // BATCH)[0]
    images = [model.data_preprocessor(x, False)['inputs'] for x in batches]
    log = Log(
        f'{args.out}.json',
        date=datetime.now().isoformat(timespec='seconds'),
        machine=f'{platform.machine()}, {os.cpu_count()} cores, 1 thread',
        versions=dict(mmbasis=mmbasis.__version__, torch=torch.__version__),
        command=command(),
        checkpoint=osp.basename(args.checkpoint),
        images=args.images)
    known = log.result.get('layers', {})
    if len(known) < 2 * len(blocks_of(model)):
        for name, layer in layers_of(model, images).items():
            log.once('layers', name, lambda layer=layer: errors(layer))
    for budget in args.budgets:
        for form in args.forms:

            def accuracy(form=form, budget=budget):
                net, kept = compress(model, images, form, budget)
                return dict(kept=kept, **evaluate(cfg, net))

            log.once('accuracy', f'{form} {budget}', accuracy)
    log.once('times', 'rows', measure_times)
    write_atomically(f'{args.out}.md', to_markdown(log.result))


if __name__ == '__main__':
    main()
