# Copyright (c) mmbasis authors. All rights reserved.
"""MMEngine's FlexibleRunner: it works with a strategy, or says at once what to
use instead."""
import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner

import mmbasis  # noqa: F401
from mmbasis.utils import load_config
from mmbasis.utils.strategy import check_strategy
from tests.toy import dense_checkpoint, processes, run, toy_cfg

REFUSED = ['FSDPStrategy', 'DeepSpeedStrategy', 'ColossalAIStrategy']


@pytest.fixture
def cfg(tmp_path):
    dense = dense_checkpoint(tmp_path / 'dense.pth')
    hook = dict(
        planner=dict(type='BudgetPlanner', macs=.5),
        orthogonality=dict(weight=.01))
    return toy_cfg(tmp_path / 'runner', dense, hook)


def flexible(cfg, folder, **options):
    """The same run of the other runner."""
    cfg = copy.deepcopy(cfg)
    cfg.runner_type = 'FlexibleRunner'
    cfg.setdefault('launcher', 'none')
    cfg.setdefault('env_cfg', {})
    cfg.work_dir = str(cfg.work_dir).replace('runner', folder)
    cfg.merge_from_dict(options)
    return cfg


def same(one, other):
    assert list(one) == list(other)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, msg=key)


def test_single_device_is_as_with_the_runner(cfg):
    one, other = run(cfg), run(flexible(cfg, 'flexible'))
    assert isinstance(other, FlexibleRunner)
    assert other.model.plan.to_dict() == one.model.plan.to_dict()
    same(one.model.state_dict(), other.model.state_dict())
    managed = {id(p) for g in other.optim_wrapper.param_groups
               for p in g['params']}
    assert managed == {id(p) for p in other.model.parameters()}
    # it is the strategy that saves and schedules
    assert other.strategy.model is other.model
    assert other.strategy.optim_wrapper is other.optim_wrapper
    assert other.optim_wrapper.get_lr() == one.optim_wrapper.get_lr()


def test_resumed_run_is_the_uninterrupted_one(cfg):
    whole = run(flexible(cfg, 'whole'))
    resumed = run(flexible(
        cfg, 'resumed', resume=True,
        load_from=f'{whole.work_dir}/epoch_1.pth'))
    same(whole.model.state_dict(), resumed.model.state_dict())
    state = whole.optim_wrapper.state_dict()['state']
    for key, value in resumed.optim_wrapper.state_dict()['state'].items():
        torch.testing.assert_close(
            state[key]['momentum_buffer'], value['momentum_buffer'])


def test_its_checkpoint_is_tested(cfg):
    trained = run(flexible(cfg, 'trained'))
    wanted = trained.message_hub.get_scalar('val/accuracy').current()
    tested = flexible(
        cfg, 'tested', load_from=f'{trained.work_dir}/epoch_2.pth',
        experiment_name='flexible_test')
    assert FlexibleRunner.from_cfg(tested).test()['accuracy'] == wanted


def test_truncates_progressively(cfg):
    cfg.custom_hooks.append(
        dict(
            type='mmbasis.ProgressiveTruncationHook',
            stages=[dict(
                epoch=1, planner=dict(type='BudgetPlanner', macs=.3))]))
    one, other = run(cfg), run(flexible(cfg, 'flexible'))
    same(one.model.state_dict(), other.model.state_dict())


def test_scales_the_learning_rate(cfg):
    runner = run(flexible(cfg, 'flexible', auto_scale_lr=dict(
        enable=True, base_batch_size=4)))
    assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(.01)]


def test_two_processes(cfg, tmp_path):
    """DDPStrategy over gloo ends as the Runner with the same total batch."""
    cfg.model.norm = False
    cfg.load_from = dense_checkpoint(tmp_path / 'plain.pth', norm=False)
    cfg.custom_hooks[1].calibration = dict(num_batches=2)
    cfg.train_dataloader.batch_size = 16
    one = run(cfg)
    cfg.train_dataloader.batch_size = 8
    processes(
        flexible(
            cfg, 'two', strategy=dict(
                type='DDPStrategy',
                model_wrapper=dict(
                    type='MMDistributedDataParallel', device_ids=None))),
        tmp_path, 2)
    two = torch.load(tmp_path / 'two' / 'epoch_2.pth', weights_only=True)
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(
            two['state_dict'][key], value.cpu(), rtol=1e-3, atol=1e-5,
            msg=key)


@pytest.mark.parametrize('name', REFUSED)
def test_config_of_another_strategy_is_refused(tmp_path, cfg, name):
    path = tmp_path / 'config.py'
    flexible(cfg, 'refused', strategy=dict(type=name)).dump(path)
    with pytest.raises(RuntimeError, match=f'{name} cannot.*DDPStrategy'):
        load_config(str(path))


def test_dense_config_may_have_any_strategy(tmp_path, cfg):
    path = tmp_path / 'config.py'
    cfg.custom_hooks = []
    flexible(cfg, 'dense', strategy=dict(type='FSDPStrategy')).dump(path)
    assert load_config(str(path)).strategy.type == 'FSDPStrategy'


@pytest.mark.parametrize('name', REFUSED)
def test_other_strategy_is_refused(name):
    parents = {x.__name__: x for x in known_strategies()}
    with pytest.raises(RuntimeError, match=f'{name} cannot.*DDPStrategy'):
        check_strategy(parents[name].__new__(parents[name]))
    derived = type('Derived', (parents[name], ), {})
    with pytest.raises(RuntimeError, match='Derived cannot'):
        check_strategy(derived)


def known_strategies():
    from mmengine._strategy.colossalai import ColossalAIStrategy
    from mmengine._strategy.deepspeed import DeepSpeedStrategy
    from mmengine._strategy.fsdp import FSDPStrategy
    return FSDPStrategy, DeepSpeedStrategy, ColossalAIStrategy


def test_unknown_strategy_is_refused():
    from mmengine._strategy import BaseStrategy
    with pytest.raises(RuntimeError, match='Mine is no strategy under'):
        check_strategy(type('Mine', (BaseStrategy, ), {}))


def test_run_is_refused_before_it_begins(cfg):
    """Whether weights are loaded or not: both come first in some order."""
    from mmengine._strategy import SingleDeviceStrategy
    from mmengine.registry import STRATEGIES

    @STRATEGIES.register_module(name='Named', force=True)
    class FSDPStrategy(SingleDeviceStrategy):
        pass

    for path in (cfg.load_from, None):
        other = flexible(cfg, 'refused', strategy=dict(type='Named'))
        other.load_from = path
        with pytest.raises(RuntimeError, match='FSDPStrategy cannot'):
            run(other)


def test_average_is_refused_where_weights_are_loaded(cfg):
    other = flexible(cfg, 'average')
    other.custom_hooks.append(dict(type='EMAHook'))
    with pytest.raises(RuntimeError, match='EMAHook has a model.*Runner'):
        run(other)
    other.load_from = None
    assert run(other).model.plan is not None


def test_compile_is_refused(cfg):
    other = flexible(cfg, 'compiled', load_from=None)
    other.experiment_name = 'flexible_compiled'
    runner = FlexibleRunner.from_cfg(Config(other.to_dict()))
    runner._compile = dict(backend='eager')
    with pytest.raises(RuntimeError, match="runner_type='Runner'"):
        runner.train()
