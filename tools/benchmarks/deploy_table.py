# Copyright (c) mmbasis authors. All rights reserved.
"""Which models reach TensorRT? One table.

Compresses each model at half its MACs (random weights), exports it with fixed
and with open shapes in fp32 and fp16, and asks of each graph: does it hold the
plan's parameters, does ONNX Runtime compute what PyTorch does, and does
NVIDIA's builder take it (``pip install 'mmbasis[trt-check]'``; no GPU)? The
dense model is built, too, to compare kernels and copies. Rows that are in the
JSON file already are not done again, except with ``--again``.

    python tools/benchmarks/deploy_table.py --out docs/results/deployment
"""
import argparse
import json
import os.path as osp
import platform
import tempfile
import warnings
from datetime import datetime
from typing import Any, Dict, List, NamedTuple, Sequence

import cv2
import numpy as np
import torch
import torch.nn as nn
from bench_utils import command
from mmengine.config import Config
from mmengine.registry import init_default_scope
from rich.console import Console

from mmbasis.compression import compress, save_checkpoint
from mmbasis.deploy import (
    Deployment,
    build_engine,
    builder_at_hand,
    check_weights,
    compare,
    compare_engines,
    complete,
)
from mmbasis.deploy.precision import compare_precisions, write_precision
from mmbasis.models import build_dense, standalone_config
from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))


class Model(NamedTuple):
    """A config, the side of its images in pixels, and whether it detects."""
    config: str
    side: int = 224
    detects: bool = False


def _classifier(name: str) -> Model:
    return Model(f'mmpretrain::{name}.py')


def _detector(name: str, side: int = 320) -> Model:
    return Model(f'mmdet::{name}.py', side, True)


