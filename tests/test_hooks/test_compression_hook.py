# Copyright (c) mmbasis authors. All rights reserved.
import copy
import shutil

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.runner import Runner

import mmbasis  # noqa: F401
from mmbasis.compression import basis_layers
from mmbasis.planning.layers import FORMS
from tests.toy import ToyNet, dense_checkpoint, device_of, run, toy_cfg


@pytest.fixture
def dense(tmp_path):
    return dense_checkpoint(tmp_path / 'dense.pth')


def same(a, b, **tolerance):
    assert list(a) == list(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=key, **tolerance)


def state(runner):
    return runner.model.state_dict()


def resume(cfg, tmp_path, runner, epoch, **options):
    """Continue from a copy of what a run had written after some epochs."""
    folder = tmp_path / f'resumed_{epoch}'
    folder.mkdir()
    name = f'epoch_{epoch}.pth'
    shutil.copy(f'{runner.work_dir}/{name}', folder / name)
    (folder / 'last_checkpoint').write_text(str(folder / name))
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(
        dict(work_dir=str(folder), resume=True, load_from=None, **options))
    return run(cfg)


def test_trains_the_factors(tmp_path, dense):
    """The factors are in the optimizer, they move, and the model costs half
    as much."""
    runner = run(toy_cfg(tmp_path / 'run', dense))
    layers = dict(basis_layers(runner.model))
    assert set(layers) <= {'conv1', 'conv2', 'conv3', 'fc'} and layers
    totals = runner.model.plan.totals()['macs']
    assert totals['after'] <= .5 * totals['before']
    managed = {
        id(p)
        for group in runner.optim_wrapper.param_groups
        for p in group['params']
    }
    assert managed == {id(p) for p in runner.model.parameters()}
    start = ToyNet().to(device_of(runner.model))
    start.load_state_dict(torch.load(dense)['state_dict'])
    mmbasis.compress(start, runner.model.plan,
                     [dict(inputs=torch.zeros(1, 3, 8, 8), data_samples=[0])])
    for name, layer in layers.items():
        moved = layer.basis.weight - start.get_submodule(name).basis.weight
        assert moved.abs().max() > 1e-4


def test_starts_from_the_projected_weights(tmp_path, dense):
    """At full rank and without a step the model is the dense one."""
    hook = dict(
        planner=dict(
            type='FixedPlanner',
            ranks={'.*': 'full'},
            allow_costlier=True,
            prediction_layers=True))
    cfg = toy_cfg(tmp_path / 'run', dense, hook, epochs=1)
    cfg.optim_wrapper.optimizer.lr = 0.
    runner = run(cfg)
    device = device_of(runner.model)
    net = ToyNet().to(device)
    net.load_state_dict(torch.load(dense)['state_dict'])
    # batch statistics moved while training; compare what does not depend
    x = torch.rand(2, 3, 8, 8, device=device)
    torch.testing.assert_close(
        runner.model.conv1(x), net.conv1(x), atol=1e-5, rtol=1e-5)
    assert len(dict(basis_layers(runner.model))) == 4


PARTS = dict(
    output=('basis.weight', 'coefficients.weight', 'coefficients.bias'),
    input=('input_basis.weight', 'basis.weight', 'basis.bias'),
    both=('input_basis.weight', 'basis.weight', 'coefficients.weight',
          'coefficients.bias'))


@pytest.mark.parametrize('form', PARTS)
def test_flat_self_describing_checkpoint(tmp_path, dense, form):
    planner = dict(type='BudgetPlanner', macs=.5, forms=[form])
    runner = run(toy_cfg(tmp_path / 'run', dense, dict(planner=planner)))
    path = f'{runner.work_dir}/epoch_2.pth'
    checkpoint = torch.load(path, weights_only=True)
    keys = set(checkpoint['state_dict'])
    plan = checkpoint['meta']['mmbasis']
    expected = set()
    for key in ToyNet().state_dict():
        layer, _, parameter = key.rpartition('.')
        if layer not in plan['layers']:
            expected.add(key)
        elif parameter == 'weight':
            expected |= {f'{layer}.{part}' for part in PARTS[form]}
    assert keys == expected != set(ToyNet().state_dict())
    assert plan['version'] == 2
    assert plan == runner.model.plan.to_dict()


EMA = dict(type='EMAHook', momentum=.1)


@pytest.mark.parametrize(
    'variant', [
        dict(),
        dict(ema=True),
        dict(optim_wrapper=dict(accumulative_counts=2)),
        dict(optim_wrapper=dict(type='mmbasis.CPUAmpOptimWrapper')),
        dict(forms=['output'], norm=True),
        dict(forms=['both'], norm=True),
        dict(forms=['both'], ema=True),
        dict(forms=['spatial'], ema=True),
        dict(door=2),
    ],
    ids=str)
def test_resumed_run_is_the_uninterrupted_run(tmp_path, dense, variant):
    variant = copy.deepcopy(variant)
    settings = dict(
        planner=dict(
            type='BudgetPlanner',
            macs=.5,
            forms=variant.pop('forms', [*FORMS])),
        norm=variant.pop('norm', False),
        orthogonality=dict(weight=.01))
    cfg = toy_cfg(tmp_path / 'run', dense, settings, epochs=3)
    if variant.pop('door', 1) == 2:
        cfg.model = dict(
            type='mmbasis.BasisModel',
            architecture=cfg.model,
            checkpoint=dense,
            **settings)
        cfg.custom_hooks[1] = dict(type='mmbasis.BasisCompressionHook')
        cfg.load_from = None
    if variant.pop('ema', False):
        cfg.custom_hooks.append(EMA)
    cfg.merge_from_dict(variant)
    whole = run(cfg)
    norms = [x.norm for _, x in basis_layers(whole.model)]
    assert all((x is not None) == settings['norm'] for x in norms)
    resumed = resume(cfg, tmp_path, whole, 1)
    same(state(resumed), state(whole), rtol=0, atol=0)
    assert resumed.model.plan.to_dict() == whole.model.plan.to_dict()
    a, b = (r.optim_wrapper.state_dict() for r in (whole, resumed))
    assert a['param_groups'] == b['param_groups']
    for key, value in a['state'].items():
        torch.testing.assert_close(b['state'][key]['momentum_buffer'],
                                   value['momentum_buffer'])
    for hook_a, hook_b in zip(whole.hooks, resumed.hooks):
        if isinstance(hook_a, EMAHook):
            same(
                hook_b.ema_model.state_dict(),
                hook_a.ema_model.state_dict(),
                rtol=0,
                atol=0)


