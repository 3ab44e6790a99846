# Copyright (c) mmbasis authors. All rights reserved.
"""Look at what a trained model can lose, and at what it costs.

Draws the spectra and the sensitivity of each layer, predicted against measured
loss, and accuracy against MACs, parameters and latency for several planners,
without training. Writes analysis.json and PNG files into the work directory;
what is there already is not measured again.

The accuracy is that of val_dataloader and val_evaluator. Where their images
are those of the test, nothing must be chosen by it: point val_dataloader at
training images that are kept aside, by --cfg-options.
"""
import argparse
import copy
import json
import os.path as osp
from typing import Any, Dict, List

import torch.nn as nn
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from mmengine.runner import set_random_seed
from mmengine.utils import mkdir_or_exist
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mmbasis.compression import (
    Recipe,
    analyze,
    load_weights,
    make_plan,
    read_checkpoint,
    run_recipe,
    take_batches,
)
from mmbasis.compression.recalibration import (
    forward_latency,
    single_truncations,
)
from mmbasis.datasets import calibration_dataloader
from mmbasis.models import build_dense
from mmbasis.planning import Analysis, CompressionPlan
from mmbasis.running import model_complexity
from mmbasis.utils import load_config, schema
from mmbasis.utils.io import write_atomically
from mmbasis.utils.libraries import check_library
from mmbasis.utils.runner import check_evaluation, evaluate, example_batch
from mmbasis.visualization import (
    plot_curves,
    plot_losses,
    plot_ranks,
    plot_sensitivities,
    plot_spectra,
)

#: planners by name, for a budget; the paper's has a threshold instead
PLANNERS = {
    'loss': dict(type='BudgetPlanner'),
    'energy': dict(type='BudgetPlanner', loss_aware=False),
    'weights': dict(type='BudgetPlanner', data_aware=False),
    'paper': dict(type='EnergyPlanner'),
}
AXES = dict(
    macs='MACs kept', params='parameters kept', latency_ms='latency / ms')


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config of the dense model')
    parser.add_argument('checkpoint', help='its weights')
    parser.add_argument(
        '--budgets',
        nargs='+',
        type=schema.argument(float, schema.FRACTION),
        default=[.25, .36, .5, .7],
        help='fractions of the MACs to keep; energies, too, for the paper')
    parser.add_argument(
        '--planners',
        nargs='+',
        choices=list(PLANNERS),
        default=['loss', 'energy', 'paper'])
    parser.add_argument(
        '--calib-batches',
        type=schema.argument(int, schema.COUNT),
        default=8,
        help='batches of the training loader for the statistics (default 8)')
    parser.add_argument(
        '--metric', help='what is drawn; default: the first of the evaluator')
    parser.add_argument('--work-dir', help='where the results go')
    parser.add_argument(
        '--seed', type=schema.argument(int, schema.WHOLE), default=0)
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return schema.parse_arguments(parser)


class Measurements:
    """What is measured, on disk after each step.

    Args:
        cfg (Config): The config.
        settings (dict): What results depend on; others are not taken up.
    """

    def __init__(self, cfg: Config, settings: Dict[str, Any]) -> None:
        self.cfg = cfg
        self.path = osp.join(cfg.work_dir, 'analysis.json')
        self.data: Dict[str, Any] = dict(
            settings=settings, layers=[], points=[])
        if osp.isfile(self.path):
            found = schema.read_json(self.path)
            of = found.get('settings') if isinstance(found, dict) else found
            if of != settings:
                raise ValueError(f'{self.path} is of {of}, not of {settings}: '
                                 'give another --work-dir')
            self.data = found

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.data, indent=1) + '\n')

    def draw(self, name: str) -> str:
        return osp.join(self.cfg.work_dir, name)

    def measure_layers(self, model: nn.Module, analysis: Analysis,
                       held_out: List[Any]) -> None:
        """Predicted and measured loss of each layer alone."""
        count = len(analysis.selection.chosen)
        done = self.data['layers']
        if len(done) < count:
            done.clear()
            for row in track(
                    single_truncations(model, analysis, held_out),
                    'Layers',
                    total=count,
                    console=Console()):
                done.append(row)
            self.save()

    def measure_point(self, model: nn.Module, planner: str, budget: float,
                      batches: tuple, example: Any) -> None:
        """Compress a copy of the model, test it and note what it costs."""
        key = 'threshold' if planner == 'paper' else 'macs'
        recipe = Recipe.of(planner={**PLANNERS[planner], key: budget})
        model = copy.deepcopy(model)
        plan = run_recipe(model, recipe, *batches)[0]
        totals = plan.totals()
        self.data['points'].append(
            dict(
                planner=planner,
                budget=budget,
                metrics=evaluate(self.cfg, model, 'val'),
                latency_ms=forward_latency(model, example),
                uncounted=model_complexity(model, example)['uncounted'],
                plan=plan.to_dict(),
                **{
                    k: totals[k]['after'] / totals[k]['before']
                    for k in totals
                }))
        self.save()


