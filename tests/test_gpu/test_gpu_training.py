# Copyright (c) mmbasis authors. All rights reserved.
"""Runs on the runner's device, in every way that users train there."""
import copy

import pytest
import torch
from mmengine.hooks import EMAHook

from mmbasis.compression import basis_layers
from mmbasis.compression.recalibration import recalibrate_if_better
from tests.toy import dense_checkpoint, device_of, processes, run, toy_cfg

pytestmark = pytest.mark.gpu

BUDGET = dict(type='BudgetPlanner', macs=.5)


def amp(device, **options):
    """The optimizer wrapper of mixed precision; a CPU has but bfloat16."""
    if device.type == 'cpu':
        return dict(type='mmbasis.CPUAmpOptimWrapper')
    return dict(type='AmpOptimWrapper', **options)


@pytest.fixture
def cfg(tmp_path, dense):
    hook = dict(
        planner=BUDGET,
        orthogonality=dict(weight=.01),
        distillation=dict(terms=[dict(module='fc', type='kl')]))
    cfg = toy_cfg(tmp_path / 'run', dense, hook)
    cfg.optim_wrapper.optimizer.lr = .01
    return cfg


def same(one, other, tolerance=1e-4):
    """Of the same run twice: sums of a GPU may be in another order."""
    assert list(one) == list(other)
    for key, value in one.items():
        assert value.isfinite().all(), key
        torch.testing.assert_close(
            other[key].to(value), value, rtol=10 * tolerance,
            atol=tolerance, msg=key)


def resumed(cfg, tmp_path):
    cfg = copy.deepcopy(cfg)
    cfg.merge_from_dict(
        dict(
            resume=True,
            load_from=str(tmp_path / 'run' / 'epoch_1.pth'),
            work_dir=str(tmp_path / 'resumed')))
    return run(cfg)


VARIANTS = dict(
    hook=lambda device: dict(),
    float16=lambda device: dict(
        optim_wrapper=amp(device, dtype='float16', loss_scale='dynamic')),
    bfloat16=lambda device: dict(
        optim_wrapper=amp(device, dtype='bfloat16')),
    here=lambda device: dict(
        optim_wrapper=dict(type='mmbasis.CPUAmpOptimWrapper')),
    accumulated=lambda device: dict(
        optim_wrapper=dict(accumulative_counts=2)),
    adamw=lambda device: dict(
        optim_wrapper=dict(optimizer=dict(
            _delete_=True, type='AdamW', lr=1e-3))),
    ema=lambda device: dict())


@pytest.mark.parametrize('variant', VARIANTS)
def test_trains_and_resumes(tmp_path, cfg, device, variant):
    """The resumed run is the uninterrupted one, optimizer and scaler, too."""
    cfg.merge_from_dict(VARIANTS[variant](device))
    if variant == 'ema':
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=.1))
    whole = run(cfg)
    assert device_of(whole.model) == device
    assert whole.model.distillation.teacher.fc.weight.device == device
    assert dict(basis_layers(whole.model))
    again = resumed(cfg, tmp_path)
    mixed = variant in ('float16', 'bfloat16', 'here')
    tolerance = 1e-2 if mixed and device.type == 'cuda' else 1e-4
    same(whole.model.state_dict(), again.model.state_dict(), tolerance)
    one, other = (x.optim_wrapper.state_dict() for x in (whole, again))
    assert one.get('loss_scaler') == other.get('loss_scaler')
    for hook, twin in zip(whole.hooks, again.hooks):
        if isinstance(hook, EMAHook):
            same(hook.ema_model.state_dict(), twin.ema_model.state_dict())
    saved = torch.load(tmp_path / 'run' / 'epoch_2.pth', weights_only=True)
    assert {x.device.type for x in saved['state_dict'].values()} == {'cpu'}


def test_autocast_reaches_the_model(cfg, device):
    """Mixed precision is mixed: without it, other weights come out."""
    plain = run(cfg).model
    cfg.optim_wrapper = dict(
        cfg.optim_wrapper, type='mmbasis.CPUAmpOptimWrapper')
    cfg.work_dir += '_amp'
    mixed = run(cfg).model
    assert any(not torch.equal(a, b) for a, b in zip(
        plain.parameters(), mixed.parameters()))


