# Copyright (c) mmbasis authors. All rights reserved.
"""Train, compress, fine-tune and evaluate a small network with the tools of
mmbasis, on images that need no download, and compare the three networks.

Writes table.txt, summary.json, logs and the results of each tool into
work_dirs/demo.
"""
import argparse
import json
import os
import os.path as osp
import subprocess
import sys
import time

import torch
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table

from mmbasis.utils import load_config
from mmbasis.utils.io import write_atomically

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
CONFIG = osp.join('configs', 'demo', 'digits.py')
# a fifth of the dense learning rate: the weights need no large steps any more
FINE_TUNING = ('optim_wrapper.optimizer.lr=0.01', )
console = Console()


def run_tool(name: str, work_dir: str, *command: str) -> None:
    """Run one tool, its output in a log.

    Args:
        name (str): What the tool does here; also names the log.
        work_dir (str): Folder of the log.
        *command (str): Script, relative to the repository, and arguments.

    Raises:
        SystemExit: If the tool fails, after the end of its log was shown.
    """
    log = osp.join(work_dir, f'{name}.log')
    console.print(
        f'[bold]{name}[/]: python {" ".join(command)}', soft_wrap=True)
    start = time.perf_counter()
    with open(log, 'w', encoding='utf-8') as file:
        code = subprocess.call([sys.executable, *command],
                               cwd=ROOT,
                               stdout=file,
                               stderr=subprocess.STDOUT)
    if code:
        with open(log, encoding='utf-8') as file:
            sys.stderr.write(''.join(file.readlines()[-30:]))
        sys.exit(f'{name} failed with code {code}; whole log: {log}')
    console.print(f'  {time.perf_counter() - start:.0f} s, log in {log}')


def read_json(*parts: str) -> dict:
    """Read a JSON file."""
    with open(osp.join(*parts), encoding='utf-8') as file:
        return json.load(file)


