# Copyright (c) mmbasis authors. All rights reserved.
"""Evaluate a checkpoint of any OpenMMLab config, compressed or dense."""
import argparse
import os

import mmengine
from mmengine.config import Config, DictAction
from mmengine.evaluator import DumpResults
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmbasis.models.quirks import repair
from mmbasis.utils import init_cpu_dist, load_config


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
    if not os.path.isfile(args.checkpoint) and '://' not in args.checkpoint:
        parser.error(f'checkpoint {args.checkpoint} does not exist')
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


def main() -> None:
    """Build the runner and test."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    cfg = merge_args(cfg, args)
    init_cpu_dist(args.launcher, cfg)
    runner = (
        RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg))
    repair(runner.model)
    if args.out and not args.out.endswith('.json'):
        runner.test_evaluator.metrics.append(DumpResults(args.out))
    metrics = runner.test()
    if args.out and args.out.endswith('.json'):
        mmengine.dump(metrics, args.out, indent=2)


if __name__ == '__main__':
    main()
