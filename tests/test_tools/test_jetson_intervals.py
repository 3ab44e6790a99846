# Copyright (c) mmbasis authors. All rights reserved.
"""The interval of jetson_bench, in simulated runs."""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tools' / 'benchmarks'))
import jetson_intervals as intervals  # noqa: E402
from jetson.protocol import Settings  # noqa: E402

PROMISED = [n for n in intervals.SCENARIOS if n != intervals.LIMIT]


@pytest.mark.parametrize('name', PROMISED)
def test_interval_covers_what_it_promises(name):
    for ratio in intervals.RATIOS.values():
        hits, _ = intervals.coverage(intervals.by_tool, ratio,
                                     Settings().repeats, 1000,
                                     **intervals.SCENARIOS[name])
        assert .93 <= hits <= .97


def test_simulation_finds_a_bad_order():
    hits, _ = intervals.coverage(intervals.in_turn, 1., 5, 500,
                                 **intervals.SCENARIOS['drift'])
    assert hits < .85


def test_log_in_docs():
    path = ROOT / 'docs' / 'results' / 'jetson_intervals.json'
    log = json.loads(path.read_text())
    assert log['repeats'] == Settings().repeats and log['trials'] >= 5000
    assert set(log['coverage']) == set(intervals.SCENARIOS)
    for name in PROMISED:
        row = log['coverage'][name]
        assert row['scenario'] == json.loads(
            json.dumps(intervals.SCENARIOS[name]))
        assert min(row['equal'], row['unequal']) >= .93
        assert max(row['equal'], row['unequal']) <= .97
