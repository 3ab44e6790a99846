# Copyright (c) mmbasis authors. All rights reserved.
"""Export a model through MMDeploy, check the graph, compare it with PyTorch.

Writes into the work directory the ONNX files, report.json and deploy.py, the
complete deploy config; exits with 1 when ONNX Runtime and PyTorch differ
beyond tolerance, or NVIDIA's builder refuses a graph that TensorRT would
refuse, too. The model is the stand-alone config that tools/compress.py wrote
(or a dense one).

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
from rich.console import Console
from rich.table import Table

from mmbasis.deploy import (
    Deployment,
    calibration_images,
    check_capability,
    check_tensorrt,
    check_weights,
    compare,
    compare_engines,
    complete_for_images,
    evaluate_onnx,
    merge_slow_layers,
    parse_size,
    quantize_onnx,
    trtexec_commands,
    write_calibration,
)
from mmbasis.utils import find_weights, load_config
from mmbasis.utils.io import write_atomically


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
        '--batch', type=int, metavar='N',
        help='images at once (default 1); with --dynamic 1 to N in TensorRT')
    parser.add_argument(
        '--dynamic', action='store_true',
        help='leave open the batch, and height and width in ONNX Runtime or '
        'between three --input-shape')
    parser.add_argument(
        '--precision', choices=['fp32', 'fp16', 'int8'],
        help='of the engine (default: as the deploy config says)')
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
        type=int,
        default=64,
        metavar='N',
        help='training images for the scales of int8 (default 64)')
    parser.add_argument(
        '--int8',
        action='store_true',
        help='also write an int8 file for ONNX Runtime and evaluate it')
    parser.add_argument(
        '--build',
        choices=['rtx'],
        help="build engines with NVIDIA's TensorRT for RTX, without a GPU: of "
        'the files and, for comparison, of the dense model')
    parser.add_argument('--compute-capability', default='8.6')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parser.parse_args()
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


def quantize(deployment: Deployment, args: argparse.Namespace,
             files: list) -> dict:
    """Write what int8 needs; the entries of the report."""
    report = {}
    wanted = args.int8 or int8_of_tensorrt(deployment)
    if not wanted:
        return report
    images = calibration_images(deployment, args.calib_images)
    if int8_of_tensorrt(deployment):
        path = osp.join(args.work_dir,
                        deployment.deploy_cfg.calib_config.calib_file)
        write_calibration(path, deployment, images)
        report['calibration'] = path
    if args.int8:
        path = osp.join(args.work_dir, 'int8.onnx')
        quantize_onnx(files[0], path, images)
        report['int8'] = dict(file=path, bytes=osp.getsize(path))
        if deployment.partition is None:
            report['int8']['metrics'] = evaluate_onnx(deployment, [path],
                                                      args.work_dir)
    return report


def complete_cfg(args: argparse.Namespace, cfg: Config) -> Config:
    """The deploy config with all that was asked for."""
    try:
        sizes = args.input_shape and list(map(parse_size, args.input_shape))
        deploy_cfg = complete_for_images(
            args.deploy_cfg, cfg, args.images, sizes, args.batch, args.dynamic,
            args.precision)
        onnx = deploy_cfg.onnx_config
        if (args.evaluate or args.int8) and not onnx.get('dynamic_axes') and (
                onnx.get('batch_size', 1) > 1):
            raise ValueError('--evaluate and --int8 take images one by one: '
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
    report.update(quantize(deployment, args, files))
    if args.build:
        report['engine'] = compare_engines(
            deployment, files, args.images[0], args.work_dir,
            args.compute_capability)
    return report


def print_comparison(console: Console, comparison: dict) -> None:
    """Show the differences of every image."""
    if 'skipped' in comparison:
        console.print(f'Not run here: {comparison["skipped"]}')
        return
    table = Table('image', 'what', 'compared', 'relative', 'largest', 'agrees')
    for image, result in comparison['images'].items():
        agrees, name = 'yes' if result['agrees'] else 'NO', osp.basename(image)
        for what, found in result.items():
            if what == 'boxes':
                found = dict(
                    values=found['compared'],
                    relative=f'{found["unmatched"]} unmatched',
                    largest=f'{found["pixels"]:.2g} pixels')
            elif isinstance(found, dict):
                found = dict(found, **{
                    k: f'{found[k]:.1e}' for k in ('relative', 'largest')})
            if isinstance(found, dict):
                table.add_row(name, what, str(found['values']),
                              found['relative'], found['largest'], agrees)
    console.print(table)
    reasons = [x[k] for x in comparison['images'].values()
               for k in ('reason', 'skipped') if k in x]
    for text in dict.fromkeys(reasons):
        console.print(text)


def print_engines(console: Console, report: dict) -> None:
    """Show what NVIDIA's builder made of the files."""
    table = Table('engine', 'capability', 'built', 'kernels', 'only copy')
    for which, engines in report.items():
        for path, engine in engines.items():
            name = osp.basename(path)
            table.add_row(
                name if which == 'files' else f'{which}/{name}',
                engine['compute_capability'],
                'yes' if engine['built'] else 'NO',
                str(engine['kernels']), str(engine['copies']))
            for error in engine['errors']:
                console.print(f'{name}: {error["text"]}', soft_wrap=True)
    console.print(table)


def print_report(report: dict) -> None:
    """Show what was written and found."""
    console = Console()
    for path, size in report['files'].items():
        console.print(f'{path}: {size / 1e6:.3f} MB, opset {report["opset"]}')
    weights = report['weights']
    console.print(f'Parameters: {report["params"]:,} of the model, '
                  f'{weights["params"]:,} in the graph, of which '
                  f'{weights["planned"]:,} are weights of basis layers')
    print_comparison(console, report['comparison'])
    for path, versions in report['tensorrt'].items():
        for version, problems in versions.items():
            console.print(
                f'TensorRT {version}, {osp.basename(path)}: ' +
                ('; '.join(problems) or 'all operators supported'),
                soft_wrap=True)
    if 'engine' in report:
        print_engines(console, report['engine'])
    for key in ('metrics', 'int8', 'calibration', 'merged'):
        if key in report:
            console.print(f'{key}: {report[key]}')
    console.print('To build the engine on the device, by its TensorRT (8.5 '
                  'is of JetPack 5):')
    for commands in report['trtexec']:
        for version, command in commands.items():
            console.print(f'{version}: {command}', soft_wrap=True)


def main() -> int:
    """Export and report; 1 where the graph differs from the model, or
    TensorRT would refuse it."""
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
    agrees = report['comparison'].get('agrees', True)
    return 0 if agrees and not refused else 1


if __name__ == '__main__':
    sys.exit(main())
