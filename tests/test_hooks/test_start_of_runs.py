# Copyright (c) mmbasis authors. All rights reserved.
"""What the runner does at the start, with the hook in all kinds of runs."""
import copy

import pytest
import torch
from mmengine.model import BaseTTAModel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmbasis.compression import basis_layers, get_plan
from mmbasis.hooks import BasisCompressionHook
from mmbasis.layers import BasisLayer
from mmbasis.models import unwrap
from mmbasis.optim import replaced_parameters
from tests.toy import (
    ToyImages,
    ToyNet,
    dense_checkpoint,
    device_of,
    run,
    toy_cfg,
)

FORMS = ['output', 'input', 'both']


def budget(macs, forms=FORMS):
    return dict(planner=dict(type='BudgetPlanner', macs=macs, forms=forms))


@pytest.fixture
def dense(tmp_path):
    return dense_checkpoint(tmp_path / 'dense.pth')


@pytest.fixture
def compressed(tmp_path, dense):
    """A checkpoint at 0.6 of the MACs."""
    runner = run(toy_cfg(tmp_path / 'at_60', dense, budget(.6), epochs=1))
    return f'{runner.work_dir}/epoch_1.pth'


def kept(model):
    macs = get_plan(unwrap(model)).totals()['macs']
    return macs['after'] / macs['before']


def test_a_planner_contradicts_the_checkpoint(tmp_path, compressed):
    with pytest.raises(ValueError, match="'macs': 0.3.*compressed already"):
        run(toy_cfg(tmp_path / 'run', compressed, budget(.3)))


def test_a_plan_contradicts_the_checkpoint(tmp_path, dense, compressed):
    other = run(toy_cfg(tmp_path / 'other', dense, budget(.3), epochs=1))
    hook = dict(plan=other.model.plan.to_dict())
    with pytest.raises(ValueError, match='compressed by another'):
        run(toy_cfg(tmp_path / 'run', compressed, hook))


def test_a_checkpoint_is_fine_tuned_without_a_planner(tmp_path, compressed):
    runner = run(
        toy_cfg(
            tmp_path / 'run', compressed, dict(distillation=False), epochs=1))
    assert .5 < kept(runner.model) <= .6


class FlipTTA(BaseTTAModel):

    def merge_preds(self, data_samples_list):
        return [x[0] for x in data_samples_list]


MODELS.register_module(module=FlipTTA, force=True)


class TwoViews(torch.utils.data.Dataset):
    metainfo = ToyImages().metainfo

    def __init__(self):
        self.images = ToyImages()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        one = self.images[index]
        return dict(
            inputs=[one['inputs'], one['inputs'].flip(-1)],
            data_samples=[one['data_samples']] * 2)


@pytest.mark.parametrize('door', ['hook', 'wrapper'])
def test_test_time_augmentation(tmp_path, compressed, door):
    """The model inside takes the structure of the checkpoint."""
    cfg = toy_cfg(tmp_path / 'tta', compressed, budget(.6))
    if door == 'wrapper':
        cfg.model = dict(
            type='mmbasis.BasisModel', architecture=cfg.model, **budget(.6))
        cfg.custom_hooks = [dict(type='mmbasis.BasisCompressionHook')]
    runner = Runner(
        model=dict(type='FlipTTA', module=cfg.model),
        work_dir=cfg.work_dir,
        load_from=compressed,
        test_dataloader=DataLoader(TwoViews(), batch_size=8),
        test_evaluator=dict(type='ToyAccuracy'),
        test_cfg=dict(),
        custom_hooks=cfg.custom_hooks,
        experiment_name=f'tta_{tmp_path.name}')
    metrics = runner.test()
    assert .5 < kept(runner.model.module) <= .6
    expected = torch.load(compressed)['state_dict']
    found = unwrap(runner.model.module).state_dict()
    for key, value in expected.items():
        assert torch.equal(found[key].cpu(), value), key
    assert 0 <= metrics['accuracy'] <= 1


def test_a_model_of_the_first_plan_is_tested_after_a_stage(tmp_path, dense):
    """Stages change the plan; testing and resuming follow the checkpoint."""
    cfg = toy_cfg(tmp_path / 'run', dense, budget(.7), epochs=2)
    cfg.custom_hooks.append(
        dict(
            type='mmbasis.ProgressiveTruncationHook',
            stages=[dict(epoch=1, **budget(.4))]))
    first = run(cfg)
    path = f'{first.work_dir}/epoch_1.pth'
    plan = torch.load(path)['meta']['mmbasis']
    tested = copy.deepcopy(cfg)
    tested.model = dict(type='mmbasis.ToyNet', plan=plan)
    tested.custom_hooks = [dict(type='mmbasis.BasisCompressionHook')]
    tested.merge_from_dict(
        dict(
            load_from=f'{first.work_dir}/epoch_2.pth',
            experiment_name=f'stage_{tmp_path.name}'))
    runner = Runner.from_cfg(tested)
    runner.test()
    assert kept(runner.model) <= .4
    for key, value in first.model.state_dict().items():
        assert torch.equal(runner.model.state_dict()[key], value), key