def run_tools(work_dir: str, macs: float, epochs: int) -> dict:
    """Run the whole chain.

    Args:
        work_dir (str): Folder for everything that is written.
        macs (float): Fraction of the compressible MACs to keep.
        epochs (int): Epochs of the dense training; fine-tuning takes half.

    Returns:
        dict[str, tuple[str, str, dict]]: Config, checkpoint and test metrics
        of the dense, the compressed and the fine-tuned network.
    """
    folders = {
        name: osp.join(work_dir, name)
        for name in ('dense', 'compressed', 'fine-tuned')
    }
    standalone = osp.join(folders['compressed'], 'compressed.py')
    half = max(1, epochs // 2)
    networks = {
        'dense': (CONFIG, osp.join(folders['dense'], f'epoch_{epochs}.pth')),
        'compressed':
        (standalone, osp.join(folders['compressed'], 'compressed.pth')),
        'fine-tuned':
        (standalone, osp.join(folders['fine-tuned'], f'epoch_{half}.pth'))
    }
    run_tool('data', work_dir, 'tools/demo/make_digits.py')
    run_tool('train', work_dir, 'tools/train.py', CONFIG, '--work-dir',
             folders['dense'], '--cfg-options', *schedule(epochs))
    run_tool('compress', work_dir, 'tools/compress.py', *networks['dense'],
             '--macs', str(macs), '--calib-batches', '8', '--work-dir',
             folders['compressed'])
    run_tool('fine-tune', work_dir, 'tools/train.py', standalone,
             '--work-dir', folders['fine-tuned'], '--cfg-options',
             *schedule(half), *FINE_TUNING)
    results = {}
    for name, (config, checkpoint) in networks.items():
        metrics = osp.join(folders[name], 'metrics.json')
        run_tool(f'test-{name}', work_dir, 'tools/test.py', config, checkpoint,
                 '--work-dir', folders[name], '--out', metrics)
        results[name] = (config, checkpoint, read_json(metrics))
    return results


def schedule(epochs: int) -> tuple:
    """Config options that set the number of epochs."""
    return (f'train_cfg.max_epochs={epochs}',
            f'train_cfg.val_interval={epochs}',
            f'param_scheduler.T_max={epochs}')


def measure_speed(networks: dict,
                  image_size: int,
                  batch_size: int = 64,
                  rounds: int = 30) -> dict:
    """Time the forward passes of several networks in turn.

    One after the other in every round, so that a slow moment of the machine
    meets all of them; the fastest round counts, because whatever else the
    machine does only adds to the time.

    Args:
        networks (dict[str, nn.Module]): The networks.
        image_size (int): Height and width of the images in pixels.
        batch_size (int): Images of a batch. Defaults to 64.
        rounds (int): Number of rounds. Defaults to 30.

    Returns:
        dict[str, float]: Images per second.
    """
    images = torch.randn(batch_size, 3, image_size, image_size)
    seconds = {name: float('inf') for name in networks}
    with torch.no_grad():
        for _ in range(rounds):
            for name, network in networks.items():
                start = time.perf_counter()
                network(images)
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return {name: batch_size / best for name, best in seconds.items()}


def summarise(results: dict, report: dict) -> dict:
    """Collect the figures of the table.

    Args:
        results (dict): What :func:`run_tools` returns.
        report (dict): The ``report.json`` of ``tools/compress.py``.

    Returns:
        dict[str, dict]: For each network ``macs``, ``params``, ``accuracy``
        in percent and ``images_per_second``.
    """
    # the checkpoints are read by mmpretrain alone: no wrapper, no hook
    from mmpretrain import get_model
    MMLogger.get_instance('demo', log_level='ERROR')
    networks = {
        name: get_model(load_config(config), checkpoint, device='cpu').eval()
        for name, (config, checkpoint, _) in results.items()
    }
    crop = load_config(CONFIG).train_pipeline[-2]['crop_size']
    speed = measure_speed(networks, crop)
    summary = {}
    for name, (_, _, metrics) in results.items():
        when = 'before' if name == 'dense' else 'after'
        summary[name] = dict(
            macs=report['macs'][when],
            params=report['params'][when],
            accuracy=metrics['accuracy/top1'],
            images_per_second=speed[name])
    return summary


def make_table(summary: dict) -> Table:
    """Lay out the figures, each with its ratio to the dense network's."""
    table = Table(
        'network',
        'MACs',
        'parameters',
        'test accuracy',
        'images/s',
        title='Handwritten digits, ResNet-18 with 32 to 256 channels, '
        f'{torch.get_num_threads()} threads')
    dense = summary['dense']
    for name, row in summary.items():
        ratios = {key: value / dense[key] for key, value in row.items()}
        table.add_row(
            name, f"{row['macs'] / 1e6:.2f} M ({ratios['macs']:.0%})",
            f"{row['params'] / 1e6:.3f} M ({ratios['params']:.0%})",
            f"{row['accuracy']:.2f} %", f"{row['images_per_second']:.0f} "
            f"({ratios['images_per_second']:.2f}x)")
    return table


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--macs',
        type=float,
        default=0.25,
        help='fraction of the MACs to keep (default 0.25)')
    parser.add_argument(
        '--epochs',
        type=int,
        default=20,
        help='epochs of the dense training; fine-tuning takes half')
    parser.add_argument('--work-dir', default='work_dirs/demo')
    args = parser.parse_args()
    os.chdir(ROOT)
    os.makedirs(args.work_dir, exist_ok=True)
    start = time.perf_counter()
    results = run_tools(args.work_dir, args.macs, args.epochs)
    compressed = osp.join(args.work_dir, 'compressed')
    summary = summarise(results, read_json(compressed, 'report.json'))
    table = make_table(summary)
    path = osp.join(args.work_dir, 'table.txt')
    with open(path, 'w', encoding='utf-8') as file:
        Console(file=file, width=100).print(table)
    write_atomically(
        osp.join(args.work_dir, 'summary.json'), json.dumps(summary, indent=2))
    console.print(table)
    console.print(f'Table: {path}, figures: {args.work_dir}/summary.json')
    for name in sorted(os.listdir(compressed)):
        if name.endswith('.png'):
            console.print(f'Plot: {osp.join(compressed, name)}')
    console.print(f'Whole demo: {time.perf_counter() - start:.0f} s')


if __name__ == '__main__':
    main()
