# Copyright (c) mmbasis authors. All rights reserved.
"""Evaluate a checkpoint of any OpenMMLab config, compressed or dense."""
import argparse
import copy
import os
from typing import Iterator

import mmengine
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmbasis.hooks import IntegrityHook
from mmbasis.quirks import repair
from mmbasis.utils import find_weights, init_cpu_dist, load_config

#: how the libraries' own tools merge predictions where a config does not say
TTA_MODELS = dict(
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'),
    mmdet=dict(
        type='DetTTAModel',  # registered by mmdet, but not in its scope
        tta_cfg=dict(
            nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)))


def parse_args() -> argparse.Namespace:
    """Read the command line: the usual arguments of OpenMMLab's tools."""
    parser = argparse.ArgumentParser(description='Test a model')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for the log and metrics')
    parser.add_argument(
        '--out',
        help='write the predictions (.pkl) or the metrics (.json) here')
    parser.add_argument('--show-dir', help='folder for painted images')
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation by tta_model and tta_pipeline of the '
        'config; without them each image is seen flipped, too')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override values of the config: a.b=1 c="[1,2]"')
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started; pytorch stands for torchrun')
    # torch.distributed.launch passes it
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    if args.out and not args.out.endswith(('.pkl', '.pickle', '.json')):
        parser.error(f'--out must end with .pkl or .json, got {args.out}')
    try:
        args.checkpoint = find_weights(args.checkpoint)
    except FileNotFoundError as error:
        parser.error(str(error))
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Write the arguments into the config."""
    cfg.launcher = args.launcher
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if cfg.get('test_dataloader') is None:
        raise KeyError(f"config {args.config} has no 'test_dataloader'")
    if args.amp:
        cfg.test_cfg.fp16 = True
    if args.tta:
        augment(cfg)
    if args.show_dir is not None:
        hook = cfg.get('default_hooks', {}).get('visualization')
        if hook is None:
            raise KeyError('--show-dir needs default_hooks.visualization in '
                           f'the config, which {args.config} does not have')
        # mmdet and mmpretrain name the switch and the folder differently
        name = getattr(hook.type, '__name__', hook.type)
        is_det = name.endswith('DetVisualizationHook')
        hook.update({
            'draw' if is_det else 'enable': True,
            'test_out_dir' if is_det else 'out_dir': args.show_dir
        })
    return cfg


def augment(cfg: Config) -> None:
    """Test several views of each image, and merge what is predicted.

    Raises:
        KeyError: If the config does not say how to merge, and its library has
            no default.
    """
    merge = cfg.get('tta_model') or TTA_MODELS.get(cfg.get('default_scope'))
    if merge is None:
        raise KeyError(
            '--tta needs tta_model in the config: the library of '
            f'default_scope={cfg.get("default_scope")!r} has no default')
    for dataset in innermost(cfg.test_dataloader.dataset):
        dataset.pipeline = cfg.get('tta_pipeline') or flipped(dataset.pipeline)
    cfg.model = ConfigDict(**merge, module=cfg.model)


def innermost(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The datasets that others are made of."""
    inner = dataset.get('datasets', [dataset.get('dataset')])
    for one in inner:
        yield from [dataset] if one is None else innermost(one)


def flipped(pipeline: list) -> list:
    """Transforms of testing that return an image and its mirror image."""
    *steps, pack = copy.deepcopy(pipeline)
    if 'meta_keys' in pack:
        pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
    views = [[dict(type='RandomFlip', prob=p) for p in (1., 0.)], [pack]]
    return [*steps, dict(type='TestTimeAug', transforms=views)]


def main() -> None:
    """Build the runner and test."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    cfg = merge_args(cfg, args)
    init_cpu_dist(args.launcher, cfg)
    runner = (
        RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg))
    repair(runner.model)
    if not any(isinstance(x, IntegrityHook) for x in runner.hooks):
        runner.register_hook(IntegrityHook())
    if args.out and not args.out.endswith('.json'):
        runner.test_evaluator.metrics.append(DumpResults(args.out))
    metrics = runner.test()
    if args.out and args.out.endswith('.json'):
        mmengine.dump(metrics, args.out, indent=2)


if __name__ == '__main__':
    main()
