# Copyright (c) mmbasis authors. All rights reserved.
"""Export a model through MMDeploy, check the graph, compare it with PyTorch.

Writes into the work directory the ONNX files, report.json and deploy.py, the
complete deploy config; exits with 1 when ONNX Runtime and PyTorch, or fp32 and
a lower precision, differ beyond tolerance, or NVIDIA's builder refuses a graph
that TensorRT would refuse, too. The model is the stand-alone config that
tools/compress.py wrote (or a dense one).

    python tools/deploy.py configs/deploy/classification_onnxruntime.py \\
        work_dirs/c/compressed.py work_dirs/c/compressed.pth \\
        image.jpg another.jpg --work-dir work_dirs/onnx
"""
import argparse
import json
import logging
import os.path as osp
import sys
import warnings

from mmengine.config import Config, DictAction
from mmengine.utils import mkdir_or_exist

from mmbasis.deploy import (
    PRECISIONS,
    Deployment,
    add_precisions,
    calibration_images,
    check_capability,
    check_precisions,
    check_tensorrt,
    check_weights,
    compare,
    compare_engines,
    complete_for_images,
    evaluate_onnx,
    merge_slow_layers,
    parse_size,
    print_report,
    trtexec_commands,
    write_calibration,
)
from mmbasis.utils import find_weights, load_config
from mmbasis.utils.io import write_atomically
from mmbasis.utils.schema import COUNT, argument, parse_arguments


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('deploy_cfg', help='see configs/deploy')
    parser.add_argument('model_cfg', help='compressed.py, or a dense config')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument(
        'images',
        nargs='+',
        help='real images to compare on; the first traces the model')
    parser.add_argument('--work-dir', required=True)
    parser.add_argument(
        '--input-shape', nargs='+', metavar='HxW',
        help="height x width (default: what the model's test pipeline makes "
        'of the first image); for TensorRT with --dynamic also three: '
        'smallest, best, largest')
    parser.add_argument(
        '--batch', type=argument(int, COUNT), metavar='N',
        help='images at once (default 1); with --dynamic 1 to N in TensorRT')
    parser.add_argument(
        '--dynamic', action='store_true',
        help='leave open the batch, and height and width in ONNX Runtime or '
        'between three --input-shape')
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help="run MMDeploy's evaluator on the test set, in ONNX Runtime")
    parser.add_argument(
        '--merge',
        choices=['auto'],
        help='merge the layers to dense that are not faster by --table')
    parser.add_argument('--table', help='latency table, see latency_table.py')
    parser.add_argument(
        '--calib-images',
        type=argument(int, COUNT),
        default=64,
        metavar='N',
        help='training images for the scales of int8 (default 64)')
    parser.add_argument(
        '--precision',
        nargs='+',
        choices=PRECISIONS,
        default=[],
        help='also write graphs of these precisions, for strongly typed '
        'engines (TensorRT 10), compare them with fp32, and with --evaluate '
        'their accuracy; TensorRT 8.5 may use the lowest of them')
    parser.add_argument(
        '--build',
        choices=['rtx'],
        help="build engines with NVIDIA's TensorRT for RTX, without a GPU: of "
        'the files and, for comparison, of the dense model')
    parser.add_argument('--compute-capability', default='8.6')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parse_arguments(parser)
    if (args.merge is None) != (args.table is None):
        parser.error('--merge auto and --table belong together')
    return args


def int8_of_tensorrt(deployment: Deployment) -> bool:
    """Whether the deploy config asks TensorRT for int8."""
    common = deployment.deploy_cfg.backend_config.get('common_config') or {}
    return bool(common.get('int8_mode'))


def compare_all(deployment: Deployment, files: list, images: list) -> dict:
    """Compare where ONNX Runtime can run the graph; the reason elsewhere."""
    try:
        results = compare(deployment, files, images)
    except RuntimeError as error:
        if deployment.backend == 'onnxruntime':
            raise
        return dict(skipped=str(error))
    return dict(
        images=dict(zip(images, results)),
        agrees=all(x['agrees'] for x in results))


