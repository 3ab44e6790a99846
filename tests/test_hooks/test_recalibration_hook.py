# Copyright (c) mmbasis authors. All rights reserved.
"""Statistics of batch normalisations at the end of training."""
import copy

import pytest
import torch
from mmengine.runner import load_checkpoint

from mmbasis.hooks import RecalibrationHook
from mmbasis.hooks.training_hooks import losses_of
from tests.toy import dense_checkpoint, run, toy_cfg


def config(work_dir, hook=None, **options):
    cfg = toy_cfg(work_dir, dense_checkpoint(work_dir / 'dense.pth'), hook,
                  **options)
    cfg.custom_hooks.append(
        dict(type='mmbasis.RecalibrationHook', num_batches=3, held_out=1))
    cfg.custom_hooks.append(dict(type='ToySlowNorm'))
    return cfg


@pytest.fixture(autouse=True)
def slow_norm():
    """Hook that makes the running averages lag behind."""
    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module(force=True)
    class ToySlowNorm(Hook):

        def before_train_epoch(self, runner):
            for module in runner.model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1e-4


@pytest.mark.parametrize('form', ['output', 'input', 'both'])
def test_kept_where_the_averages_lag(tmp_path, capsys, form):
    planner = dict(type='BudgetPlanner', macs=.5, forms=[form])
    cfg = config(tmp_path, dict(planner=planner), epochs=6)
    cfg.param_scheduler.milestones = [5]
    runner = run(cfg)
    model = runner.model.architecture
    loader = list(runner.train_dataloader)
    without = copy.deepcopy(cfg)
    without.work_dir = str(tmp_path / 'without')
    del without.custom_hooks[-2]
    other = run(without).model.architecture
    for name, x in model.named_parameters():
        assert torch.equal(x, other.get_parameter(name)), name
    assert losses_of(model, loader).mean() < (
        .8 * losses_of(other, loader).mean())
    # the momentum of training is as it was
    assert model.bn1.momentum == pytest.approx(1e-4)
    # and what was chosen is in the checkpoint
    saved = copy.deepcopy(other)
    load_checkpoint(saved, str(tmp_path / 'epoch_6.pth'), strict=True)
    assert torch.equal(saved.bn1.running_var, model.bn1.running_var)
    assert not torch.equal(saved.bn1.running_var, other.bn1.running_var)
    assert 'Recalibration of batch normalisations' in capsys.readouterr().out


def test_average_of_the_model_gets_its_own(tmp_path):
    cfg = config(tmp_path)
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=.5))
    runner = run(cfg)
    ema = next(x for x in runner.hooks if type(x).__name__ == 'EMAHook')
    average = ema.ema_model.module.architecture
    model = runner.model.architecture
    assert not torch.equal(average.conv3.weight, model.conv3.weight)
    assert not torch.equal(average.bn1.running_mean, model.bn1.running_mean)


def test_nothing_held_out(tmp_path, capsys):
    run(config(tmp_path, train_dataloader=dict(batch_size=16)))
    assert 'leave none to choose by' in capsys.readouterr().out


@pytest.mark.parametrize('setting', ['num_batches', 'held_out'])
def test_numbers_must_be_positive(setting):
    with pytest.raises(ValueError, match=setting):
        RecalibrationHook(**{setting: 0})
