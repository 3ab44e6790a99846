# Copyright (c) mmbasis authors. All rights reserved.
import json
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn

from mmbasis.compression import basis_layers
from mmbasis.hooks import SpectrumHook
from mmbasis.layers import BasisLayer
from tests.toy import dense_checkpoint, device_of, run, toy_cfg


@pytest.fixture
def dense(tmp_path):
    return dense_checkpoint(tmp_path / 'dense.pth')


every_form = pytest.mark.parametrize(
    'form', ['output', 'input', 'both', 'spatial'])


def budget(form, **options):
    planner = dict(type='BudgetPlanner', macs=.5, forms=[form])
    return dict(planner=planner, **options)


def largest_error(runner):
    return max(layer.orthogonality_error
               for _, layer in basis_layers(runner.model))


@every_form
@pytest.mark.parametrize('by_epoch', [True, False])
def test_retraction_keeps_the_basis_orthonormal(tmp_path, dense, by_epoch,
                                                form):
    cfg = toy_cfg(tmp_path / 'plain', dense, budget(form))
    drifted = run(cfg)
    cfg.work_dir = str(tmp_path / 'retracted')
    cfg.custom_hooks.append(
        dict(type='mmbasis.OrthogonalityHook', by_epoch=by_epoch))
    assert largest_error(run(cfg)) < 1e-5 < 1e-3 < largest_error(drifted)


@every_form
def test_retraction_keeps_the_function(tmp_path, dense, form):
    runner = run(toy_cfg(tmp_path / 'run', dense, budget(form)))
    model = runner.model.eval()
    x = torch.rand(4, 3, 8, 8, device=device_of(model))
    before = model(x)
    for _, layer in basis_layers(model):
        layer.retract()
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


@every_form
def test_penalty_pulls_towards_orthonormality(tmp_path, dense, form):
    errors = []
    for weight in (0., 1.):
        cfg = toy_cfg(
            tmp_path / f'run{weight}',
            dense,
            budget(form, orthogonality=dict(weight=weight)),
            epochs=4)
        errors.append(largest_error(run(cfg)))
    assert errors[1] < .5 * errors[0]


@every_form
def test_spectrum_goes_to_the_visualizer(tmp_path, dense, form):
    cfg = toy_cfg(tmp_path / 'run', dense, budget(form))
    cfg.custom_hooks.append(dict(type='mmbasis.SpectrumHook'))
    cfg.visualizer = dict(
        type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
    runner = run(cfg)
    file, = (tmp_path / 'run').glob('*/vis_data/scalars.json')
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if 'orthogonality/max' in row]
    assert [row['step'] for row in rows] == [1, 2]
    assert rows[1]['orthogonality/max'] == pytest.approx(
        largest_error(runner), rel=.01)
    for name, _ in basis_layers(runner.model):
        assert 0 < rows[0][f'spectrum/{name}'] <= 1


def test_effective_rank_is_a_fraction_of_what_the_form_allows():
    """A 1x1 layer with an input basis has no more rank than that."""
    found = {}
    conv = nn.Conv2d(16, 16, 1)
    for name, ranks in dict(output=(4, None), input=(None, 4)).items():
        layer = BasisLayer(conv, ranks[0], input_rank=ranks[1])
        layer.set_factors(*(torch.eye(len(x[0]), x.shape[2])[None]
                            for x in layer.factors))
        found[name] = effective_rank(layer)
    assert found == dict(output=pytest.approx(1), input=pytest.approx(1))


def effective_rank(layer):
    runner = Mock(model=nn.ModuleDict(dict(conv=layer)))
    SpectrumHook().act(runner, 1)
    return runner.visualizer.add_scalars.call_args[0][0]['spectrum/conv']


def test_effective_rank_of_a_split_window():
    """Of a rank that no output form has; two filters of four weigh much."""
    layer = BasisLayer(nn.Conv2d(16, 2, 3), 4, spatial=True)
    for strength, expected in ((1., 1.), (1e-6, .5)):
        rows = torch.eye(4, 6) * torch.tensor([1, 1, strength, strength])[
            :, None]
        layer.set_factors(
            torch.eye(4, 48)[None],
            rows.view(4, 2, 3).transpose(0, 1).reshape(1, 2, 12))
        assert effective_rank(layer) == pytest.approx(expected, rel=1e-3)
