# Copyright (c) mmbasis authors. All rights reserved.
"""Malformed recipes, planners, plans, tables, checkpoints, hooks and command
lines: none runs code, none hangs, none is taken; the error says what is
wrong."""
import time

import pytest

from mmbasis.utils import schema
from tests.test_robustness.attack import SURFACES, attack, report


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(schema, 'PATTERN_SECONDS', schema.PATTERN_SECONDS)


def check(counts, examples, least):
    """The target of issue 19."""
    shown = '\n'.join([*examples[:20], report(counts)])
    total = {key: sum(x[key] for x in counts.values())
             for found in counts.values() for key in found}
    inputs = sum(total.values())
    assert inputs >= least, shown
    for outcome in ('ran code', 'hung', 'silently wrong'):
        assert not total.get(outcome), shown
    assert total['clear error'] >= .98 * inputs, shown


def test_some_inputs():
    check(*attack(30), 150)


@pytest.mark.attack
def test_many_inputs(capsys):
    counts, examples = attack(400)
    with capsys.disabled():
        print('\n' + report(counts))
    check(counts, examples, 2000)


def test_all_surfaces_are_attacked():
    counts, _ = attack(1)
    assert counts.keys() == SURFACES.keys()


@pytest.mark.parametrize('pattern', ['(a+)+', '(a|a)*b', '(.*.*)*x!'])
def test_patterns_end_in_time(monkeypatch, pattern):
    monkeypatch.setattr(schema, 'PATTERN_SECONDS', .3)
    start = time.perf_counter()
    with pytest.raises(ValueError, match='include: matching .* 0.3 s') as info:
        schema.matching(pattern, ['conv', 'a' * 60 + '!'], 'include')
    assert time.perf_counter() - start < 5
    assert pattern in str(info.value)
    assert schema.matching('a+', ['a', 'b', 'aa'], 'include') == ['a', 'aa']


def test_rules_name_key_and_value():
    with pytest.raises(ValueError, match=(
            "^x.y must be a positive integer or None, but got 'three'$")):
        (schema.COUNT | schema.NONE).check('x.y', 'three')
    assert schema.one_of('a').words == "'a'"
    assert schema.one_of('a', 'b', 'c').words == "'a', 'b' or 'c'"
    assert len(schema.shown('x' * 1000)) < 120
