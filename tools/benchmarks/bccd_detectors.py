# Copyright (c) mmbasis authors. All rights reserved.
"""Detectors on BCCD: dense, compressed, and fine-tuned.

Each step is one call of tools/train.py or tools/compress.py and is left out
where its result is there already; interrupted training is resumed. Nothing
is chosen by the images of ``val`` and ``test``: both are reported, and the
checkpoint is that of the last epoch. Pictures of detections, dense beside
compressed and fine-tuned, go into the work directory.

    MMBASIS_DATA=data python tools/benchmarks/bccd_detectors.py \
        --out docs/results/bccd_detectors
    MMBASIS_DATA=data python tools/benchmarks/bccd_detectors.py \
        --detectors rtmdet_tiny_bccd --percent 25 \
        --out docs/results/bccd_quarter
"""
import argparse
import copy
import json
import os
import os.path as osp
import platform
import shutil
import subprocess
import sys
from datetime import datetime

import mmcv
import mmdet
import numpy as np
import torch
from bench_utils import command
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, VISUALIZERS, init_default_scope
from mmengine.runner import set_random_seed
from rich.console import Console
from rich.progress import track

import mmbasis
from mmbasis.compression import load_weights, plan_of, read_checkpoint
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically
from mmbasis.utils.runner import evaluate

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
CONFIGS = 'configs/mmdet'
SPLITS = dict(val=['val'], test=['test'], both=['val', 'test'])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--detectors',
        nargs='+',
        default=['rtmdet_tiny_bccd', 'retinanet_r18_bccd'],
        help=f'configs in {CONFIGS}')
    parser.add_argument(
        '--percent',
        type=int,
        default=50,
        help='of the MACs to keep, as in the names of the configs')
    parser.add_argument('--out', required=True, help='path without ending')
    parser.add_argument('--work-dir', default='work_dirs')
    return parser.parse_args()


def call(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def train(name: str, work_dir: str) -> str:
    """Train by a config; the checkpoint of the last epoch."""
    config = osp.join(CONFIGS, f'{name}.py')
    epochs = load_config(osp.join(ROOT, config)).train_cfg.max_epochs
    last = osp.join(work_dir, name, f'epoch_{epochs}.pth')
    if not osp.isfile(osp.join(ROOT, last)):
        call('tools/train.py', config, '--work-dir', osp.join(work_dir, name),
             '--resume')
    return last


def checkpoints(name: str, percent: int, work_dir: str) -> dict:
    """The checkpoint of each step, made where it is missing."""
    data = os.environ.get('MMBASIS_DATA', 'data')
    dense = osp.join(data, f'{name}.pth')
    if not osp.isfile(osp.join(ROOT, dense)):
        shutil.copy(train(name, work_dir), dense)
    compressed = osp.join(work_dir, f'{name}_macs{percent}')
    if not osp.isfile(osp.join(ROOT, compressed, 'compressed.pth')):
        call('tools/compress.py', osp.join(CONFIGS, f'{name}.py'), dense,
             '--macs', str(percent / 100), '--calib-batches', '24',
             '--work-dir', compressed)
    return {
        'dense': dense,
        'compressed, no training': osp.join(compressed, 'compressed.pth'),
        'fine-tuned': train(f'{name}_basis-macs{percent}', work_dir)
    }


def load(cfg: Config, checkpoint: str) -> torch.nn.Module:
    """A detector, dense or compressed."""
    init_default_scope(cfg.default_scope)
    content = read_checkpoint(osp.join(ROOT, checkpoint))
    if plan_of(content) is not None:
        return mmbasis.load_compressed(cfg, osp.join(ROOT, checkpoint))
    model = MODELS.build(cfg.model)
    load_weights(model, content, checkpoint)
    return model.eval()


def test(cfg: Config, model: torch.nn.Module) -> dict:
    """The mAP at an IoU of 0.5 on each split."""
    cfg = copy.deepcopy(cfg)
    dataset = cfg.val_dataloader.dataset
    result = {}
    for split, parts in SPLITS.items():
        cfg.test_dataloader.dataset = dict(
            type='ConcatDataset',
            datasets=[
                dict(dataset, ann_file=f'ImageSets/Main/{part}.txt')
                for part in parts
            ])
        result[split] = evaluate(cfg, model)['pascal_voc/mAP']
    return result


def draw(cfg: Config, models: dict, folder: str, images: int = 8) -> None:
    """Paint the detections of all models side by side."""
    visualizer = VISUALIZERS.build(
        dict(type='DetLocalVisualizer', name='detections'))
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    visualizer.dataset_meta = dataset.metainfo
    os.makedirs(folder, exist_ok=True)
    for index in range(images):
        path = dataset.get_data_info(index)['img_path']
        panels = []
        for model in models.values():
            model.cfg = cfg
            visualizer.add_datasample(
                '',
                mmcv.imread(path, channel_order='rgb'),
                inference_detector(model, path),
                draw_gt=False,
                pred_score_thr=0.3)
            panels.append(visualizer.get_image())
        mmcv.imwrite(
            np.concatenate(panels, 1)[..., ::-1],
            osp.join(folder, osp.basename(path)))


def to_markdown(runs: list) -> str:
    lines = [
        '| detector | | MACs kept | parameters kept | mAP@0.5 val | test | '
        'both |', '|---|---|---|---|---|---|---|'
    ]
    for run in runs:
        for step, entry in run['steps'].items():
            kept = ['', ''] if step == 'dense' else [
                f'{run[key]["after"] / run[key]["before"]:.3f}'
                for key in ('macs', 'params')
            ]
            maps = [f'{entry[split]:.4f}' for split in SPLITS]
            lines.append('| ' +
                         ' | '.join([run['detector'], step, *kept, *maps]) +
                         ' |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    args = parse_args()
    runs = []
    for name in args.detectors:
        set_random_seed(0)
        paths = checkpoints(name, args.percent, args.work_dir)
        cfg = load_config(
            osp.join(ROOT, CONFIGS, f'{name}.py'), work_dir=args.work_dir)
        models = {step: load(cfg, path) for step, path in paths.items()}
        steps = {
            step: test(cfg, model)
            for step, model in track(models.items(), console=Console())
        }
        totals = plan_of(read_checkpoint(paths['fine-tuned'])).totals()
        runs.append(dict(detector=name, steps=steps, **totals))
        result = dict(
            date=datetime.now().isoformat(timespec='seconds'),
            machine=f'{platform.machine()}, {os.cpu_count()} cores',
            versions=dict(
                mmbasis=mmbasis.__version__,
                mmdet=mmdet.__version__,
                torch=torch.__version__),
            command=command(),
            runs=runs)
        write_atomically(f'{args.out}.json', json.dumps(result, indent=1))
        write_atomically(f'{args.out}.md', to_markdown(runs))
        draw(cfg, models, osp.join(args.work_dir, f'{name}_detections'))


if __name__ == '__main__':
    main()
