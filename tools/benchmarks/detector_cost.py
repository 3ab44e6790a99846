# Copyright (c) mmbasis authors. All rights reserved.
"""Time and peak memory of compressing a detector, beside those of one forward
pass in training mode of a batch of the same images.

Each is done by a process of its own; weights and images are random, in the
shapes that the config's data preprocessor makes of them.

    python tools/benchmarks/detector_cost.py \
        mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --size 640 --images 32 \
        --batch-size 8 --out docs/results/detector_cost.json
"""
import argparse
import json
import multiprocessing
import os
import resource
import time
from datetime import datetime

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

import mmbasis
from mmbasis.models import dense_architecture
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('--size', type=int, default=640)
    parser.add_argument('--images', type=int, default=32)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--macs', type=float, default=.5)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', required=True)
    return parser.parse_args()


def build(args: argparse.Namespace) -> torch.nn.Module:
    cfg = load_config(args.config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = dense_architecture(cfg)
    model.backbone.init_cfg = None
    return MODELS.build(model)


def batch(args: argparse.Namespace, seed: int) -> dict:
    """Random images with eight boxes each."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(args.batch_size):
        corner = rng.uniform(0, .5 * args.size, (8, 2))
        extent = rng.uniform(.05 * args.size, .5 * args.size, (8, 2))
        sample = DetDataSample(
            metainfo=dict(
                img_shape=(args.size, args.size),
                ori_shape=(args.size, args.size),
                scale_factor=(1., 1.)))
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(
                np.concatenate([corner, corner + extent], 1)).float(),
            labels=torch.from_numpy(rng.integers(0, 80, 8)))
        samples.append(sample)
    images = rng.integers(0, 255, (args.batch_size, 3, args.size, args.size))
    return dict(
        inputs=list(torch.from_numpy(images.astype(np.uint8))),
        data_samples=samples)


def training_forward(args: argparse.Namespace) -> None:
    model = build(args).train()
    data = model.data_preprocessor(batch(args, 0), True)
    # what autograd keeps is alive until the losses are gone
    losses = model(**data, mode='loss')
    assert losses


def compression(args: argparse.Namespace) -> None:
    model = build(args).eval()
    mmbasis.compress(model, dict(type='BudgetPlanner', macs=args.macs),
                     (batch(args, seed)
                      for seed in range(args.images // args.batch_size)))


def measure(step, args: argparse.Namespace) -> dict:
    """Seconds and peak memory (MB) of a step in a process of its own."""
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measured, args=(step, args, sender))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f'{step.__name__} ended with {process.exitcode}')
    return receiver.recv()


def _measured(step, args: argparse.Namespace, sender) -> None:
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    step(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sender.send(dict(seconds=time.perf_counter() - start, peak_rss_mb=peak))


def main() -> None:
    args = parse_args()
    result = dict(
        date=datetime.now().isoformat(timespec='seconds'),
        machine=f'{os.uname().machine}, {os.cpu_count()} cores',
        versions=dict(mmbasis=mmbasis.__version__, torch=torch.__version__),
        **{
            k: v
            for k, v in vars(args).items() if k != 'out'
        },
        training_forward=measure(training_forward, args),
        compression=measure(compression, args))
    result['peak_ratio'] = (
        result['compression']['peak_rss_mb'] /
        result['training_forward']['peak_rss_mb'])
    write_atomically(args.out, json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
