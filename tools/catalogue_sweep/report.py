# Copyright (c) mmbasis authors. All rights reserved.
"""The results of a sweep as JSON and as Markdown."""
import json
from collections import Counter
from typing import Any, Dict, List, Sequence

from mmbasis.utils.io import write_atomically

_STATUS = {
    'passed': 'passed',
    'failed': 'failed, by mmbasis',
    'catalogue': 'fail without mmbasis, too',
    'limit': 'memory or time limit of the sweep',
}


def summary(rows: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """How many models were built, passed, failed, and why the others did.

    Args:
        rows (Sequence[dict]): Results, with ``name`` and ``configs``.
    """
    built = [x for x in rows if x.get('built')]
    causes: Dict[str, Counter] = {}
    for row in rows:
        if row['status'] != 'passed':
            kind = 'built' if row.get('built') else 'not built'
            causes.setdefault(kind, Counter())[row['cause']] += 1
    passed = sum(x['status'] == 'passed' for x in built)
    return dict(
        models=len(rows),
        configs=sum(len(x['configs']) for x in rows),
        not_built=len(rows) - len(built),
        built=len(built),
        **{k: sum(x['status'] == k for x in built)
           for k in _STATUS},
        passed_of_built=passed / max(len(built), 1),
        causes={
            k: dict(v.most_common())
            for k, v in causes.items()
        },
        seconds=round(sum(x['seconds'] for x in rows)))


def markdown(rows: Sequence[Dict[str, Any]], versions: Dict[str, str]) -> str:
    """The report as text."""
    total = summary(rows)
    lines = [
        '# The model catalogue of MMDetection and MMPretrain', '',
        'Written by `tools/catalogue.py`, which says what is checked. '
        'Configs whose model is the same count once. ' +
        ', '.join(f'{k} {v}' for k, v in versions.items()) + '.', '',
        f'- {total["models"]} distinct models in {total["configs"]} configs',
        f'- {total["not_built"]} cannot be built on a CPU without downloads',
        f'- {total["built"]} are built, of these {total["passed"]} pass: '
        f'{total["passed_of_built"]:.1%}'
    ]
    lines += [
        f'- {total[key]} {text}' for key, text in _STATUS.items()
        if key != 'passed'
    ]
    for kind, causes in total['causes'].items():
        lines += ['', f'## Causes: {kind}', '', '| cause | models |', '|-|-|']
        lines += [f'| {k} | {v} |' for k, v in causes.items()]
    others = [x for x in rows if x['status'] != 'passed']
    lines += [
        '', '## Models that do not pass', '',
        '| config | configs | cause | step | error |', '|-|-|-|-|-|'
    ]
    lines += [
        f'| {x["name"]} | {len(x["configs"])} | {x["cause"]} | {x["step"]} | '
        f'{_cell(x["error"])} |' for x in others
    ]
    lines += [
        '', '## Models that pass', '',
        'Error: the largest relative difference of outputs at full rank. '
        'MACs: of the compressible layers, kept by the plan.', '',
        '| config | configs | M params | layers | error | MACs | s | '
        'left dense |', '|-|-|-|-|-|-|-|-|'
    ]
    lines += [_passed(x) for x in rows if x['status'] == 'passed']
    return '\n'.join(lines) + '\n'


def _passed(row: Dict[str, Any]) -> str:
    macs, skipped = row['macs'], row['skipped']
    cells: List[Any] = [
        row['name'],
        len(row['configs']), f'{row["params"] / 1e6:.1f}',
        f'{row["layers"]} / {row["full_rank_layers"]}',
        f'{row["full_rank_error"]:.0e}',
        f'{macs["after"] / macs["before"]:.1%}', f'{row["seconds"]:.0f}',
        '; '.join(f'{v} {_cell(k)}' for k, v in skipped.items())
    ]
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def _cell(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;')[:160]


def write(rows: Sequence[Dict[str, Any]], versions: Dict[str, str],
          path: str) -> None:
    """Write ``path.json`` and ``path.md``."""
    content = dict(versions=versions, summary=summary(rows), models=rows)
    write_atomically(f'{path}.json', json.dumps(content, indent=1) + '\n')
    write_atomically(f'{path}.md', markdown(rows, versions))
