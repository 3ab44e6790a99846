# Copyright (c) mmbasis authors. All rights reserved.
"""The results of a sweep as JSON and as Markdown."""
import json
from collections import Counter
from typing import Any, Dict, List, Sequence

from mmbasis.utils.io import write_atomically

#: what can come out, in words
STATUS = {
    'passed': 'pass',
    'failed': 'fail by mmbasis',
    'catalogue': 'cannot run without mmbasis either',
    'limit': 'exceed the memory or time limit of the sweep',
}


def summary(rows: Sequence[Dict[str, Any]], models: int) -> Dict[str, Any]:
    """How many models were built, passed, failed, and why the others did.

    Args:
        rows (Sequence[dict]): Results, with ``name`` and ``configs``.
        models (int): How many models the catalogue has.
    """
    built = [x for x in rows if x.get('built')]
    causes: Dict[str, Counter] = dict(not_built=Counter(), built=Counter())
    for row in rows:
        if row['status'] != 'passed':
            kind = 'built' if row.get('built') else 'not_built'
            causes[kind][row['cause']] += 1
    count = {k: sum(x['status'] == k for x in built) for k in STATUS}
    runs = len(built) - count['catalogue']
    return dict(
        models=models,
        checked=len(rows),
        configs=sum(len(x['configs']) for x in rows),
        not_built=len(rows) - len(built),
        built=len(built),
        **count,
        passed_of_built=round(count['passed'] / max(len(built), 1), 6),
        passed_of_running=round(count['passed'] / max(runs, 1), 6),
        thorough=sum(x['status'] == 'passed' and x.get('thorough', False)
                     for x in rows),
        stand_ins=sum(x['status'] == 'passed' and bool(x.get('stand_ins'))
                      for x in rows),
        layer_by_layer=sum(x['status'] == 'passed' and 'layer_error' in x
                           for x in rows),
        causes={
            k: dict(v.most_common())
            for k, v in causes.items()
        },
        seconds=round(sum(x['seconds'] for x in rows)),
        cpu_seconds=round(sum(x.get('cpu_seconds', 0) for x in rows)))


def markdown(rows: Sequence[Dict[str, Any]], models: int,
             versions: Dict[str, str]) -> str:
    """The report as text."""
    total = summary(rows, models)
    lines = [
        '# The model catalogue of MMDetection and MMPretrain', '',
        'Written by `tools/catalogue.py`, which says what is checked. '
        'Configs whose model is the same count once. ' +
        ', '.join(f'{k} {v}' for k, v in versions.items()) + '.', '',
        f'- {total["checked"]} of {models} distinct models were checked; they '
        f'stand in {total["configs"]} configs',
        f'- {total["not_built"]} cannot be built on a CPU without downloads',
        f'- {total["built"]} are built, of which'
    ]
    lines += [f'  - {total[key]} {text}' for key, text in STATUS.items()]
    lines += [
        f'- {total["passed_of_built"]:.1%} of those that are built pass, '
        f'{total["passed_of_running"]:.1%} of those that also run without '
        'mmbasis',
        f'- {total["thorough"]} of those that pass were compressed by the '
        'default pipeline, the others without gradients, reconstruction and '
        'teacher',
        f'- {total["layer_by_layer"]} of those that pass were compared layer '
        'by layer, each on its own inputs: their output is a loss only, or '
        'the dense model turns rounding of its weights into differences '
        'above 1e-4, too',
        f'- {total["stand_ins"]} of those that pass ran with stand-ins for '
        'operators that MMCV has for accelerators only',
        f'- {total["seconds"] / max(len(rows), 1):.0f} s per model, '
        f'{total["cpu_seconds"] / max(len(rows), 1):.0f} s of one core'
    ]
    for kind, causes in total['causes'].items():
        title = 'built' if kind == 'built' else 'not built'
        lines += ['', f'## Causes: {title}', '', '| cause | models |', '|-|-|']
        lines += [f'| {k} | {v} |' for k, v in causes.items()]
    return '\n'.join(lines + _others(rows) + _passes(rows)) + '\n'


def _others(rows: Sequence[Dict[str, Any]]) -> List[str]:
    lines = [
        '', '## Models that do not pass', '',
        '| config | configs | cause | step | error |', '|-|-|-|-|-|'
    ]
    return lines + [
        f'| {x["name"]} | {len(x["configs"])} | {x["cause"]} | {x["step"]} | '
        f'{_cell(x["error"])} |' for x in rows if x['status'] != 'passed'
    ]


def _passes(rows: Sequence[Dict[str, Any]]) -> List[str]:
    lines = [
        '', '## Models that pass', '',
        'Layers: replaced at half the MACs, and at full rank. Error: the '
        'largest relative difference of outputs at full rank. MACs: of the '
        'compressible layers, kept by the plan. Lacks: the modes that the '
        'dense model cannot do either. Dense: layers that cannot or shall not '
        'be compressed, by reason.', '',
        '| config | configs | M params | layers | error | MACs | s | lacks | '
        'dense |', '|-|-|-|-|-|-|-|-|-|'
    ]
    return lines + [_passed(x) for x in rows if x['status'] == 'passed']


def _passed(row: Dict[str, Any]) -> str:
    macs, skipped = row['macs'], row['skipped']
    cells: List[Any] = [
        row['name'],
        len(row['configs']), f'{row["params"] / 1e6:.1f}',
        f'{row["layers"]} / {row["full_rank_layers"]}',
        f'{row["full_rank_error"]:.0e}' +
        (f' (layers {row["layer_error"]:.0e})' if 'layer_error' in row else
         ''), f'{macs["after"] / macs["before"]:.1%}', f'{row["seconds"]:.0f}',
        ', '.join(row['dense_errors']), '; '.join(f'{v} {_cell(k)}'
                                                  for k, v in skipped.items())
    ]
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def _cell(text: str) -> str:
    return text.replace('|', '\\|').replace('<', '&lt;')[:160]


def write(rows: Sequence[Dict[str, Any]], models: int,
          versions: Dict[str, str], path: str) -> None:
    """Write ``path.json``, a line for each model, and ``path.md``.

    Args:
        rows (Sequence[dict]): Results, with ``name`` and ``configs``.
        models (int): How many models the catalogue has.
        versions (dict[str, str]): Of the libraries.
        path (str): Without extension.
    """
    head = json.dumps(
        dict(versions=versions, summary=summary(rows, models)), indent=1)
    body = ',\n'.join(json.dumps(row) for row in rows)
    text = f'{head[:-2]},\n "models": [\n{body}\n]}}\n'
    write_atomically(f'{path}.json', text)
    write_atomically(f'{path}.md', markdown(rows, models, versions))