def test_ema_averages_the_compressed_model(tmp_path, dense):
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.custom_hooks.append(EMA)
    runner = run(cfg)
    ema = next(h for h in runner.hooks if isinstance(h, EMAHook)).ema_model
    average = ema.module.state_dict()
    current = state(runner)
    assert set(average) == set(current)
    key = next(k for k in current if k.endswith('basis.weight'))
    difference = (average[key] - current[key]).abs().max()
    assert 0 < difference < 1
    saved = torch.load(f'{runner.work_dir}/epoch_2.pth', weights_only=True)
    torch.testing.assert_close(saved['state_dict'][key], average[key].cpu())


def test_auto_scaled_lr_and_schedule(tmp_path, dense):
    """The rebuilt optimizer is scaled once, and the schedule goes on."""
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.auto_scale_lr = dict(enable=True, base_batch_size=4)
    runner = run(cfg)
    # batch size 8 for 4, divided by ten after the first of two epochs
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(.01)]


def test_frozen_layers_stay_frozen(tmp_path, dense):
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.model.frozen = True
    runner = run(cfg)
    frozen = runner.model.conv1
    assert all(not p.requires_grad for p in frozen.parameters())
    assert runner.model.conv2.basis.weight.requires_grad


def test_paramwise_cfg_sees_bare_names(tmp_path, dense):
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.optim_wrapper.paramwise_cfg = dict(
        custom_keys={'conv2.basis': dict(decay_mult=0., lr_mult=.1)})
    cfg.optim_wrapper.optimizer.weight_decay = .01
    runner = run(cfg)
    weight = runner.model.conv2.basis.weight
    group = next(g for g in runner.optim_wrapper.param_groups
                 if g['params'][0] is weight)
    assert group['weight_decay'] == 0.
    assert group['initial_lr'] == pytest.approx(.005)


def test_test_and_retrain_from_compressed(tmp_path, dense):
    """A compressed checkpoint is tested, and training starts from it without
    being compressed again."""
    cfg = toy_cfg(tmp_path / 'run', dense)
    trained = run(cfg)
    path = f'{trained.work_dir}/epoch_2.pth'
    tested = copy.deepcopy(cfg)
    tested.merge_from_dict(
        dict(load_from=path, experiment_name=f'test_{tmp_path.name}'))
    runner = Runner.from_cfg(tested)
    metrics = runner.test()
    same(state(runner), state(trained))
    assert metrics['accuracy'] == trained.message_hub.get_scalar(
        'val/accuracy').current()

    again = toy_cfg(tmp_path / 'again', path, epochs=1)
    again.optim_wrapper.optimizer.lr = 0.
    again = run(again)
    assert again.model.plan.to_dict() == trained.model.plan.to_dict()
    torch.testing.assert_close(again.model.conv2.basis.weight,
                               trained.model.conv2.basis.weight)


def test_dense_checkpoint_is_refused(tmp_path, dense):
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.experiment_name = f'refuse_{tmp_path.name}'
    with pytest.raises(RuntimeError, match='under test is dense'):
        Runner.from_cfg(cfg).test()
    # a dense run's own checkpoint has all that resuming takes, but no plan
    plain = toy_cfg(tmp_path / 'plain', dense, epochs=1)
    plain.custom_hooks = []
    runner = run(plain)
    with pytest.raises(RuntimeError, match='cannot be resumed from a dense'):
        resume(cfg, tmp_path, runner, 1)


@pytest.mark.parametrize('hook, message', [
    (dict(planner=dict(type='BudgetPlanner', mac=.5)), 'unexpected keyword'),
    (dict(planner=dict(type='BudgetPlanner', macs=0)), r'macs must be in'),
    (dict(planner=dict(type='NoPlanner')), 'NoPlanner'),
    (dict(), 'nothing to do'),
    (dict(planner={}, plan='plan.json'), 'not both'),
    (dict(calibration=dict(batches=1)), "got {'batches': 1}"),
    (dict(
        planner=dict(type='EnergyPlanner', threshold=.5),
        orthogonality=dict(w=1)), 'orthogonality must be'),
])
def test_bad_settings(tmp_path, dense, hook, message):
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.custom_hooks[1] = dict(type='mmbasis.BasisCompressionHook', **hook)
    with pytest.raises(Exception, match=message):
        run(cfg)


def test_settings_in_both_doors_are_refused(tmp_path, dense):
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.model = dict(type='mmbasis.BasisModel', architecture=cfg.model)
    with pytest.raises(ValueError, match='give them there'):
        run(cfg)


def test_wrapper_with_planner_needs_the_hook(tmp_path, dense):
    cfg = toy_cfg(tmp_path / 'run', None)
    cfg.model = dict(
        type='mmbasis.BasisModel',
        architecture=cfg.model,
        checkpoint=dense,
        planner=dict(type='BudgetPlanner', macs=.5))
    cfg.custom_hooks = []
    with pytest.raises(RuntimeError, match='custom_hooks'):
        run(cfg)
