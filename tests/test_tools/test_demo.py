# Copyright (c) mmbasis authors. All rights reserved.
import json
import subprocess
import sys

import pytest


def test_demo_from_images_to_table(repo_root, tmp_path, monkeypatch):
    """``make demo`` with one epoch: every tool runs, all figures appear."""
    pytest.importorskip('sklearn')
    monkeypatch.setenv('MMBASIS_DATA', str(tmp_path / 'data'))
    demo = repo_root / 'tools' / 'demo' / 'run_demo.py'
    work_dir = tmp_path / 'demo'
    result = subprocess.run([
        sys.executable,
        str(demo), '--epochs', '1', '--macs', '0.4', '--work-dir',
        str(work_dir)
    ],
                            capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    summary = json.loads((work_dir / 'summary.json').read_text())
    assert list(summary) == ['dense', 'compressed', 'fine-tuned']
    kept = summary['compressed']['macs'] / summary['dense']['macs']
    # the budget is on the compressible layers, all but a hundredth
    assert 0.38 < kept < 0.42
    assert all(row['images_per_second'] > 0 for row in summary.values())
    assert 'fine-tuned' in (work_dir / 'table.txt').read_text()
    assert result.stdout.count('Plot: ') >= 2


def test_demo_stops_at_a_failing_tool(repo_root, tmp_path, monkeypatch):
    monkeypatch.setenv('MMBASIS_DATA', str(tmp_path / 'data'))
    result = subprocess.run([
        sys.executable,
        str(repo_root / 'tools' / 'demo' / 'run_demo.py'), '--epochs', 'none'
    ],
                            capture_output=True,
                            text=True)
    assert result.returncode == 2 and '--epochs' in result.stderr