def bare_runner(tmp_path, dense, optimizer, forms=FORMS, **options):
    """A runner that nobody built from a config."""
    model = ToyNet()
    model.load_state_dict(torch.load(dense)['state_dict'])
    hook = BasisCompressionHook(**budget(.5, forms), distillation=False)
    return model, Runner(
        model=model,
        work_dir=str(tmp_path / 'bare'),
        load_from=dense,
        train_dataloader=DataLoader(ToyImages(), batch_size=8, shuffle=True),
        train_cfg=dict(by_epoch=True, max_epochs=2),
        optim_wrapper=optimizer(model),
        custom_hooks=[hook],
        experiment_name=f'bare_{tmp_path.name}',
        **options)


def grouped(model):
    return OptimWrapper(
        torch.optim.SGD([
            dict(params=[model.conv2.weight], lr=.5),
            dict(params=[
                p for name, p in model.named_parameters()
                if name != 'conv2.weight'
            ])
        ],
                        lr=.01,
                        momentum=.9))


@pytest.mark.parametrize('form', FORMS)
def test_a_runner_without_a_config(tmp_path, dense, form):
    """Factors take the places of the weights in a built optimizer."""
    _, runner = bare_runner(
        tmp_path,
        dense,
        grouped, [form],
        param_scheduler=dict(type='MultiStepLR', milestones=[1]))
    runner.train()
    model = runner.model
    assert kept(model) <= .5
    first, second = runner.optim_wrapper.optimizer.param_groups
    # the bias is new
    factors = {*model.conv2.weights, model.conv2.last.bias}
    assert len(factors) == (4 if form == 'both' else 3)
    assert factors == set(first['params'])
    everything = set(first['params']) | set(second['params'])
    assert everything == set(model.parameters())
    assert first['lr'] == pytest.approx(.05)
    saved = torch.load(f'{runner.work_dir}/epoch_2.pth', weights_only=True)
    assert 'conv2.basis.weight' in saved['state_dict']
    dense_state = torch.load(dense)['state_dict']
    start = ToyNet().to(device_of(model))
    start.load_state_dict(dense_state)
    moved = dict(basis_layers(model))['conv2'].weight - start.conv2.weight
    assert moved.abs().max() > 1e-3


def test_an_offset_branch_stays_in_its_group(tmp_path, dense):
    """What is inside a basis, too, stands for what was inside the layer."""
    ops = pytest.importorskip('mmcv.ops')
    _, runner = bare_runner(tmp_path, dense, grouped)
    runner.model.conv3 = ops.DeformConv2dPack(8, 8, 3).to(
        device_of(runner.model))
    optimizer = torch.optim.SGD([
        dict(params=list(runner.model.conv3.conv_offset.parameters())),
        dict(params=[runner.model.conv3.weight])
    ], .01)
    runner.optim_wrapper = OptimWrapper(optimizer)
    runner._train_loop = runner.build_train_loop(runner._train_loop)
    with replaced_parameters(runner):
        runner.model.conv3 = BasisLayer(runner.model.conv3, 4)
    layer = runner.model.conv3
    first, second = (set(x['params']) for x in optimizer.param_groups)
    assert first == set(layer.basis.conv_offset.parameters())
    assert second == {layer.basis.weight, layer.coefficients.weight}


def test_a_runner_without_a_config_resumes(tmp_path, dense):
    _, whole = bare_runner(tmp_path, dense, grouped)
    torch.manual_seed(0)
    whole.train()
    _, resumed = bare_runner(tmp_path, dense, grouped, resume=True)
    resumed._load_from = f'{whole.work_dir}/epoch_2.pth'
    resumed._train_loop['max_epochs'] = 3
    resumed.train()
    assert resumed.epoch == 3
    assert resumed.model.plan.to_dict() == whole.model.plan.to_dict()


@pytest.mark.parametrize('key, parts', [
    ('conv2.weight', ('basis.weight', 'coefficients.weight')),
    ('conv1.bias', ('coefficients.bias', )),
])
def test_custom_keys_keep_their_meaning(tmp_path, dense, key, parts):
    hook = dict(
        planner=dict(
            type='FixedPlanner', ranks={
                'conv1': 4,
                'conv2': 6
            }))
    cfg = toy_cfg(tmp_path / 'run', dense, hook, epochs=1)
    cfg.optim_wrapper.paramwise_cfg = dict(
        custom_keys={key: dict(lr_mult=.1, decay_mult=0.)})
    cfg.optim_wrapper.optimizer.weight_decay = .01
    cfg.param_scheduler = None
    runner = run(cfg)
    layer = getattr(runner.model, key.split('.')[0])
    meant = {id(dict(layer.named_parameters())[x]) for x in parts}
    for group in runner.optim_wrapper.param_groups:
        own = {id(p) for p in group['params']}
        assert own <= meant or not own & meant
        assert group['lr'] == pytest.approx(.005 if own & meant else .05)
        assert group['weight_decay'] == (0. if own & meant else .01)


@pytest.mark.parametrize('door', ['hook', 'wrapper'])
def test_one_runner_trains_and_tests(tmp_path, dense, door):
    cfg = toy_cfg(tmp_path / 'run', dense, budget(.5), epochs=1)
    if door == 'wrapper':
        cfg.model = dict(
            type='mmbasis.BasisModel',
            architecture=cfg.model,
            checkpoint=dense,
            **budget(.5))
        cfg.custom_hooks = [
            dict(
                type='mmbasis.BasisCompressionHook',
                calibration=dict(num_batches=2))
        ]
        cfg.load_from = None
    runner = run(cfg)
    plan = runner.model.plan
    for metrics in (runner.test(), runner.val()):
        assert metrics['accuracy'] == runner.message_hub.get_scalar(
            'val/accuracy').current()
    assert runner.model.plan is plan
