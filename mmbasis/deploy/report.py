# Copyright (c) mmbasis authors. All rights reserved.
"""The report of an export, on the terminal."""
import os.path as osp

from rich.console import Console
from rich.table import Table


def _print_comparison(console: Console, comparison: dict) -> None:
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


def _print_engines(console: Console, report: dict) -> None:
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


def _print_precisions(console: Console, report: dict) -> None:
    """Show the graphs of lower precision."""
    table = Table('precision', 'what', 'error', 'limit', 'agrees')
    for precision, entry in report.items():
        for what, found in entry.get('comparison', {}).items():
            error = found.get('relative', found.get('unmatched'))
            table.add_row(precision, what, f'{error:.1e}',
                          f'{found["limit"]:.1e}',
                          'yes' if found['agrees'] else 'NO')
        for key, value in entry.items():
            if key != 'comparison':
                console.print(f'{precision}, {key}: {value}',
                              soft_wrap=True)
    if table.rows:
        console.print(table)


def print_report(report: dict) -> None:
    """Show what ``tools/deploy.py`` wrote and found, its report.json."""
    console = Console()
    for path, size in report['files'].items():
        console.print(f'{path}: {size / 1e6:.3f} MB, opset {report["opset"]}')
    weights = report['weights']
    console.print(f'Parameters: {report["params"]:,} of the model, '
                  f'{weights["params"]:,} in the graph, of which '
                  f'{weights["planned"]:,} are weights of basis layers')
    _print_comparison(console, report['comparison'])
    for path, versions in report['tensorrt'].items():
        for version, problems in versions.items():
            console.print(
                f'TensorRT {version}, {osp.basename(path)}: ' +
                ('; '.join(problems) or 'all operators supported'),
                soft_wrap=True)
    if 'engine' in report:
        _print_engines(console, report['engine'])
    for key in ('metrics', 'calibration', 'merged'):
        if key in report:
            console.print(f'{key}: {report[key]}')
    _print_precisions(console, report.get('precisions', {}))
    console.print('To build the engine on the device, by its TensorRT (8.5 '
                  'is of JetPack 5):')
    for commands in report['trtexec']:
        for version, command in commands.items():
            console.print(f'{version}: {command}', soft_wrap=True)
