# Copyright (c) mmbasis authors. All rights reserved.
"""Weights that are incomplete, of another structure or not finite: refused by
name, in tests and in training; and a loss that is not finite."""
import copy
import itertools

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

import mmbasis
from mmbasis.compression import load_weights
from mmbasis.hooks import IntegrityHook
from tests.toy import ToyNet, dense_checkpoint, run, toy_cfg

NAN = float('nan')
_COUNT = itertools.count()


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    return dense_checkpoint(tmp_path_factory.mktemp('dense') / 'dense.pth')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, dense):
    """Config and last checkpoint of a short run."""
    folder = tmp_path_factory.mktemp('trained')
    planner = dict(type='BudgetPlanner', macs=.5, forms=['output'])
    cfg = toy_cfg(folder, dense, dict(planner=planner), epochs=1)
    run(cfg)
    return cfg, folder / 'epoch_1.pth'


def without(ending):

    def change(state):
        names = [x for x in state if x.endswith(ending)]
        assert names
        for name in names:
            del state[name]

    return change


def broken(key, value=NAN):

    def change(state):
        state[key][(0, ) * state[key].dim()] = value

    return change


def resized(state):
    state['fc.bias'] = torch.zeros(7)


def other_type(state):
    state['fc.bias'] = [0., 0., 0., 0.]


CHANGES = [
    (without('fc.weight'), 'lacks fc.weight'),
    (without('bn1.running_var'), 'lacks bn1.running_var'),
    (without('.bias'), 'lacks .*bias'),
    (without('coefficients.weight'), 'basis filters'),
    (without('basis.weight'), 'are dense|compressed in only one'),
    (broken('fc.weight'), 'NaN or infinite in fc.weight'),
    (broken('fc.bias', float('inf')), 'NaN or infinite in fc.bias'),
    (broken('bn2.running_mean'), 'NaN or infinite in bn2.running_mean'),
    (resized, 'fc.bias'),
    (other_type, 'fc.bias'),
]


def changed(path, change, folder):
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['state_dict'] = dict(checkpoint['state_dict'])
    change(checkpoint['state_dict'])
    torch.save(checkpoint, folder / 'changed.pth')
    return str(folder / 'changed.pth')


def runner_of(cfg, path, **options):
    cfg = copy.deepcopy(cfg)
    cfg.load_from = path
    cfg.merge_from_dict(options)
    cfg.experiment_name = f'incomplete_{next(_COUNT)}'
    return Runner.from_cfg(cfg)


@pytest.mark.parametrize('change, words', CHANGES)
def test_compressed_weights(trained, tmp_path, change, words):
    """To be tested, to be resumed, to be fine-tuned further."""
    path = changed(trained[1], change, tmp_path)
    for method, options in (('test', {}), ('train', dict(resume=True)),
                            ('train', dict(resume=False))):
        runner = runner_of(trained[0], path, work_dir=str(tmp_path), **options)
        with pytest.raises((RuntimeError, ValueError), match=words):
            getattr(runner, method)()


@pytest.mark.parametrize('change, words', [
    x for x in CHANGES if 'basis' not in x[1] and 'dense' not in x[1]])
def test_dense_weights_to_be_compressed(dense, tmp_path, change, words):
    path = changed(dense, change, tmp_path)
    with pytest.raises((RuntimeError, ValueError), match=words):
        run(toy_cfg(tmp_path, path))


@pytest.mark.parametrize('change, words', [
    (without('fc.weight'), 'changed.pth.*fc.weight: missing'),
    (broken('bn2.running_mean'), 'changed.pth: NaN .*bn2.running_mean'),
    (resized, r'changed.pth.*fc.bias: \(7,\), not \(4,\)'),
    (other_type, 'changed.pth.*fc.bias: list, not'),
    (dict.clear, 'changed.pth has no weights'),
])
def test_all_weights_or_none(dense, tmp_path, change, words):
    path = changed(dense, change, tmp_path)
    net = ToyNet()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises((RuntimeError, ValueError), match=words):
        load_weights(net, torch.load(path, weights_only=True), path)
    after = net.state_dict()
    assert all(torch.equal(after[k], x) for k, x in before.items())


def plain(cfg):
    """The config of the dense model, as the tools run it."""
    cfg = copy.deepcopy(cfg)
    cfg.custom_hooks = [dict(type='mmbasis.IntegrityHook')]
    return cfg


def test_compressed_weights_under_a_dense_config(trained, tmp_path):
    cfg = plain(trained[0])
    cfg.work_dir = str(tmp_path)
    for method in ('test', 'train'):
        runner = runner_of(cfg, str(trained[1]))
        with pytest.raises(RuntimeError, match='these weights are compressed'):
            getattr(runner, method)()


