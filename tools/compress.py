# Copyright (c) mmbasis authors. All rights reserved.
"""Compress a trained model in one shot, without training.

Writes into the work directory: plan.json, report.json, compressed.pth,
compressed.py (a config of its own for test, inference, deployment and further
training) and plots.
"""
import argparse
import json
import os.path as osp

from mmengine.config import DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmengine.utils import mkdir_or_exist
from rich.console import Console
from rich.table import Table

from mmbasis.compression import (
    Recipe,
    TeacherFile,
    load_weights,
    read_checkpoint,
    run_recipe,
    save_checkpoint,
    take_batches,
)
from mmbasis.datasets import calibration_dataloader
from mmbasis.models import build_dense, standalone_config
from mmbasis.planning.layers import FORMS
from mmbasis.running import model_complexity
from mmbasis.utils import find_weights, load_config
from mmbasis.utils.io import whole_set, write_atomically
from mmbasis.utils.libraries import check_library
from mmbasis.utils.runner import check_evaluation, evaluate, example_batch
from mmbasis.utils.schema import (
    COUNT,
    FRACTION,
    WHOLE,
    argument,
    parse_arguments,
)
from mmbasis.visualization import plot_ranks, plot_spectra

RECALIBRATION = dict(auto='auto', always=True, never=False)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the dense model')
    parser.add_argument('checkpoint', help='its weights')
    how = parser.add_mutually_exclusive_group(required=True)
    share = argument(float, FRACTION)
    how.add_argument('--macs', type=share, help='fraction of the MACs to keep')
    how.add_argument(
        '--params', type=share, help='fraction of the parameters to keep')
    how.add_argument(
        '--energy',
        type=share,
        help='fraction of the energy to keep in each layer (the rule of the '
        'paper: from the weights alone)')
    how.add_argument(
        '--latency',
        type=share,
        help='fraction of the latency to keep, by --table or --device')
    how.add_argument('--plan', help='a plan.json to follow')
    parser.add_argument(
        '--table', help='latency table of the device: latency_table.py')
    parser.add_argument(
        '--device', help='model of a device instead, such as xavier-fp16')
    parser.add_argument(
        '--forms',
        nargs='+',
        choices=FORMS,
        help='what layers may become (default: all, or those that --table '
        'has); not with --energy')
    parser.add_argument(
        '--calib-batches',
        type=argument(int, COUNT),
        default=8,
        help='batches of the training loader for the statistics (default 8)')
    parser.add_argument(
        '--round-to',
        type=argument(int, COUNT),
        help='ranks are multiples of this (default: 8 where a side has 64 '
        'channels or more, else 1; with --energy 1)')
    parser.add_argument(
        '--reconstruction',
        choices=['local', 'sequential'],
        help='fit each layer on its own, or to the outputs of the dense '
        'network in spite of the layers before it (default, except with '
        '--energy)')
    parser.add_argument(
        '--recalibration',
        choices=list(RECALIBRATION),
        default='auto',
        help='compute the statistics of batch normalisations again; auto (the '
        'default): where that helps on held-out training images, and not with '
        '--energy')
    parser.add_argument(
        '--evaluate',
        action='store_true',
        help='run the test evaluator before and after')
    parser.add_argument('--work-dir', help='where the results go')
    parser.add_argument('--seed', type=argument(int, WHOLE), default=0)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    args = parse_arguments(parser)

    sources = [x for x in (args.table, args.device) if x is not None]
    if len(sources) != (args.latency is not None):
        parser.error('--latency and --table (or --device) belong together')
    if args.forms and (args.energy or args.plan):
        parser.error('--forms is not for --energy and --plan')
    if args.round_to and args.plan:
        parser.error('--round-to is not for --plan')
    return args


