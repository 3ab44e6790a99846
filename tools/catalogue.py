# Copyright (c) mmbasis authors. All rights reserved.
"""Compress every model that the installed MMDetection and MMPretrain ship.

Each distinct model is built from its config on the CPU, without downloads and
with random weights, and is given two synthetic images of reduced size. Then,
in a process of its own:

- dense: which of the modes tensor, predict and loss the model can do; what it
  cannot do without mmbasis is not held against it afterwards;
- full rank: every layer is replaced at full rank, prediction layers included,
  and the outputs are compared, before post-processing where the model has such
  a mode; in float64 where they differ by more than 1e-4 in float32, since
  rounding changes which boxes survive; then once more with a basis of the
  inputs, too, where a layer can have one;
- half: half the MACs of the compressible layers are taken away, by a plan
  from the images, and counted by MMEngine's analysis where it knows the model;
  one model in thirty gets all that users get by default, which takes twice as
  long: ranks by the loss, sequential reconstruction, and the dense model as
  teacher;
- round trip: saved, built again from config and plan, and loaded, the model
  returns the same;
- test mode and train mode work, with finite losses and gradients.

The results lie in the work directory, one file for each model; what is there,
or in the report to be written, is not done again. The order is a shuffle that
is the same each time, so that a part of the sweep says something of the whole:

    python tools/catalogue.py --jobs 2 --limit 100 --out report
"""
import argparse
import json
import os.path as osp
import re
from dataclasses import asdict
from datetime import timedelta
from typing import Dict, List, Optional

import mmdet
import mmpretrain
import torch
from catalogue_sweep.configs import Entry, list_entries
from catalogue_sweep.processes import check_all
from catalogue_sweep.report import STATUS, summary, write
from catalogue_sweep.sample import draw_families, find_models
from mmengine.utils import mkdir_or_exist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import mmbasis
from mmbasis.utils.io import write_atomically
from mmbasis.utils.schema import COUNT, POSITIVE, WHOLE, argument

VERSIONS = dict(
    mmbasis=mmbasis.__version__,
    mmdet=mmdet.__version__,
    mmpretrain=mmpretrain.__version__,
    torch=torch.__version__)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--work-dir',
        default='work_dirs/catalogue',
        help='where the results of single models go')
    parser.add_argument(
        '--out',
        help='write the report as OUT.json and OUT.md; models that are in '
        'it already, with the same versions, are not checked again')
    parser.add_argument(
        '--jobs', type=argument(int, COUNT), default=1,
        help='models at a time (default 1)')
    parser.add_argument(
        '--memory',
        type=argument(float, POSITIVE),
        default=6,
        help='GB that each model may allocate (default 6)')
    parser.add_argument(
        '--timeout',
        type=argument(float, POSITIVE),
        default=600,
        help='CPU seconds that each model may take (default 600)')
    parser.add_argument(
        '--only',
        nargs='+',
        default=[],
        help='regular expressions, of which the name of a config '
        '(mmdet::ssd/ssd300_coco.py) must contain one')
    parser.add_argument(
        '--limit', type=argument(int, COUNT),
        help='only so many, a sample by lot')
    parser.add_argument(
        '--families',
        type=argument(int, COUNT),
        help='only the smallest model, of those that passed before, of so '
        'many families (folders of configs), drawn by --seed')
    parser.add_argument(
        '--seed', type=argument(int, WHOLE), default=0,
        help='of --families (default 0)')
    parser.add_argument(
        '--known',
        default='docs/results/catalogue',
        help='report of the earlier sweep that --families draws from')
    parser.add_argument(
        '--thorough',
        action='store_true',
        help='look at all of them closely, not at one in thirty')
    parser.add_argument(
        '--report-only',
        action='store_true',
        help='report what is done, check nothing')
    parser.add_argument(
        '--again',
        nargs='+',
        default=[],
        choices=STATUS,
        help='check models of this status again')
    return parser.parse_args()


def find_entries(work_dir: str) -> List[Entry]:
    """The models; the list is kept, since reading all configs takes a
    minute."""
    path = osp.join(work_dir, 'models.json')
    if osp.isfile(path):
        with open(path) as file:
            content = json.load(file)
        if content['versions'] == VERSIONS:
            return [Entry(**x) for x in content['models']]
    Console().print('Reading all configs …')
    entries = list_entries()
    models = [asdict(entry) for entry in entries]
    write_atomically(path, json.dumps(dict(versions=VERSIONS, models=models)))
    return entries


def result_path(work_dir: str, entry: Entry) -> str:
    """Where the result of a model lies."""
    return osp.join(work_dir, 'results', f'{entry.key}.json')


def read_report(path: Optional[str]) -> dict:
    """Versions and rows of a report; empty where there is none."""
    if not path or not osp.isfile(f'{path}.json'):
        return dict(versions=None, models=[])
    with open(f'{path}.json') as file:
        return json.load(file)


def load_results(entries: List[Entry], work_dir: str,
                 report: Optional[str]) -> Dict[str, dict]:
    """Results by key, of models that were checked with these versions."""
    content = read_report(report)
    rows = {}
    if content['versions'] == VERSIONS:
        rows = {row['name']: row for row in content['models']}
    results = {}
    for entry in entries:
        path = result_path(work_dir, entry)
        if osp.isfile(path):
            with open(path) as file:
                rows[entry.name] = dict(
                    json.load(file), name=entry.name, configs=entry.configs)
        if entry.name in rows:
            results[entry.key] = rows[entry.name]
    return results


def main() -> None:
    """Check what is left to check, and report."""
    args = parse_args()
    mkdir_or_exist(osp.join(args.work_dir, 'results'))
    catalogue = find_entries(args.work_dir)
    results = load_results(catalogue, args.work_dir, args.out)
    entries = [
        x for x in catalogue
        if not args.only or any(re.search(p, x.name) for p in args.only)
    ]
    entries = sorted(entries, key=lambda x: x.digest)[:args.limit]
    if args.families:
        known = read_report(args.known)['models']
        entries = find_models(
            catalogue, draw_families(known, args.families, args.seed))
    for entry in entries:
        entry.closely = args.thorough
    if not args.report_only:
        sweep([
            x for x in entries
            if x.key not in results or results[x.key]['status'] in args.again
        ], args)
        results = load_results(catalogue, args.work_dir, args.out)
    rows = sorted(results.values(), key=lambda x: x['name'])
    if args.out:
        write(rows, len(catalogue), VERSIONS, args.out)
    Console().print_json(data=summary(rows, len(catalogue)))


def sweep(entries: List[Entry], args: argparse.Namespace) -> None:
    """Check models and keep the results."""
    with Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not Console().is_terminal) as progress:
        task = progress.add_task('models', total=len(entries))
        for entry, result in check_all(entries, args.jobs, args.memory,
                                       args.timeout):
            write_atomically(
                result_path(args.work_dir, entry), json.dumps(result))
            progress.advance(task)
            text = f'{entry.name}: {result["status"]}'
            if result['status'] in ('failed', 'limit'):
                text += f', {result["error"]}'
            if progress.disable:  # no bar is drawn
                done = progress.tasks[task]
                left = timedelta(seconds=done.time_remaining or 0)
                text = f'[{done.completed}/{done.total}] {text}, {left} left'
            progress.console.print(text, markup=False, soft_wrap=True)


if __name__ == '__main__':
    main()