def test_dense_training_may_start_from_a_part(dense, tmp_path):
    """As fine-tuning for other classes does; a test may not."""
    cfg = plain(toy_cfg(tmp_path, None, epochs=1))
    path = changed(dense, without('fc.weight'), tmp_path)
    runner = runner_of(cfg, path)
    runner.train()
    assert runner.epoch == 1
    with pytest.raises(RuntimeError, match='lacks fc.weight'):
        runner_of(cfg, path).test()
    path = changed(dense, broken('fc.weight'), tmp_path)
    with pytest.raises(ValueError, match='NaN or infinite in fc.weight'):
        runner_of(cfg, path).train()


@pytest.mark.parametrize('key', ['conv2.weight', 'conv1.bias', 'bn2.bias',
                                 'bn1.running_var'])
def test_before_compressing(key):
    net = ToyNet().eval()
    broken(key)(net.state_dict())
    with pytest.raises(ValueError, match=f'NaN or infinite in {key}'):
        mmbasis.compress(
            net, dict(type='BudgetPlanner', macs=.5),
            [dict(inputs=torch.rand(2, 3, 8, 8), data_samples=[0, 1])])


# ------------------------------------------------------------ while training
@HOOKS.register_module(force=True)
class Poison(Hook):
    """Breaks a weight after some iterations."""

    def __init__(self, iteration):
        self.iteration = iteration

    def after_train_iter(self, runner, *_, **__):
        if runner.iter == self.iteration:
            weight = next(runner.model.parameters()).data
            weight[(0, ) * weight.dim()] = NAN


@pytest.mark.parametrize('hooks', ['dense', 'compressed'])
def test_a_loss_that_is_not_finite(dense, tmp_path, hooks):
    """4 iterations an epoch: the weights break at the end of the sixth."""
    cfg = toy_cfg(tmp_path, dense, epochs=3)
    if hooks == 'dense':
        cfg = plain(cfg)
    cfg.custom_hooks.append(dict(type='Poison', iteration=5))
    with pytest.raises(RuntimeError, match=(
            r'loss is not finite in iteration 7 of epoch 2: .*loss nan.* '
            r'last checkpoint is \S+epoch_1.pth')):
        run(cfg)
    assert not (tmp_path / 'epoch_2.pth').exists()


def test_weights_that_broke_are_not_saved(dense, tmp_path):
    """In the last iteration of an epoch no loss shows it."""
    cfg = toy_cfg(tmp_path, dense, epochs=3)
    cfg.custom_hooks.append(dict(type='Poison', iteration=7))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    with pytest.raises(RuntimeError, match=(
            'after epoch 2, .* is NaN or infinite .* not saved. The last '
            r'checkpoint is \S+epoch_1.pth')):
        run(cfg)
    assert not (tmp_path / 'epoch_2.pth').exists()


def test_a_loss_scaler_skips_some_steps():
    class Runs:
        iter, epoch, work_dir = 0, 0, '.'

        class optim_wrapper:
            loss_scaler = object()

    hook, bad = IntegrityHook(), dict(loss=torch.tensor(NAN))
    for _ in range(3):
        for _ in range(19):
            hook.after_train_iter(Runs, 0, None, bad)
        hook.after_train_iter(Runs, 0, None, dict(loss=torch.tensor(1.)))
    with pytest.raises(RuntimeError, match='no checkpoint yet'):
        for _ in range(20):
            hook.after_train_iter(Runs, 0, None, bad)


# ----------------------------------------------------------------- the tools
@pytest.fixture(scope='module')
def compressed(workplace):
    folder = workplace.folder / 'compressed'
    result = workplace.run('--macs', .5, '--calib-batches', 1, '--work-dir',
                           folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize('change, words', [
    (without('head.fc.weight'), 'lacks head.fc.weight'),
    (without('coefficients.weight'), 'basis filters'),
    (broken('head.fc.bias'), 'NaN or infinite in head.fc.bias'),
])
def test_tools_refuse(workplace, compressed, tmp_path, change, words):
    path = changed(compressed / 'compressed.pth', change, tmp_path)
    config = compressed / 'compressed.py'
    tested = workplace.run('--work-dir', tmp_path, tool='test', config=config,
                           checkpoint=path)
    assert tested.returncode == 1
    assert words in tested.stderr
    command = [workplace.root / 'tools' / 'train.py', config, '--work-dir',
               tmp_path, '--cfg-options', f'load_from={path}']
    result = workplace.forks.run([str(x) for x in command],
                                 MMBASIS_DATA=str(workplace.data))
    assert result.returncode == 1
    assert words in result.stderr


def test_tools_refuse_a_dense_config(workplace, compressed, tmp_path):
    args = '--work-dir', tmp_path
    result = workplace.run(*args, tool='test',
                           checkpoint=compressed / 'compressed.pth')
    assert result.returncode == 1
    assert 'these weights are compressed' in result.stderr
    assert workplace.run(*args, tool='test').returncode == 0
    assert workplace.run(
        *args, tool='test', config=compressed / 'compressed.py',
        checkpoint=compressed / 'compressed.pth').returncode == 0