def make_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe that the arguments ask for."""
    how = dict(
        calibration=dict(num_batches=args.calib_batches),
        reconstruction=args.reconstruction,
        recalibration=RECALIBRATION[args.recalibration])
    if args.plan is not None:
        return Recipe.of(plan=args.plan, **how)
    if args.energy is not None:
        config = dict(type='EnergyPlanner', threshold=args.energy)
    else:
        config = dict(
            type='BudgetPlanner',
            macs=args.macs,
            params=args.params,
            latency=args.latency,
            table=args.table,
            device=args.device,
            forms=args.forms)
    return Recipe.of(planner=dict(config, round_to=args.round_to), **how)


def print_report(report: dict) -> None:
    """Show the report as a table."""
    table = Table('', 'before', 'after', 'kept')
    rows = {k: v for k, v in report.items() if isinstance(v, dict)}
    for key, value in rows.pop('metrics', {}).get('before', {}).items():
        after = report['metrics']['after'][key]
        table.add_row(key, f'{value:.4g}', f'{after:.4g}', '')
    for key in ('macs', 'conv_macs', 'params'):
        before, after = (report[key][k] for k in ('before', 'after'))
        table.add_row(key, f'{before / 1e6:.3f} M', f'{after / 1e6:.3f} M',
                      f'{after / before:.2%}' if before else '')
    table.add_section()
    for device, time in report['predicted_ms'].items():
        before, after = time['before'], time['after']
        table.add_row(f'predicted, {device}', f'{before:.3f} ms',
                      f'{after:.3f} ms', f'{after / before:.2%}')
    Console().print(table)


def main() -> None:
    """Compress, evaluate if asked to, and write everything down."""
    args = parse_args()
    recipe = make_recipe(args)
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    if args.evaluate:
        check_evaluation(cfg, 'test')
    checkpoint = find_weights(args.checkpoint)
    teacher = TeacherFile.of(checkpoint)  # of further training
    mkdir_or_exist(cfg.work_dir)
    MMLogger.get_instance('mmbasis', logger_name='mmbasis')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    set_random_seed(args.seed)
    model = build_dense(cfg)
    load_weights(model, read_checkpoint(checkpoint), checkpoint)
    model.to(get_device())  # apart: some models override it without a result
    model.eval()

    loader = calibration_dataloader(cfg, args.seed)
    example = example_batch(cfg, 'test', 'val', 'train')
    before = model_complexity(model, example)
    metrics = dict(before=evaluate(cfg, model)) if args.evaluate else {}

    plan, analysis = run_recipe(
        model, recipe, *take_batches(loader, recipe.calibration.num_batches))
    after = model_complexity(model, example)
    report = dict(
        config=args.config,
        checkpoint=args.checkpoint,
        planner=plan.planner,
        uncounted=after['uncounted'],
        compressible=plan.totals(),
        conv_macs=plan.totals(convs_only=True)['macs'],
        predicted_ms=plan.predicted_ms,
        **{
            key: dict(before=before[key], after=after[key])
            for key in ('macs', 'params')
        })
    if args.evaluate:
        metrics['after'] = evaluate(cfg, model)
        report['metrics'] = metrics

    with whole_set(cfg.work_dir) as folder:

        def path(name):
            return osp.join(folder, name)

        target = osp.abspath(osp.join(cfg.work_dir, 'compressed.pth'))
        plan.save(path('plan.json'))
        save_checkpoint(
            model,
            plan,
            path('compressed.pth'),
            dict(teacher.to_meta(), dataset_meta=dataset_meta(loader)))
        standalone = standalone_config(cfg, plan, target)
        write_atomically(path('compressed.py'), standalone.pretty_text)
        pictures = draw(analysis, plan, path)
        write_atomically(path('report.json'), json.dumps(report, indent=2))
    print_report(report)
    Console().print(f'Written to {cfg.work_dir}: plan.json, report.json, '
                    f'compressed.pth, compressed.py, {pictures}')


def draw(analysis, plan, path) -> str:
    """Draw spectra and ranks where that is possible; the names of the files,
    or why there are none."""
    try:
        check_library('matplotlib')
    except ModuleNotFoundError as error:
        return f'no pictures ({error})'
    plot_spectra(analysis, plan, path('spectra.png'))
    plot_ranks(plan, path('ranks.png'))
    return 'spectra.png, ranks.png'


def dataset_meta(loader) -> dict:
    """Meta information of a loader's dataset: class names, palette."""
    return dict(getattr(loader.dataset, 'metainfo', {}))


if __name__ == '__main__':
    main()
