# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
from mmengine.optim import OptimWrapper

from mmbasis.compression import Recipe, basis_layers
from mmbasis.factorization import merge
from mmbasis.hooks import ProgressiveTruncationHook
from mmbasis.layers import BasisLayer
from mmbasis.models import BasisModel
from mmbasis.optim import carry_over
from tests.toy import ToyNet, dense_checkpoint, run, toy_cfg

FORMS = ['output', 'input', 'both', 'spatial']


def budget(macs, forms=FORMS):
    return dict(type='BudgetPlanner', macs=macs, forms=forms)


@pytest.fixture(params=[FORMS, *([form] for form in FORMS)], ids=str)
def cfg(tmp_path, request):
    forms = request.param
    dense = dense_checkpoint(tmp_path / 'dense.pth')
    cfg = toy_cfg(
        tmp_path / 'run', dense, dict(planner=budget(.7, forms)), epochs=4)
    cfg.custom_hooks.append(
        dict(
            type='mmbasis.ProgressiveTruncationHook',
            stages=[
                dict(epoch=1, planner=budget(.5, forms)),
                dict(epoch=3, planner=budget(.3, forms))
            ]))
    cfg.param_scheduler = dict(type='ExponentialLR', gamma=.5)
    cfg.optim_wrapper.optimizer.lr = .01
    return cfg


def kept(content):
    macs = content['meta']['mmbasis']['totals']['macs']
    return macs['after'] / macs['before']


def test_ranks_fall_and_schedule_goes_on(tmp_path, cfg):
    cfg.custom_hooks.append(dict(type='EMAHook'))
    runner = run(cfg)
    saved = [
        torch.load(tmp_path / 'run' / f'epoch_{k}.pth', weights_only=True)
        for k in (1, 2, 3, 4)
    ]
    for content, limit in zip(saved, (.7, .5, .5, .3)):
        assert .8 * limit < kept(content) <= limit
    # costs are those of the model that was dense
    plans = [c['meta']['mmbasis'] for c in saved]
    assert len({x['totals']['macs']['before'] for x in plans}) == 1
    times = [x['predicted_ms']['cpu'] for x in plans]
    assert len({x['before'] for x in times}) == 1
    assert len({x['after'] for x in times}) == 3
    # MMEngine takes no step after the last epoch
    assert runner.optim_wrapper.get_lr()['lr'] == pytest.approx([.01 / 8])
    groups = saved[-1]['optimizer']['param_groups']
    count = len(list(runner.model.parameters()))
    assert sum(len(g['params']) for g in groups) == count
    assert len(saved[-1]['optimizer']['state']) == count


@pytest.mark.parametrize('epoch', [1, 2, 3])
@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_resumed_run_is_the_uninterrupted_one(tmp_path, cfg, epoch, optimizer):
    if optimizer == 'AdamW':
        cfg.optim_wrapper.optimizer = dict(type='AdamW', lr=1e-3)
    whole = run(cfg)
    cfg.merge_from_dict(
        dict(
            resume=True,
            load_from=str(tmp_path / 'run' / f'epoch_{epoch}.pth'),
            work_dir=str(tmp_path / 'resumed')))
    resumed = run(cfg)
    pairs = zip(whole.model.state_dict().items(),
                resumed.model.state_dict().items())
    for (name, a), (other, b) in pairs:
        assert name == other and torch.equal(a, b), name
    for a, b in zip(whole.optim_wrapper.optimizer.state.values(),
                    resumed.optim_wrapper.optimizer.state.values()):
        for key in a:
            torch.testing.assert_close(
                torch.as_tensor(a[key]), torch.as_tensor(b[key]))


@pytest.mark.parametrize('form', FORMS)
def test_gradient_averages_are_those_of_the_new_factors(form):
    """A gradient of the product, once as that of the old factors and once as
    that of the new ones: carrying over turns the first into the second."""
    torch.manual_seed(0)
    model = BasisModel(ToyNet(norm=False))
    x = [dict(inputs=torch.rand(4, 3, 8, 8), data_samples=torch.arange(4))]

    def momentum(net, product):
        """State as of one step with these gradients of the products."""
        wrapper = OptimWrapper(torch.optim.SGD(net.parameters(), .1, .9))
        for name, layer in net.named_modules():
            if name in product:
                found = torch.autograd.grad(
                    merge(*layer.factors), layer.weights, product[name])
                for parameter, value in zip(layer.weights, found):
                    wrapper.optimizer.state[parameter] = dict(
                        momentum_buffer=value)
        return wrapper

    model.compress(x, Recipe.of(planner=budget(.9, [form])))
    before = model.architecture
    # of the span of the factors: of that the old ones tell all
    products = {
        name: merge(*layer.bases, torch.randn_like(layer.factors[-1]))
        for name, layer in basis_layers(before)
    }
    old = momentum(before, products)
    model.truncate(x, Recipe.of(planner=budget(.5, [form])))
    after = model.architecture
    pairs = [(before.get_submodule(name), layer)
             for name, layer in basis_layers(after) if name in products]
    assert any(len(a.weights) == len(b.weights)
               and a.basis.weight.shape != b.basis.weight.shape
               for a, b in pairs)
    new = OptimWrapper(torch.optim.SGD(after.parameters(), .1, .9))
    carry_over(before, old, after, new)
    expected = momentum(after, products)
    assert expected.optimizer.state
    for parameter, entry in expected.optimizer.state.items():
        torch.testing.assert_close(
            new.optimizer.state[parameter]['momentum_buffer'],
            entry['momentum_buffer'],
            rtol=1e-3,
            atol=1e-4)


