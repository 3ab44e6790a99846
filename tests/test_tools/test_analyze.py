# Copyright (c) mmbasis authors. All rights reserved.
"""tools/analyze.py, run as a user runs it."""
import json

import pytest


@pytest.fixture(scope='module')
def analysis(workplace):
    """Run it for a few budgets; the folder of the results and the output."""

    def run(*args, code=0):
        folder = workplace.folder / 'analysis'
        result = workplace.run(
            '--work-dir', folder, '--calib-batches', 2, *args, tool='analyze')
        assert result.returncode == code, result.stderr
        return folder, result

    return run


def read(folder):
    return json.loads((folder / 'analysis.json').read_text())


def test_measures_draws_and_goes_on(workplace, analysis):
    """A second call with one budget more measures that one only."""
    options = ('--planners', 'loss', 'paper', '--budgets')
    folder, _ = analysis(*options, .4)
    first = read(folder)
    assert {(p['planner'], p['budget'])
            for p in first['points']} == {('loss', .4), ('paper', .4)}
    loss = next(p for p in first['points'] if p['planner'] == 'loss')
    assert .3 < loss['macs'] <= .4 and loss['latency_ms'] > 0
    assert 'accuracy/top1' in loss['metrics']
    assert len(first['layers']) == 7
    assert all(row['measured'] > 0 for row in first['layers'])
    drawn = {path.name for path in folder.glob('*.png')}
    assert drawn == {
        'spectra.png', 'sensitivities.png', 'losses.png', 'pareto_macs.png',
        'pareto_params.png', 'pareto_latency_ms.png', 'ranks_loss_0.4.png',
        'ranks_paper_0.4.png'
    }

    folder, result = analysis(*options, .4, .6)
    second = read(folder)
    assert second['points'][:2] == first['points']
    assert len(second['points']) == 4
    assert 'accuracy/top1' in result.stdout


def test_results_of_other_settings_are_not_mixed(workplace, analysis):
    analysis()
    _, result = analysis('--seed', 1, code=1)
    assert 'give another --work-dir' in result.stderr
