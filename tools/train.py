# Copyright (c) mmbasis authors. All rights reserved.
"""Train any model of an OpenMMLab config, compressed or dense."""
import argparse
import os

from mmengine.config import Config, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmbasis.hooks import IntegrityHook
from mmbasis.quirks import repair
from mmbasis.utils import (
    check_load_from,
    find_resumable,
    init_cpu_dist,
    load_config,
)


def parse_args() -> argparse.Namespace:
    """Read the command line: the usual arguments of OpenMMLab's tools."""
    parser = argparse.ArgumentParser(description='Train a model')
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='checkpoint to resume from; without a path, the latest one of '
        'the work directory that can be read')
    parser.add_argument(
        '--amp', action='store_true', help='automatic mixed precision')
    parser.add_argument(
        '--no-validate',
        action='store_true',
        help='do not evaluate during training')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate from auto_scale_lr.base_batch_size to '
        'the total batch size')
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
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def merge_args(cfg: Config, args: argparse.Namespace) -> Config:
    """Write the arguments into the config."""
    cfg.launcher = args.launcher
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise KeyError(
                '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=N) '
                f'in the config, which {args.config} does not have')
        cfg.auto_scale_lr.enable = True
    if args.resume is not None:
        latest = args.resume
        if args.resume == 'auto':
            latest = find_resumable(cfg.work_dir)
        # a first start stays one, from the weights that the config names
        if latest is not None:
            cfg.resume, cfg.load_from = True, latest
    return cfg


def main() -> None:
    """Build the runner and train."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    cfg = merge_args(cfg, args)
    check_load_from(cfg)
    init_cpu_dist(args.launcher, cfg)
    runner = (
        RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg))
    repair(runner.model)
    if not any(isinstance(x, IntegrityHook) for x in runner.hooks):
        runner.register_hook(IntegrityHook())
    runner.train()


if __name__ == '__main__':
    main()
