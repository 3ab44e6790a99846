# Copyright (c) mmbasis authors. All rights reserved.
"""Benchmarks share functions: none may lack one that another has lost."""
import runpy
from pathlib import Path

import pytest

SCRIPTS = sorted(
    (Path(__file__).parents[2] / 'tools' / 'benchmarks').glob('*.py'))


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda x: x.stem)
def test_benchmark_finds_what_it_imports(script, monkeypatch):
    pytest.importorskip('mmdet')
    monkeypatch.syspath_prepend(str(script.parent))
    assert runpy.run_path(str(script), run_name='loaded')['__doc__']
