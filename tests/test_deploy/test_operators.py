# Copyright (c) mmbasis authors. All rights reserved.
"""Our check of operators against what NVIDIA's parser said of each."""
import json
import sys

import pytest

from mmbasis.deploy import builder_at_hand


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
    assert set(matrix) == set(graphs) and len(matrix) > 700
    verdicts = [x['builder'] for x in matrix.values()]
    assert verdicts.count('built') > 200 and verdicts.count('refused') > 50


def test_the_check_agrees_with_the_matrix(benchmark, graphs, matrix):
    differ = {
        name: benchmark.outcome(row['builder'],
                                benchmark.check(graphs[name]))
        for name, row in matrix.items()
    }
    assert {k: x for k, x in differ.items() if x != 'agrees'} == {}


def test_outcomes(benchmark):
    assert benchmark.outcome('refused', []) == 'miss'
    assert benchmark.outcome('built', ['no']) == 'false alarm'
    assert benchmark.outcome('own limit', ['no']) == 'false alarm'
    assert benchmark.outcome('refused', ['no']) == 'agrees'
    assert benchmark.outcome('parsed', []) == 'agrees'


@pytest.mark.skipif(
    not builder_at_hand(), reason='needs the extra trt-check')
def test_the_builder_still_says_so(benchmark, graphs, matrix):
    for name in list(matrix)[::12]:
        found = benchmark.examine(graphs[name])
        assert found['builder'] == matrix[name]['builder'], name
