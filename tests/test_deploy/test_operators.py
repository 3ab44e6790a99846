# Copyright (c) mmbasis authors. All rights reserved.
"""Our check of operators against what NVIDIA's parser said of each."""
import json
import sys

import onnx
import pytest

from mmbasis.deploy import builder_at_hand, check_tensorrt


@pytest.fixture(scope='module')
def benchmark(repo_root):
    """The module that writes the matrix."""
    folder = str(repo_root / 'tools' / 'benchmarks')
    sys.path.insert(0, folder)
    try:
        import operators
    finally:
        sys.path.remove(folder)
    return operators


@pytest.fixture(scope='module')
def graphs(benchmark):
    return benchmark.all_variants()


@pytest.fixture(scope='module')
def matrix(repo_root):
    path = repo_root / 'docs' / 'results' / 'operators.json'
    return json.loads(path.read_text())['variants']


def test_the_matrix_is_of_these_graphs(graphs, matrix):
    assert set(matrix) == set(graphs) and len(graphs) > 400
    verdicts = [x['builder'] for x in matrix.values()]
    assert verdicts.count('built') > 200 and verdicts.count('refused') > 50


def test_the_check_agrees_with_the_matrix(benchmark, graphs, matrix,
                                          tmp_path):
    path = str(tmp_path / 'graph.onnx')
    differ = {}
    for name, model in graphs.items():
        onnx.save(model, path)
        row = dict(matrix[name], check=check_tensorrt(path)['10'])
        if benchmark.outcome(row) != 'agrees':
            differ[name] = row
    assert differ == {}


@pytest.mark.skipif(
    not builder_at_hand(), reason='needs the extra trt-check')
def test_the_builder_still_says_so(benchmark, graphs, matrix):
    for name in list(graphs)[::12]:
        found = benchmark.examine(graphs[name])
        assert found['builder'] == matrix[name]['builder'], name