MODELS = {
    'ResNet-18': _classifier('resnet/resnet18_8xb32_in1k'),
    'ResNet-50': _classifier('resnet/resnet50_8xb32_in1k'),
    'VGG-16': _classifier('vgg/vgg16_8xb32_in1k'),
    'MobileNetV2': _classifier('mobilenet_v2/mobilenet-v2_8xb32_in1k'),
    'EfficientNet-B0': _classifier('efficientnet/efficientnet-b0_8xb32_in1k'),
    'ConvNeXt-T': _classifier('convnext/convnext-tiny_32xb128_in1k'),
    'Swin-T': _classifier('swin_transformer/swin-tiny_16xb64_in1k'),
    'DeiT-S': _classifier('deit/deit-small_4xb256_in1k'),
    'RepVGG-A0': _classifier('repvgg/repvgg-A0_8xb32_in1k'),
    'RepVGG-A0, deployed': _classifier('repvgg/repvgg-A0_deploy_in1k'),
    'MobileOne-s0': _classifier('mobileone/mobileone-s0_8xb32_in1k'),
    'RepLKNet-31B': _classifier('replknet/replknet-31B_32xb64_in1k'),
    'RepMLP-B': _classifier('repmlp/repmlp-base_8xb64_in1k'),
    'LeViT-128s': _classifier('levit/levit-128s_8xb256_in1k'),
    'TinyViT-5m': _classifier('tinyvit/tinyvit-5m_8xb256_in1k'),
    'RIFormer-s12': _classifier('riformer/riformer-s12_8xb128_in1k'),
    'RetinaNet-R50': _detector('retinanet/retinanet_r50_fpn_1x_coco'),
    'SSD300': _detector('ssd/ssd300_coco', 300),
    'YOLOX-s': _detector('yolox/yolox_s_8xb8-300e_coco'),
    'RTMDet-s': _detector('rtmdet/rtmdet_s_8xb32-300e_coco'),
    'FCOS-R50': _detector('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco'),
    'ATSS-R50': _detector('atss/atss_r50_fpn_1x_coco'),
    'Faster R-CNN R50': _detector('faster_rcnn/faster-rcnn_r50_fpn_1x_coco'),
    'Mask R-CNN R50': _detector('mask_rcnn/mask-rcnn_r50_fpn_1x_coco'),
    'DETR-R50': _detector('detr/detr_r50_8xb2-150e_coco'),
    'DINO-R50': _detector('dino/dino-4scale_r50_8xb2-12e_coco'),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--models', nargs='+', choices=list(MODELS), default=list(MODELS))
    parser.add_argument('--again', action='store_true')
    parser.add_argument('--out', required=True, help='.json and .md to write')
    return parser.parse_args()


def prepare(model: Model, folder: str) -> tuple:
    """Config and checkpoint of the model at half its MACs, and an image."""
    cfg = load_config(model.config, work_dir=folder)
    init_default_scope(cfg.default_scope)
    for part in (cfg.model, *cfg.model.values()):
        if isinstance(part, dict):
            part.pop('init_cfg', None)
    torch.manual_seed(0)
    network = build_dense(cfg)
    network.init_weights()
    for module in network.modules():
        _spread(module)
    network.eval()
    image = osp.join(folder, 'image.png')
    cv2.imwrite(image, scene(model.side))
    planner = dict(type='BudgetPlanner', macs=.5, data_aware=False)
    plan = compress(network, planner, [batch_of(model, image)])
    checkpoint = osp.join(folder, 'compressed.pth')
    save_checkpoint(network, plan, checkpoint, {})
    macs = plan.totals()['macs']
    return (standalone_config(cfg, plan, checkpoint), checkpoint, image,
            macs['after'] / macs['before'])


def _spread(module: nn.Module) -> None:
    """Statistics as after training: at the start a network does not depend on
    half of its layers."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        nn.init.uniform_(module.running_var, .8, 1.2)
        nn.init.normal_(module.running_mean, std=.1)
        if module.affine:
            nn.init.uniform_(module.weight, .8, 1.2)


def scene(side: int) -> np.ndarray:
    """An image of bright discs, ``(side, side, 3)``."""
    random = np.random.RandomState(0)
    image = np.full((side, side, 3), 60, np.uint8)
    for _ in range(20):
        centre = tuple(random.randint(0, side, 2).tolist())
        colour = random.randint(60, 256, 3).tolist()
        cv2.circle(image, centre, int(random.randint(5, side // 6)), colour,
                   -1)
    return image


def batch_of(model: Model, image: str) -> Dict[str, Any]:
    """A batch for the calibration, as the preprocessor takes it."""
    pixels = torch.from_numpy(cv2.imread(image)).permute(2, 0, 1)
    if model.detects:
        from mmdet.structures import DetDataSample
        size = (model.side, model.side)
        meta = dict(
            img_shape=size,
            ori_shape=size,
            pad_shape=size,
            scale_factor=(1, 1))
        return dict(
            inputs=[pixels], data_samples=[DetDataSample(metainfo=meta)])
    from mmpretrain.structures import DataSample
    return dict(inputs=pixels[None], data_samples=[DataSample()])


def deploy_cfg_of(model: Model, cfg: Config, dynamic: bool) -> Config:
    """The deploy config: TensorRT, before suppression."""
    name = 'detection-before-nms' if model.detects else 'classification'
    deploy_cfg = Config.fromfile(
        osp.join(ROOT, 'configs', 'deploy', f'{name}_tensorrt.py'))
    side, sizes = model.side, None
    if not dynamic:
        return complete(deploy_cfg, (side, side), model_cfg=cfg)
    if not model.detects:  # many have one size, but any batch
        return complete(
            deploy_cfg, (side, side), batch=4, dynamic=True, model_cfg=cfg)
    sizes = [(x, x) for x in (side - 64, side, side + 64)]
    return complete(deploy_cfg, sizes, dynamic=True, model_cfg=cfg)


def examine(model: Model, prepared: tuple, dynamic: bool,
            folder: str) -> Dict[str, Any]:
    """One export: weights, agreement, and NVIDIA's builder."""
    cfg, checkpoint, image, _ = prepared
    deployment = Deployment(
        deploy_cfg_of(model, cfg, dynamic), cfg, checkpoint)
    files = deployment.export(image, folder)
    results = compare(deployment, files, [image])
    found = dict(
        weights=check_weights(deployment, files),
        agrees=all(x['agrees'] for x in results),
        comparison=results)
    inputs = [deployment.create_input(image)[1].numpy()]
    half = [write_precision(files[0], 'fp16', 'tensorrt', inputs)]
    half += [write_precision(x, 'fp16', 'tensorrt') for x in files[1:]]
    found['fp16'] = dict(
        comparison=compare_precisions(files[0], half[0], inputs))
    if builder_at_hand():
        engines = compare_engines(deployment, files, image, folder, '8.6')
        dense = [*engines.get('dense', {})]
        found['engines'] = {k: _short(v) for k, v in engines.items()}
        found['fp16']['engines'] = dict(
            files=_build(half),
            dense=_build(
                [write_precision(x, 'fp16', 'tensorrt') for x in dense]))
    return found


def _build(files: Sequence[str]) -> List[Dict[str, Any]]:
    return _short({x: build_engine(x).summary() for x in files})


def _short(summaries: Dict[str, Dict[str, Any]]) -> List[Dict[str, Any]]:
    return [dict({k: v for k, v in x.items() if k != 'fused'},
                 file=osp.basename(path)) for path, x in summaries.items()]


def row_of(name: str) -> Dict[str, Any]:
    """All that is found out about a model; an error is a finding."""
    row: Dict[str, Any] = dict(
        config=MODELS[name].config,
        date=datetime.now().isoformat(timespec='seconds'))
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(MODELS[name], folder)
        row['macs'] = prepared[-1]
        for kind in ('fixed', 'open'):
            try:
                row[kind] = examine(MODELS[name], prepared, kind == 'open',
                                    osp.join(folder, kind))
            except Exception as error:  # what a library raises here is news
                row[kind] = dict(error=f'{type(error).__name__}: {error}')
    return row


def _engines(found: Dict[str, Any]) -> str:
    """``93 kernels, 0 copies (dense 58, 0)``, or what was refused."""
    engines = found.get('engines')
    if engines is None:
        return 'not asked'
    errors = [y['text'] for x in engines['files'] for y in x['errors']]
    if errors:
        return '; '.join(dict.fromkeys(x[:100] for x in errors))
    counts = [
        ', '.join(
            str(sum(x[key] for x in engines[which]))
            for key in ('kernels', 'copies')) for which in engines
    ]
    return f'{counts[0]} (dense {counts[1]})' if counts[1:] else counts[0]


def _error(found: Dict[str, Any]) -> str:
    """The largest relative error of the raw outputs."""
    errors = [
        x['relative'] for result in found['comparison']
        for x in result.values() if isinstance(x, dict) and 'relative' in x
    ]
    return f'{max(errors):.1e}' if errors else 'none'


def to_markdown(report: Dict[str, Any]) -> str:
    """A row for each model and kind of shapes."""
    lines = [
        '| model | MACs | shapes | params of the graph | relative error | '
        'agrees | fp32: kernels, copies | fp16: error | fp16: kernels, copies '
        '|', '|---' * 9 + '|'
    ]
    for name, row in report['models'].items():
        for kind in ('fixed', 'open'):
            found = row[kind]
            head = f'| {name} | {row["macs"]:.3f} | {kind} | '
            if 'error' in found:
                text = found['error'].replace('\n', ' ')[:160]
                lines.append(f'{head}{text} | | | | | |')
                continue
            half = [
                f'{x["relative"]:.1e}' if 'relative' in x else 'other sizes'
                for x in found['fp16']['comparison'].values()
            ]
            lines.append(
                f'{head}{found["weights"]["params"]:,} | {_error(found)} | '
                f'{"yes" if found["agrees"] else "**no**"} | '
                f'{_engines(found)} | {max(half)} | '
                f'{_engines(found["fp16"])} |')
    return '\n'.join(lines) + '\n'


def main() -> None:
    """Go through the models; write after each."""
    warnings.filterwarnings('ignore')
    args = parse_args()
    path = f'{args.out}.json'
    models: Dict[str, Any] = {}
    if osp.isfile(path):
        with open(path, encoding='utf-8') as file:
            models = json.load(file)['models']
    for name in args.models:
        if name in models and not args.again:
            continue
        Console(stderr=True).print(name)
        models[name] = row_of(name)
        report = dict(
            command=command(),
            machine=platform.machine(),
            python=platform.python_version(),
            torch=torch.__version__,
            models={x: models[x] for x in MODELS if x in models})
        write_atomically(path, json.dumps(report, indent=1))
        table = to_markdown(report)
        write_atomically(f'{args.out}.md', table)
        Console().print(table)


if __name__ == '__main__':
    main()
