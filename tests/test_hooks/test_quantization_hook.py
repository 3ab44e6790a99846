# Copyright (c) mmbasis authors. All rights reserved.
"""Fine-tuning for int8, the last step."""
import copy

import pytest
import torch
from mmengine.registry import RUNNERS

from mmbasis.hooks import QuantizationHook
from mmbasis.models.int8 import INT8_KEY
from tests.toy import dense_checkpoint, processes, run, toy_cfg


def config(work_dir, load_from, hook=None, num_batches=4, **options):
    cfg = toy_cfg(work_dir, load_from, hook, **options)
    cfg.custom_hooks.append(
        dict(type='mmbasis.QuantizationHook', num_batches=num_batches))
    return cfg


def hook_of(runner):
    return next(x for x in runner.hooks if isinstance(x, QuantizationHook))


def saved(path):
    return torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def finetuned(tmp_path_factory):
    """A compressed checkpoint that spectral fine-tuning wrote."""
    folder = tmp_path_factory.mktemp('finetuned')
    cfg = toy_cfg(folder, dense_checkpoint(folder / 'dense.pth'))
    run(cfg)
    return str(folder / 'epoch_2.pth')


def test_last_step(finetuned, tmp_path):
    cfg = config(tmp_path, finetuned)
    runner = run(cfg)
    content = saved(tmp_path / 'epoch_2.pth')
    layers = content['meta'][INT8_KEY]['layers']
    model = runner.model.architecture
    names = {name for name, x in model.named_modules()
             if isinstance(x, (torch.nn.Conv2d, torch.nn.Linear))}
    assert set(layers) == names and any('.basis' in x for x in names)
    assert set(content['meta']) >= {'mmbasis', INT8_KEY}
    # no trace in the names of the weights
    assert set(content['state_dict']) == set(saved(finetuned)['state_dict'])
    # training computes with what int8 can hold
    seen = {}
    name = next(x for x in names if x.endswith('.basis'))
    model.get_submodule(name).register_forward_pre_hook(
        lambda m, args: seen.update(x=args[0], w=m.weight))
    batch = next(iter(runner.train_dataloader))
    loss = runner.model.train_step(batch, runner.optim_wrapper)
    assert all(x.isfinite().all() for x in loss.values())
    steps = seen['x'] / layers[name]
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    weight = model.get_submodule(name).weight
    assert not torch.equal(seen['w'], weight)
    step = seen['w'].flatten(1).abs().amax(1) / 127
    rounded = seen['w'] / step.view(-1, *[1] * (weight.dim() - 1))
    assert torch.allclose(rounded, rounded.round(), atol=1e-3)


def test_resumed_is_uninterrupted(finetuned, tmp_path):
    whole = run(config(tmp_path / 'whole', finetuned))
    cfg = config(tmp_path / 'resumed', str(tmp_path / 'whole/epoch_1.pth'),
                 # another calibration would find other scales
                 num_batches=1, resume=True)
    resumed = run(cfg)
    assert hook_of(resumed).scales == hook_of(whole).scales
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key]), key


def test_test_is_in_int8(finetuned, tmp_path):
    trained = run(config(tmp_path, finetuned))
    cfg = config(tmp_path / 'test', str(tmp_path / 'epoch_2.pth'))
    cfg.experiment_name = 'test_in_int8'
    runner = RUNNERS.get('Runner').from_cfg(copy.deepcopy(cfg))
    runner.test()
    x = next(iter(runner.test_dataloader))['inputs']
    models = [trained.model.architecture.eval(), runner.model.eval()]
    with torch.no_grad():
        ours, theirs = (model(x.to(next(model.parameters())))
                        for model in models)
        assert torch.equal(ours, theirs)
        hook_of(runner)._active.remove()
        assert not torch.equal(models[1](x.to(theirs)), theirs)


def test_average_of_the_model(finetuned, tmp_path):
    cfg = config(tmp_path, finetuned)
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=.5))
    runner = run(cfg)
    ema = next(x for x in runner.hooks if type(x).__name__ == 'EMAHook')
    average = ema.ema_model.module.architecture
    assert all(x.isfinite().all() for x in average.parameters())
    assert not any('weight' in vars(x) for x in average.modules())


def test_two_processes_are_one(tmp_path):
    dense = dense_checkpoint(tmp_path / 'dense.pth', norm=False)
    cfg = config(tmp_path / 'one', dense, num_batches=2)
    cfg.model.norm = False
    cfg.train_dataloader.batch_size = 16
    one = run(cfg)

    cfg.train_dataloader.batch_size = 8
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel', device_ids=None)
    cfg.work_dir = str(tmp_path / 'two')
    processes(cfg, tmp_path, 2)
    two = saved(tmp_path / 'two' / 'epoch_2.pth')
    assert two['meta'][INT8_KEY]['layers'] == pytest.approx(
        dict(hook_of(one).scales.layers), rel=1e-4)
    for key, value in one.model.state_dict().items():
        # a value on the edge of two steps may be rounded either way
        error = (two['state_dict'][key] - value.cpu()).norm()
        assert error <= .01 * value.norm() + 1e-5, key


def test_test_without_scales(finetuned, tmp_path):
    cfg = config(tmp_path, finetuned)
    cfg.experiment_name = 'test_without_scales'
    runner = RUNNERS.get('Runner').from_cfg(cfg)
    with pytest.raises(RuntimeError, match='carries no scales'):
        runner.test()


def test_not_with_progressive_truncation(finetuned, tmp_path):
    cfg = config(tmp_path, finetuned)
    cfg.custom_hooks.append(dict(
        type='mmbasis.ProgressiveTruncationHook',
        stages=[dict(epoch=1, planner=dict(type='BudgetPlanner', macs=.4))]))
    with pytest.raises(RuntimeError, match='ProgressiveTruncationHook'):
        run(cfg)


def test_not_with_norms_in_the_middle(tmp_path):
    dense = dense_checkpoint(tmp_path / 'dense.pth')
    cfg = config(tmp_path, dense, dict(
        planner=dict(type='EnergyPlanner', threshold=.8), norm=True))
    with pytest.raises(RuntimeError, match='norm=False'):
        run(cfg)


def test_bad_number():
    with pytest.raises(ValueError, match='num_batches'):
        QuantizationHook(num_batches=0)