def calibrate(deployment: Deployment, args: argparse.Namespace) -> dict:
    """Write the images that MMDeploy's int8 needs; the entry of the report."""
    if not int8_of_tensorrt(deployment):
        return {}
    images = calibration_images(deployment, args.calib_images)
    path = osp.join(args.work_dir,
                    deployment.deploy_cfg.calib_config.calib_file)
    write_calibration(path, deployment, images)
    return dict(calibration=path)


def complete_cfg(args: argparse.Namespace, cfg: Config) -> Config:
    """The deploy config with all that was asked for."""
    # what TensorRT 8.5 may use; PRECISIONS has the lowest last
    lowest = max(args.precision, key=PRECISIONS.index, default=None)
    try:
        sizes = args.input_shape and list(map(parse_size, args.input_shape))
        deploy_cfg = complete_for_images(
            args.deploy_cfg, cfg, args.images, sizes, args.batch, args.dynamic,
            lowest)
        onnx = deploy_cfg.onnx_config
        one_by_one = args.evaluate or lowest == 'int8'
        if one_by_one and not onnx.get('dynamic_axes') and (
                onnx.get('batch_size', 1) > 1):
            raise ValueError('--evaluate and int8 take images one by one: '
                             'leave out --batch, or add --dynamic')
    except ValueError as error:
        raise SystemExit(f'error: {error}') from error
    return deploy_cfg


def make_report(args: argparse.Namespace) -> dict:
    """Export, check, compare."""
    if args.build:
        check_capability(args.compute_capability)
    cfg = load_config(args.model_cfg, args.cfg_options, args.work_dir)
    checkpoint, merged = find_weights(args.checkpoint), None
    deploy_cfg = complete_cfg(args, cfg)
    if args.merge:
        cfg, checkpoint, merged = merge_slow_layers(
            deploy_cfg, cfg, checkpoint, args.table, args.work_dir)
    deployment = Deployment(deploy_cfg, cfg, checkpoint)
    try:
        check_precisions(deployment, args.precision)
    except ValueError as error:
        raise SystemExit(f'error: --precision {error}') from error
    files = deployment.export(args.images[0], args.work_dir)
    write_atomically(
        osp.join(args.work_dir, 'deploy.py'),
        deployment.deploy_cfg.pretty_text)
    report = dict(
        deploy_cfg=args.deploy_cfg,
        model_cfg=args.model_cfg,
        checkpoint=args.checkpoint,
        opset=deployment.deploy_cfg.onnx_config.opset_version,
        params=sum(p.numel() for p in deployment.model.parameters()),
        weights=check_weights(deployment, files),
        files={path: osp.getsize(path)
               for path in files},
        comparison=compare_all(deployment, files, args.images),
        tensorrt={path: check_tensorrt(path)
                  for path in files},
        trtexec=[
            trtexec_commands(deployment, path, i)
            for i, path in enumerate(files)
        ])
    if merged is not None:
        report['merged'] = merged
    if args.evaluate:
        report['metrics'] = evaluate_onnx(deployment, files, args.work_dir)
    report.update(calibrate(deployment, args))
    if args.precision:
        report['precisions'] = add_precisions(
            deployment, files, args.precision, args.images, args.work_dir,
            args.calib_images, args.evaluate)
    if args.build:
        report['engine'] = compare_engines(
            deployment, files, args.images[0], args.work_dir,
            args.compute_capability)
    return report


def main() -> int:
    """Export and report; 1 where a graph differs from the model, or TensorRT
    would refuse it."""
    args = parse_args()
    # MMDeploy traces with many warnings that are of no concern here
    warnings.filterwarnings('ignore')
    logging.getLogger('mmdeploy').setLevel(logging.ERROR)
    mkdir_or_exist(args.work_dir)
    report = make_report(args)
    write_atomically(
        osp.join(args.work_dir, 'report.json'), json.dumps(report, indent=2))
    print_report(report)
    engines = report.get('engine', dict(files={}))['files'].values()
    refused = any(x['refused'] for x in engines)
    compared = [report['comparison'],
                *report.get('precisions', {}).values()]
    agrees = all(x.get('agrees', True) for x in compared)
    return 0 if agrees and not refused else 1


if __name__ == '__main__':
    sys.exit(main())
