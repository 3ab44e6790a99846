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
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List

import onnx

sys.path.insert(0, osp.dirname(osp.abspath(__file__)))

from bench_utils import command  # noqa: E402
from operator_graphs import all_variants  # noqa: E402

from mmbasis.deploy import build_engine, check_tensorrt  # noqa: E402
from mmbasis.deploy.engines import Engine  # noqa: E402

#: after which a builder counts as without an answer
SECONDS = 20.


def examine(model: onnx.ModelProto) -> Dict[str, str]:
    """What the builder says of a graph."""
    with saved(model) as path:
        engine = build_engine(path, seconds=SECONDS)
    text = '; '.join(dict.fromkeys(x.message for x in engine.refusals))
    return dict(
        builder=verdict(engine, text),
        why=re.sub(r' at /_src/\S+|\[[\w.]+::\w+::\d+\] ', '', text))


def check(model: onnx.ModelProto) -> List[str]:
    """What our check says against it."""
    with saved(model) as path:
        return check_tensorrt(path)['10']


@contextmanager
def saved(model: onnx.ModelProto) -> Iterator[str]:
    """A file with the graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'graph.onnx')
        onnx.save(model, path)
        yield path


def verdict(engine: Engine, text: str) -> str:
    """``'built'``, ``'refused'``, or why neither can be said."""
    if not engine.refusals:
        return 'built'
    if not engine.refused:
        return 'own limit'
    if 'no optimization profile' in text:
        return 'parsed'  # sizes are an input, to be given in the profile
    return 'no answer' if 'did not end' in text else 'refused'


def outcome(builder: str, problems: List[str]) -> str:
    """Whether the check agrees with the builder. What only this builder lacks
    is not to be refused."""
    if bool(problems) == (builder == 'refused'):
        return 'agrees'
    return 'false alarm' if problems else 'miss'


def markdown(report: Dict[str, Any], outcomes: Dict[str, str]) -> str:
    """The table that people read; outcomes are of the check, by name."""
    rows = report['variants']
    count = Counter(x['builder'] for x in rows.values())
    differ = Counter(outcomes.values())
    lines = [
        "# Operators that NVIDIA's parser takes", '',
        f'{report["builder"]}, {report["date"]}; `{report["command"]}`.', '',
        f'{len(rows)} graphs of one operator: {count["built"]} built, '
        f'{count["parsed"]} parsed (sizes are an input, for which a build '
        f'needs values), {count["refused"]} refused, {count["own limit"]} '
        'that TensorRT takes and only this builder does not, '
        f'{count["no answer"]} that it does not end with. Our check '
        f'(`check_tensorrt`, TensorRT 10): {differ["miss"]} misses, '
        f'{differ["false alarm"]} false alarms.', ''
    ]
    lines += [f'- {x}: {k}' for k, x in outcomes.items() if x != 'agrees']
    lines += ['', '| variant | builder | why |', '|---|---|---|']
    for name, row in rows.items():
        text = f'| {name} | {row["builder"]} | {row["why"]} |'
        lines.append(text.replace('\n', ' '))
    return '\n'.join(lines) + '\n'


def write(rows: Dict[str, Dict[str, str]], outcomes: Dict[str, str],
          version: str, folder: str) -> None:
    """Write both files."""
    report = dict(
        builder=f'TensorRT for RTX {version}, compute capability 8.6',
        date=time.strftime('%Y-%m-%d'), command=command(),
        onnx=onnx.__version__, variants=rows)
    for name, text in (('json', json.dumps(report, indent=1) + '\n'),
                       ('md', markdown(report, outcomes))):
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
    graphs = dict(sorted(all_variants().items()))
    with ThreadPoolExecutor(2) as pool:  # each waits for a process
        rows = dict(zip(graphs, pool.map(examine, graphs.values())))
    outcomes = {
        name: outcome(rows[name]['builder'], check(model))
        for name, model in graphs.items()
    }
    with saved(graphs['Abs']) as path:
        version = build_engine(path).version
    write(rows, outcomes, version, args.out)


if __name__ == '__main__':
    main()