@pytest.mark.parametrize('rank, input_rank, spatial', [
    (4, None, False), (None, 4, False), (4, 5, False), (4, None, True)])
def test_factors_of_a_dense_layer_count_steps_of_their_own(
        rank, input_rank, spatial):
    """Optimizers count in place, so what they count with is not shared."""
    before, after = ToyNet(), ToyNet()
    after.conv2 = BasisLayer(
        before.conv2, rank, input_rank=input_rank, spatial=spatial)
    old, new = (
        OptimWrapper(torch.optim.AdamW(net.parameters()))
        for net in (before, after))
    before(torch.rand(2, 3, 8, 8)).sum().backward()
    old.step()
    carry_over(before, old, after, new)
    steps = [
        new.optimizer.state[weight]['step'] for weight in after.conv2.weights
    ]
    steps[0] += 1
    assert [float(step) for step in steps] == [2] + [1] * (len(steps) - 1)
    assert len(steps) >= 2


@pytest.mark.parametrize('first, second', [('input', 'both'),
                                           ('output', 'input')])
def test_bias_keeps_its_state_when_it_moves(first, second):
    """It belongs to the last part of a layer, which depends on the form."""
    ranks = dict(input=(None, 5), both=(4, 5), output=(4, None))
    dense = ToyNet()
    nets = [ToyNet(), ToyNet()]
    for net, form in zip(nets, (first, second)):
        net.conv3 = BasisLayer(
            dense.conv3, ranks[form][0], input_rank=ranks[form][1])
    old, new = (
        OptimWrapper(torch.optim.AdamW(net.parameters())) for net in nets)
    nets[0](torch.rand(2, 3, 8, 8)).sum().backward()
    old.step()
    biases = [net.conv3.last.bias for net in nets]
    wanted = old.optimizer.state[biases[0]]['exp_avg']
    carry_over(nets[0], old, nets[1], new)
    assert torch.equal(new.optimizer.state[biases[1]]['exp_avg'], wanted)


@pytest.mark.parametrize('stages, message', [
    ([dict(epoch=0, planner=budget(.5))], 'at least 1'),
    ([dict(epoch=1)], 'planner=dict'),
    ([dict(epoch=1, planner=budget(.5), macs=.5)], 'planner=dict'),
    ([dict(epoch=2, planner=budget(.5)),
      dict(epoch=1, planner=budget(.4))], 'must rise'),
    ([dict(epoch=1, planner=budget(2))], 'in \\(0, 1\\]'),
    ([dict(epoch=1, planner=budget(.3)),
      dict(epoch=2, planner=budget(.4))], r'macs=0.4, more than macs=0.3'),
    ([dict(epoch=True, planner=budget(.5))], 'at least 1'),
    ([dict(epoch=1, planner='BudgetPlanner')], 'planner=dict'),
    (dict(epoch=1, planner=budget(.5)), 'stages must be a list'),
    (3, 'stages must be a list'),
])
def test_bad_stages(stages, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveTruncationHook(stages)


@pytest.mark.parametrize('stage, message', [
    (dict(epoch=9, planner=budget(.2)), 'epoch 9 is never reached, .* 4 ep'),
    (dict(epoch=1, planner=budget(.9)), 'has macs=0.9, more than macs='),
])
def test_stages_that_make_no_sense_in_a_run(cfg, stage, message):
    cfg.custom_hooks[2]['stages'] = [stage]
    with pytest.raises(ValueError, match=message):
        run(cfg)


def test_needs_a_run_that_compresses(cfg):
    del cfg.custom_hooks[1]
    with pytest.raises(RuntimeError, match='add BasisCompressionHook'):
        run(cfg)