def show(data: Dict[str, Any], metric: str) -> None:
    """The points as a table."""
    table = Table('planner', 'budget', 'MACs', 'params', 'latency', metric)
    dense = data['dense']
    table.add_row('dense', '', '', '', f'{dense["latency_ms"]:.1f} ms',
                  f'{dense["metrics"][metric]:.4g}')
    for point in data['points']:
        table.add_row(point['planner'], f'{point["budget"]:g}',
                      f'{point["macs"]:.1%}', f'{point["params"]:.1%}',
                      f'{point["latency_ms"]:.1f} ms',
                      f'{point["metrics"][metric]:.4g}')
    Console().print(table)


def draw_points(found: Measurements, metric: str) -> None:
    """Accuracy against each kind of cost, and the ranks of the best plan."""
    points = found.data['points']
    for axis, label in AXES.items():
        curves: Dict[str, Dict[float, float]] = {}
        for point in sorted(points, key=lambda p: p[axis]):
            curve = curves.setdefault(point['planner'], {})
            curve[point[axis]] = point['metrics'][metric]
        plot_curves(curves, found.draw(f'pareto_{axis}.png'), label, metric)
    for point in points:
        name = f'ranks_{point["planner"]}_{point["budget"]:g}.png'
        plot_ranks(
            CompressionPlan.from_dict(point['plan']), found.draw(name))


def main() -> None:
    """Measure what is missing, then draw everything."""
    args = parse_args()
    check_library('matplotlib')
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    check_evaluation(cfg, 'val')
    mkdir_or_exist(cfg.work_dir)
    MMLogger.get_instance('mmbasis', logger_name='mmbasis')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    set_random_seed(args.seed)
    found = Measurements(
        cfg,
        dict(
            config=args.config,
            checkpoint=args.checkpoint,
            calib_batches=args.calib_batches,
            seed=args.seed))
    model = build_dense(cfg)
    load_weights(model, read_checkpoint(args.checkpoint), args.checkpoint)
    model.to(get_device())  # apart: some models override it without a result
    model.eval()

    loader = calibration_dataloader(cfg, args.seed)
    batches = take_batches(loader, args.calib_batches)
    example = example_batch(cfg, 'val')
    if 'dense' not in found.data:
        found.data['dense'] = dict(
            metrics=evaluate(cfg, model, 'val'),
            latency_ms=forward_latency(model, example))
        found.save()
    metrics = found.data['dense']['metrics']
    metric = args.metric or next(iter(metrics), 'of none')
    if metric not in metrics:
        raise ValueError(f'--metric {metric}: there are {list(metrics)}')
    recipe = Recipe.of(
        planner=dict(type='BudgetPlanner', macs=args.budgets[0]))
    analysis = analyze(model, recipe, batches[0])
    found.measure_layers(model, analysis, batches[1] or batches[0])
    plan = make_plan(recipe, analysis)
    plot_spectra(analysis, plan, found.draw('spectra.png'))
    plot_sensitivities(analysis, plan, found.draw('sensitivities.png'))
    plot_losses(found.data['layers'], found.draw('losses.png'))

    done = {(p['planner'], p['budget']) for p in found.data['points']}
    todo = [(name, budget) for name in args.planners for budget in args.budgets
            if (name, budget) not in done]
    for name, budget in track(todo, 'Planners', console=Console()):
        found.measure_point(model, name, budget, batches, example)
    draw_points(found, metric)
    show(found.data, metric)
    Console().print(f'Written to {cfg.work_dir}: analysis.json and pictures')


if __name__ == '__main__':
    main()
