# Copyright (c) mmbasis authors. All rights reserved.
"""Which layers stay dense by default, in every model of the catalogue.

Up to revision 5b48767 names decided, since then the graph of a forward pass
does. This runs both over the models that ``tools/catalogue.py`` built, with
its images, and reports where they differ and why. Layers that a forward pass
does not call, or that stay dense for another reason, are left out.

Results go to a file of JSON lines; what is there is not done again:

    python tools/benchmarks/prediction_layers.py --out prediction_layers
"""
import argparse
import json
import os.path as osp
import platform
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict
from datetime import datetime
from typing import Any, Callable, Dict, List, Set, Tuple

import torch
import torch.nn as nn

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
sys.path.insert(0, osp.join(ROOT, 'tools'))

from bench_utils import command  # noqa: E402
from catalogue import VERSIONS, find_entries  # noqa: E402
from catalogue_sweep.checks import describe  # noqa: E402
from catalogue_sweep.compare import forward  # noqa: E402
from catalogue_sweep.configs import Entry, read_config  # noqa: E402
from catalogue_sweep.data import make_batch  # noqa: E402
from catalogue_sweep.models import build, settle_norms  # noqa: E402
from catalogue_sweep.processes import check_all  # noqa: E402

from mmbasis.planning import find_layers  # noqa: E402
from mmbasis.running import (  # noqa: E402
    trace_targets,
    train_deterministically,
)

#: the last one with names
REVISION = '5b48767'
CATALOGUE = osp.join(ROOT, 'docs', 'results', 'catalogue.json')

MODES = ('loss', 'tensor', 'predict')
#: library, sign, pattern of a layer's name, and why the two differ there
REASONS = (
    ('mmdet', '+', r'mask_feature$|mask_feature_head\.conv_pred',
     'features that are multiplied by what another layer predicts: a mask is '
     'the product of the two, and names listed only the other one'),
    ('mmdet', '+', r'track_head\.(.*\.)?(embed_head|fcs|fc)',
     'embeddings that are compared by products: nothing comes behind'),
    ('mmdet::yolo/yolov3_mobilenetv2', '+', r'backbone\.conv2',
     'computed, but used by nobody: where an output goes that no layer takes '
     'cannot be seen, and detached predictions look the same'),
    ('mmpretrain::cae/', '+', r'^neck\.regressors',
     'its loss takes the features of a residual stream, and all branches of '
     'that count; mmbasis refuses the model'),
    ('mmpretrain', '+', r'^(neck|head|decode|img_head)\b',
     'pretext tasks: what the loss takes is the output of a projector, '
     'predictor or decoder, whose names were not listed'),
    ('mmpretrain', '+', r'^(backbone|image_encoder|visual)\b',
     'no head: the last layer before the features that the model outputs'),
    ('mmdet', '-', r'ref_(point|anchor)_head',
     'embeds a position, or scales its embedding: attention layers take that, '
     'no sampling does'),
    ('mmdet', '-', r'(offset_module|offset_fc|mask_fc|dcn_offset)',
     'inside an offset branch, but not its end'),
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        '--work-dir',
        default='work_dirs/prediction_layers',
        help='where the results of single models go')
    parser.add_argument('--out', help='write OUT.json and OUT.md')
    parser.add_argument('--limit', type=int, help='look at only so many')
    parser.add_argument(
        '--max-params', type=float, default=3e8, help='skip larger models')
    parser.add_argument(
        '--report-only', action='store_true', help='look at nothing')
    parser.add_argument('--memory', type=float, default=8, help='GB for each')
    return parser.parse_args()


def named_choice() -> Dict[str, Callable]:
    """The functions that decided by name."""
    path = f'{REVISION}:mmbasis/planning/targets.py'
    text = subprocess.check_output(['git', 'show', path], cwd=ROOT, text=True)
    functions: Dict[str, Any] = {}
    text = text.replace('from ..layers import basis_layer_type',
                        'from mmbasis.layers import kind_of')
    exec(text.replace('basis_layer_type', 'kind_of'), functions)
    return functions


def look_at(entry: Entry, size: int, named: Dict[str, Callable]) -> dict:
    """Both choices for a model."""
    cfg = read_config(entry.library, entry.configs[0])
    model = build(cfg)
    layers = find_layers(model)
    modules = {x.name: x.module for x in layers}
    result: Dict[str, Any] = dict(
        name=entry.name,
        reasons={
            x.name: x.obstacle.words
            for x in layers if x.obstacle is not None
        },
        old_pred=[
            x for x in modules if named['is_prediction_layer'](model, x)
        ],
        old_off=[x for x in modules if named['is_offset_layer'](model, x)])
    data = make_batch(cfg, model, size)
    try:
        with torch.no_grad():
            settle_norms(model, lambda: forward(model, data, 'tensor'))
    except Exception:
        pass  # it has no such mode; norms stay as they are
    for mode in MODES:
        if mode == 'predict' and 'pred' in result['tensor']:
            break
        try:
            result[mode] = trace(model, modules, data, mode)
        except Exception as error:
            result[mode] = dict(error=describe(error))
    return result


