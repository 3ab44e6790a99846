# Copyright (c) mmbasis authors. All rights reserved.
"""What NVIDIA's parser and builder take of ONNX, and what our check says.

Writes ``operators.json`` and a table ``operators.md``: a tiny graph of each
variant of an operator (``operator_graphs.py``), built by TensorRT for RTX
(``pip install 'mmbasis[trt-check]'``; no GPU), beside what
``mmbasis.deploy.check_tensorrt`` says of it.

    python tools/benchmarks/operators.py --out docs/results
"""
import argparse
import json
import os.path as osp
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any, Dict, List

import onnx

sys.path.insert(0, osp.dirname(osp.abspath(__file__)))

from bench_utils import command  # noqa: E402
from operator_graphs import all_variants  # noqa: E402

from mmbasis.deploy import build_engine, check_tensorrt  # noqa: E402
from mmbasis.deploy.engines import Engine  # noqa: E402

#: after which a builder counts as without an answer
SECONDS = 20.


def examine(model: onnx.ModelProto) -> Dict[str, Any]:
    """What the builder and our check say of a graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'graph.onnx')
        onnx.save(model, path)
        engine = build_engine(path, seconds=SECONDS)
        check = check_tensorrt(path)['10']
    text = '; '.join(dict.fromkeys(x.message for x in engine.refusals))
    return dict(builder=verdict(engine, text), check=check,
                why=re.sub(r' at /_src/\S+|\[[\w.]+::\w+::\d+\] ', '', text))


def verdict(engine: Engine, text: str) -> str:
    """``'built'``, ``'refused'``, or why neither can be said."""
    if not engine.refusals:
        return 'built'
    if not engine.refused:
        return 'own limit'
    if 'no optimization profile' in text:
        return 'parsed'  # sizes are an input, to be given in the profile
    return 'no answer' if 'did not end' in text else 'refused'


def outcome(row: Dict[str, Any]) -> str:
    """Whether the check agrees with the builder. What only this builder lacks
    is not to be refused."""
    if bool(row['check']) == (row['builder'] == 'refused'):
        return 'agrees'
    return 'false alarm' if row['check'] else 'miss'


def markdown(report: Dict[str, Any]) -> str:
    """The table that people read."""
    rows = report['variants']
    found: Dict[str, List[str]] = {'miss': [], 'false alarm': []}
    for name, row in rows.items():
        found.get(outcome(row), []).append(name)
    count = Counter(x['builder'] for x in rows.values())
    lines = [
        "# Operators that NVIDIA's parser takes", '',
        f'{report["builder"]}, {report["date"]}; `{report["command"]}`.', '',
        f'{len(rows)} graphs of one operator: {count["built"]} built, '
        f'{count["parsed"]} parsed (sizes are an input, for which a build '
        f'needs values), {count["refused"]} refused, {count["own limit"]} '
        'that TensorRT takes and only this builder does not, '
        f'{count["no answer"]} that it does not end with. Our check '
        '(`mmbasis.deploy.check_tensorrt`, '
        f'TensorRT 10): {len(found["miss"])} misses, '
        f'{len(found["false alarm"])} false alarms.', ''
    ]
    for kind, names in found.items():
        lines += [f'- {kind}: {name}' for name in names]
    lines += ['', '| variant | builder | check | why |', '|---|---|---|---|']
    for name, row in rows.items():
        cells = (name, row['builder'], '; '.join(row['check']) or 'ok',
                 row['why'])
        lines.append('| ' + ' | '.join(
            x.replace('|', '\\|').replace('\n', ' ') for x in cells) + ' |')
    return '\n'.join(lines) + '\n'


def write(rows: Dict[str, Dict[str, Any]], folder: str) -> None:
    """Write both files."""
    report = dict(
        builder='TensorRT for RTX '
        f'{version("tensorrt-rtx-cu13-bindings")}, compute capability 8.6',
        date=time.strftime('%Y-%m-%d'), command=command(),
        onnx=onnx.__version__, variants=rows)
    for name, text in (('json', json.dumps(report, indent=1) + '\n'),
                       ('md', markdown(report))):
        path = osp.join(folder, f'operators.{name}')
        with open(path, 'w', encoding='utf-8') as file:
            file.write(text)


def main() -> None:
    """Build all, write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='docs/results', help='a folder')
    args = parser.parse_args()
    graphs = all_variants()
    with ThreadPoolExecutor(2) as pool:  # each waits for a process
        rows = dict(zip(graphs, pool.map(examine, graphs.values())))
    write(rows, args.out)


if __name__ == '__main__':
    main()