def test_wrapper(tmp_path, cfg, dense, device):
    settings = dict(cfg.custom_hooks[1])
    settings.pop('type')
    hooked = run(cfg)
    cfg.model = dict(
        type='mmbasis.BasisModel', architecture=cfg.model, checkpoint=dense,
        **settings)
    cfg.custom_hooks[1] = dict(type='mmbasis.BasisCompressionHook')
    cfg.load_from, cfg.work_dir = None, str(tmp_path / 'wrapper')
    wrapped = run(cfg)
    assert device_of(wrapped.model) == device
    same(hooked.model.state_dict(), wrapped.model.state_dict())


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_truncates_progressively(tmp_path, cfg, device, optimizer):
    cfg.custom_hooks += [
        dict(
            type='mmbasis.ProgressiveTruncationHook',
            stages=[dict(epoch=1, planner=dict(BUDGET, macs=.3))]),
        dict(type='EMAHook')]
    if optimizer == 'AdamW':
        cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-3)
    whole = run(cfg)
    totals = whole.model.plan.totals()['macs']
    assert totals['after'] <= .3 * totals['before']
    for entry in whole.optim_wrapper.optimizer.state.values():
        # AdamW counts its steps on the CPU
        assert {x.device for x in entry.values()
                if torch.is_tensor(x) and x.dim()} == {device}
    same(whole.model.state_dict(), resumed(cfg, tmp_path).model.state_dict())


def test_hooks_of_fine_tuning(cfg, device, capsys):
    cfg.custom_hooks += [
        dict(type='mmbasis.OrthogonalityHook', by_epoch=False),
        dict(type='mmbasis.SpectrumHook'),
        dict(type='mmbasis.RecalibrationHook', num_batches=2, held_out=2),
        dict(type='EMAHook')]
    runner = run(cfg)
    assert max(layer.orthogonality_error
               for _, layer in basis_layers(runner.model)) < 1e-5
    assert {x.device for x in runner.model.buffers()} == {device}
    assert 'changes the error on held-out' in capsys.readouterr().out
    model = runner.model.architecture
    batches = list(runner.train_dataloader)
    assert recalibrate_if_better(
        model, batches, lambda: torch.zeros(4, device=device)) is False


def test_compiled(tmp_path, cfg, device):
    """With the default compiler on a GPU, hardly any on a CPU."""
    cfg.train_cfg.max_epochs = 1
    cfg.param_scheduler = None
    del cfg.optim_wrapper.optimizer.momentum  # compiling it fails
    plain = run(cfg).model
    cfg.compile = True if device.type == 'cuda' else dict(backend='eager')
    cfg.work_dir = str(tmp_path / 'compiled')
    compiled = run(cfg).model
    assert 'train_step' in vars(compiled)
    for (name, a), b in zip(plain.named_parameters(), compiled.parameters()):
        torch.testing.assert_close(b, a, rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.slow  # on a CPU, tests/test_hooks/test_distributed.py is enough
@pytest.mark.parametrize('count, backend', [
    (1, 'default'), (1, 'gloo'), (2, 'gloo')])
def test_distributed(tmp_path, cfg, device, count, backend):
    """As one process of the same total batch; several share a card."""
    if backend == 'default':
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        if device.type == 'cpu':
            pytest.skip('NCCL needs a GPU; gloo is tested beside')
    cfg.model.norm = False
    cfg.load_from = dense_checkpoint(tmp_path / 'plain.pth', norm=False)
    cfg.custom_hooks[1].calibration = dict(num_batches=2)
    cfg.train_dataloader.batch_size = 16
    one = run(cfg)
    cfg.train_dataloader.batch_size //= count
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', device_ids=None)
    cfg.work_dir = str(tmp_path / 'many')
    processes(cfg, tmp_path, count, backend)
    many = torch.load(tmp_path / 'many' / 'epoch_2.pth', weights_only=True)
    same({k: v.cpu() for k, v in one.model.state_dict().items()},
         dict(many['state_dict']))


def test_flexible_runner(tmp_path, cfg, device):
    one = run(cfg)
    cfg.merge_from_dict(
        dict(
            runner_type='FlexibleRunner', launcher='none', env_cfg={},
            work_dir=str(tmp_path / 'flexible')))
    other = run(cfg)
    assert device_of(other.model) == device
    same(one.model.state_dict(), other.model.state_dict())