def trace(model: nn.Module, modules: Dict[str, nn.Module], data: Any,
          mode: str) -> dict:
    """What the graph says in one mode."""
    called: Set[str] = set()
    handles = [
        x.register_forward_pre_hook(lambda *args, k=k: called.add(k))
        for k, x in modules.items()
    ]

    def run() -> Any:
        if mode != 'loss':
            return forward(model, data, mode)
        train_deterministically(model)
        return model.parse_losses(forward(model, data, mode))[0]

    start = time.time()
    try:
        found = trace_targets(model, modules, run)
    finally:
        for handle in handles:
            handle.remove()
    return dict(
        pred=sorted(found.predictions),
        off=sorted(found.offsets),
        uncalled=[x for x in modules if x not in called],
        seconds=round(time.time() - start, 2))


def sweep(args: argparse.Namespace, path: str) -> None:
    """Look at the models that are left: of each family first one, then the
    next, small ones first."""
    with open(CATALOGUE) as file:
        rows = {x['name']: x for x in json.load(file)['models']}
    named = named_choice()
    done = {x['name'] for x in read(path)}
    places, order = Counter(), []
    entries = [
        x for x in find_entries(args.work_dir)
        if rows.get(x.name, {}).get('params', 1e12) < args.max_params
    ]
    for entry in sorted(entries, key=lambda x: rows[x.name]['cpu_seconds']):
        family = entry.name.split('/')[0]
        places[family] += 1
        if entry.name not in done:
            order.append((places[family], entry))
    order.sort(key=lambda x: x[0])

    def work(entry: Entry, report: Callable) -> dict:
        try:
            return look_at(entry, rows[entry.name].get('size', 224), named)
        except Exception as error:
            return dict(error=describe(error))

    todo = [x for _, x in order][:args.limit]
    with open(path, 'a') as file:
        for entry, result in check_all(todo, memory_gb=args.memory, work=work):
            result['name'] = entry.name
            file.write(json.dumps(result) + '\n')
            file.flush()
            print(entry.name, result.get('error', ''), flush=True)


def read(path: str) -> List[dict]:
    if not osp.isfile(path):
        return []
    with open(path) as file:
        return [json.loads(x) for x in file]


def chosen(row: dict) -> Tuple[str, dict, dict]:
    """Mode, and layers by what they are for: by name, and by the graph."""
    mode = next((m for m in MODES if 'pred' in row.get(m, {})), '')
    found = row.get(mode, dict(pred=[], off=[], uncalled=[]))
    out = set(row.get('reasons', ())) | set(found['uncalled'])
    # which reason is given first is no difference
    old = dict.fromkeys(row.get('old_pred', ()), 'prediction')
    old.update(dict.fromkeys(row.get('old_off', ()), 'offsets'))
    new = dict.fromkeys(found['off'], 'offsets')
    new.update(dict.fromkeys(found['pred'], 'prediction'))
    return mode, *({
        k: v
        for k, v in x.items() if k not in out
    } for x in (old, new))


def explain(library: str, sign: str, name: str) -> str:
    for where, signs, pattern, text in REASONS:
        if sign in signs and library.startswith(where) and re.search(
                pattern, name):
            return text
    return 'not explained'


def differences(row: dict) -> List[Tuple[str, str, str, str]]:
    """Sign, kind, name without numbers, and explanation."""
    _, old, new = chosen(row)
    found = [('-', old[x], x) for x in old.keys() - new.keys()]
    found += [('+', new[x], x) for x in new.keys() - old.keys()]
    return sorted({(sign, kind, re.sub(r'\d+', '#',
                                       name), explain(row['name'], sign, name))
                   for sign, kind, name in found})


def without_annotations(row: dict) -> List[Tuple[str, str]]:
    """What the raw outputs say otherwise than the losses, of the layers that
    both modes call."""
    loss, raw = row.get('loss', {}), row.get('tensor', {})
    if 'pred' not in loss or 'pred' not in raw:
        return []
    out = {*row['reasons'], *loss['uncalled'], *raw['uncalled']}
    one, other = ({*x['pred'], *x['off']} - out for x in (loss, raw))
    return sorted({(sign, re.sub(r'\d+', '#', name))
                   for sign, names in (('-', one - other), ('+', other - one))
                   for name in names})


def listing(groups: Dict[tuple, List[str]]) -> List[str]:
    """A paragraph for each explanation, with the layers it is for."""
    by_reason = defaultdict(dict)
    for (sign, kind, layer, reason), names in groups.items():
        by_reason[sign, kind, reason][layer] = names
    lines = []
    for (sign, kind, reason), layers in by_reason.items():
        models = sorted({x for names in layers.values() for x in names})
        counts = ', '.join(
            f'`{k}` ({len(v)})'
            for k, v in sorted(layers.items(), key=lambda x: -len(x[1])))
        lines.append(f'- `{sign}` {kind}, {len(models)} models: {reason}. '
                     f'{counts}; for example {models[0]}')
    return lines


def cpu() -> str:
    with open('/proc/cpuinfo') as file:
        names = re.findall(r'model name\s*: (.*)', file.read())
    return f'{names[0]}, {len(names)} cores, of which one was used'


def figures(rows: List[dict], failed: List[dict], built: int) -> dict:
    """All that is reported but the differences themselves."""
    both = [
        x for x in rows
        if 'pred' in x.get('loss', {}) and 'pred' in x.get('tensor', {})
    ]
    modes = {x['name']: chosen(x)[0] for x in rows}
    seconds = {x['name']: x[modes[x['name']]]['seconds'] for x in rows}
    return dict(
        date=f'{datetime.now():%Y-%m-%d %H:%M}',
        machine=f'{cpu()}, shared with other work',
        versions=dict(VERSIONS, python=platform.python_version()),
        names_of=REVISION,
        command=command(),
        built=built,
        looked_at=len(rows),
        same=sum(not differences(x) for x in rows),
        modes=dict(Counter(modes.values())),
        both=len(both),
        agree=sum(not without_annotations(x) for x in both),
        failed={x['name']: x['error']
                for x in failed},
        median_seconds=sorted(seconds.values())[len(rows) // 2],
        most_seconds=max(seconds.values()),
        models={k: [modes[k], seconds[k]]
                for k in sorted(modes)})


def report(rows: List[dict], built: int, out: str) -> None:
    """Write what differs, by kind of difference."""
    failed = [x for x in rows if 'error' in x or not chosen(x)[0]]
    rows = [x for x in rows if x not in failed]
    kinds, raw = defaultdict(list), defaultdict(list)
    for row in rows:
        for difference in differences(row):
            kinds[difference].append(row['name'])
        for item in without_annotations(row):
            raw[item].append(row['name'])
    facts = figures(rows, failed, built)
    facts['differences'] = [
        dict(zip(('sign', 'kind', 'layer', 'reason'), key), models=names)
        for key, names in kinds.items()
    ]
    facts['without_annotations'] = [
        dict(sign=a, layer=b, models=names) for (a, b), names in raw.items()
    ]
    versions = ', '.join(f'{k} {v}' for k, v in facts['versions'].items())
    losses = facts['modes'].get('loss', 0)
    lines = [
        '# Layers that stay dense by default: the graph against names', '',
        'Written by `tools/benchmarks/prediction_layers.py`, which says what '
        f'is compared, on {facts["date"]}. {facts["machine"]}; {versions}; '
        f'names of revision {REVISION}.', '',
        f'- Of {built} models of the catalogue that can be built, '
        f'{len(rows)} were looked at: of each family first one, then the '
        f'next, smaller ones first. {losses} by their '
        f'losses, {len(rows) - losses} by their outputs, where a loss is '
        f'missing. {len(failed)} could not be built here or run: packages '
        'are missing (see the JSON file)',
        f'- {facts["same"]} choose the same layers both ways, '
        f'{len(rows) - facts["same"]} do not',
        f'- {facts["agree"]} of {facts["both"]} choose the same by raw '
        'outputs, for which no annotations are needed, as by losses',
        f'- A trace took {facts["median_seconds"]} s (median), at most '
        f'{facts["most_seconds"]} s, most of it the forward pass', '',
        '## Differences', '',
        '`-`: names kept it dense, the graph does not. `+`: the other way '
        'round. In brackets: models. Numbers in names are `#`.', '',
        *listing(kinds), '', '## Outputs instead of losses', '',
        'Layers that both modes call: found by outputs only (`+`), or by '
        'losses only (`-`). Features among the outputs count as predictions '
        'of their last layers.', ''
    ]
    lines += [
        f'- `{sign}` `{layer}` ({len(names)}), for example {names[0]}'
        for (sign, layer), names in raw.items()
    ]
    with open(f'{out}.md', 'w') as file:
        file.write('\n'.join(lines) + '\n')
    with open(f'{out}.json', 'w') as file:
        json.dump(facts, file, indent=1)
        file.write('\n')


def main() -> None:
    args = parse_args()
    path = osp.join(args.work_dir, 'models.jsonl')
    if not args.report_only:
        sweep(args, path)
    if args.out:
        with open(CATALOGUE) as file:
            built = sum(
                bool(x.get('built')) for x in json.load(file)['models'])
        report(read(path), built, args.out)


if __name__ == '__main__':
    main()
