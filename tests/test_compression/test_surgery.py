# Copyright (c) mmbasis authors. All rights reserved.
"""Plans that are put into models, and what models remember of it."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
from mmengine.model import ExponentialMovingAverage

from mmbasis.compression import surgery
from mmbasis.compression.surgery import (
    apply_plan,
    basis_layers,
    check_state_dict,
    densified,
    get_plan,
    guard,
    replace_modules,
)
from mmbasis.layers import BasisLayer, kind_of
from mmbasis.planning import CompressionPlan, DensePlan, LayerPlan, find_layers

X = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Dictionary(nn.Module):
    """A user's module that calls its parts as basis layers do."""

    def __init__(self, both=True):
        super().__init__()
        self.basis = nn.Conv2d(3, 6, 3)
        self.coefficients = nn.Conv2d(6, 8, 1) if both else nn.ReLU()

    def forward(self, x):
        return self.coefficients(self.basis(x))


class Net(nn.Module):

    def __init__(self, both=True):
        super().__init__()
        torch.manual_seed(0)
        self.first = Dictionary(both)
        self.conv = nn.Conv2d(8 if both else 6, 8, 3, bias=False)

    def forward(self, x):
        return self.conv(self.first(x))


def a_plan(model, *names, rank=3, input_rank=None, spatial=False, **kwargs):
    layers = {}
    for name in names:
        module = model.get_submodule(name)
        shape = list(module.weight.shape)
        layers[name] = LayerPlan(rank, 6,
                                 kind_of(module).name, shape, True, 1.,
                                 [2., 1.], [2, 1], input_rank, spatial)
    return CompressionPlan(layers, **kwargs)


def snapshot(model):
    return [(name, module, dict(vars(module)), list(module._modules.items()),
             dict(module._parameters),
             dict(module._forward_hooks),
             dict(module._load_state_dict_pre_hooks))
            for name, module in model.named_modules()]


# ---------------------------------------------------- a user's own 'basis'
@pytest.mark.parametrize('both', [True, False])
def test_parts_of_a_user_are_not_basis_layers(both):
    model = Net(both)
    state = copy.deepcopy(model.state_dict())
    assert 'first.basis.weight' in state
    assert [x.name for x in find_layers(model) if x.obstacle is None][0] == (
        'first.basis')
    guard(model)
    model.load_state_dict(state)
    wrapper = nn.ModuleDict(dict(inside=model))
    wrapper.load_state_dict({f'inside.{k}': v for k, v in state.items()})
    # beside basis layers, too
    apply_plan(model, a_plan(model, 'conv'))
    assert [name for name, _ in basis_layers(model)] == ['conv']
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with pytest.raises(RuntimeError, match='these weights are dense'):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match='but the model is dense'):
        check_state_dict(Net(both), model.state_dict())


@pytest.mark.parametrize('rank, input_rank', [(3, None), (3, 3)])
def test_a_users_basis_as_a_basis_layer(rank, input_rank):
    dense, model = Net(), Net()
    apply_plan(
        model,
        a_plan(
            model,
            'first.basis',
            'first.coefficients',
            rank=rank,
            input_rank=input_rank))
    state = model.state_dict()
    assert 'first.basis.basis.weight' in state
    model.load_state_dict(state)
    with pytest.raises(RuntimeError, match='but the model is dense'):
        check_state_dict(dense, state)
    with pytest.raises(RuntimeError, match='these weights are dense'):
        model.load_state_dict(dense.state_dict())
    other = Net()
    apply_plan(other, a_plan(other, 'first.basis'))
    with pytest.raises(RuntimeError, match='another compression plan'):
        model.load_state_dict(other.state_dict())
    with pytest.raises(RuntimeError, match='another compression plan'):
        other.load_state_dict(state)
    torch.testing.assert_close(densified(model)(X), model(X))


def test_another_rank():
    model, other = Net(), Net()
    apply_plan(model, a_plan(model, 'conv'))
    apply_plan(other, a_plan(other, 'conv', rank=2))
    with pytest.raises(RuntimeError, match=r'conv has basis filters of shape'):
        model.load_state_dict(other.state_dict())


RANKS = dict(output=dict(rank=8), input=dict(rank=None, input_rank=8),
             both=dict(rank=8, input_rank=8),
             spatial=dict(rank=8, spatial=True))


@pytest.mark.parametrize('form', RANKS)
@pytest.mark.parametrize('given', RANKS)
def test_another_form(form, given):
    """Basis filters alone do not tell: here they are of one shape, if they
    are not split."""
    models = []
    for ranks in (RANKS[form], RANKS[given]):
        models.append(Net())
        apply_plan(models[-1], a_plan(Net(), 'conv', **ranks))
    model, state = models[0], models[1].state_dict()
    if form == given:
        model.load_state_dict(state)
        return
    words = ' and '.join(x for x in ('input_basis', 'coefficients')
                         if f'conv.{x}.weight' in state)
    with pytest.raises(RuntimeError, match=rf'conv has .*\], {words}, th'):
        model.load_state_dict(state, strict=False)


# ------------------------------------------------------------ all or nothing
@pytest.mark.parametrize('owner, step', [
    (BasisLayer, 'project'),
    (BasisLayer, 'take_over'),
    (surgery, 'replace_modules'),
    (surgery, 'attach_plan'),
    (surgery, 'guard'),
    (surgery, 'keep_structure'),
    (surgery, '_add_biases'),
])
def test_an_error_leaves_the_model_as_it_was(owner, step, monkeypatch):
    model = Net()
    plan = a_plan(model, 'conv', 'first.basis')
    handle = model.conv.register_forward_hook(lambda _, args, y: 2 * y)
    expected, before = model(X), snapshot(model)
    real = getattr(owner, step)

    def fails(*args, **kwargs):
        real(*args, **kwargs)
        raise MemoryError(step)

    monkeypatch.setattr(owner, step, fails)
    with pytest.raises(MemoryError):
        apply_plan(model, plan)
    assert snapshot(model) == before
    assert get_plan(model) is None
    assert torch.equal(model(X), expected)
    monkeypatch.undo()
    apply_plan(model, plan)
    assert len(dict(basis_layers(model))) == 2
    hooked = model(X)
    handle.remove()
    torch.testing.assert_close(model(X), hooked / 2)


def test_an_error_leaves_the_average_as_it_was(monkeypatch):
    model = nn.ModuleDict(dict(net=Net()))
    model['average'] = ExponentialMovingAverage(model['net'])
    average = model['average']
    before = snapshot(model)
    monkeypatch.setattr(surgery, 'guard', lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        apply_plan(model, a_plan(model, 'net.conv'))
    assert snapshot(model) == before
    monkeypatch.undo()
    apply_plan(model, a_plan(model, 'net.conv'))
    assert isinstance(average.module.conv, BasisLayer)
    average.update_parameters(model['net'])


def test_plans_name_what_can_be_compressed():
    model = Net()
    plan = a_plan(model, 'conv')
    model.conv.forward = lambda x: x
    with pytest.raises(ValueError, match='conv: its forward was replaced'):
        apply_plan(model, plan)
    assert not list(basis_layers(model))
    model = Net()
    model.conv.register_forward_hook(lambda *_: None)
    plan = a_plan(model, 'conv', 'first.basis')
    plan.layers['conv'] = replace(plan.layers['conv'], kind='BasisLinear')
    with pytest.raises(ValueError, match='conv: a Conv2d is no BasisLinear'):
        apply_plan(model, plan)
    assert len(model.conv._forward_hooks) == 1


# ------------------------------------------------------------------- bases
def test_bases_are_followed():
    model, plain = Net(), Net()
    weight = kind_of(model.conv).to_matrix(model.conv)
    vectors = torch.linalg.qr(torch.randn(1, 8, 8).double())[0]
    mean = torch.rand(1, 8)
    plan = a_plan(model, 'conv', 'first.basis')
    apply_plan(model, plan, {'conv': (vectors, mean)})
    kept = vectors[..., :3] @ vectors[..., :3].mT
    torch.testing.assert_close(
        kind_of(plain.conv).to_matrix(model.conv),
        (kept @ weight.double()).float(), rtol=1e-4, atol=1e-5)
    lost = mean.double() - (kept @ mean.double().unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(
        model.conv.bias.double(), lost[0], rtol=1e-4, atol=1e-5)
    apply_plan(plain, plan)  # by the weights alone
    torch.testing.assert_close(model.first.basis.weight,
                               plain.first.basis.weight)
    assert (model.conv.weight - plain.conv.weight).norm() > .1


# ------------------------------------------------------------ what is left
def test_state_is_one_object_and_goes_with_copies():
    model = Net()
    before = set(vars(model))
    plan = a_plan(model, 'conv')
    apply_plan(model, plan)
    assert set(vars(model)) - before == {'_mmbasis'}
    clone = copy.deepcopy(model)
    assert get_plan(clone) == plan
    with pytest.raises(RuntimeError, match='these weights are dense'):
        clone.load_state_dict(Net().state_dict())
    guard(clone)  # no second time
    assert len(clone._load_state_dict_pre_hooks) == 1
    dense = densified(model)
    assert get_plan(dense) is None and get_plan(model) == plan
    apply_plan(dense, plan)
    assert get_plan(dense) == plan


def test_hooks_go_there_and_back():
    model = Net()
    handle = model.conv.register_forward_hook(lambda _, args, y: y + 1)
    expected = model(X)
    apply_plan(model, a_plan(model, 'conv', rank=8))
    torch.testing.assert_close(model(X), expected)
    torch.testing.assert_close(densified(model)(X), expected)
    replace_modules(model, {model.conv: model.conv.to_dense()})
    assert type(model.conv) is nn.Conv2d
    torch.testing.assert_close(model(X), expected)
    handle.remove()
    torch.testing.assert_close(model(X) + 1, expected)


def test_merged_layers_get_their_bias():
    model = Net()
    plan = a_plan(model, 'first.basis')
    plan.dense['conv'] = DensePlan(
        'merged', True, list(model.conv.weight.shape), 1.,
        model.conv.weight.numel() + 8, bias=True)
    plan.dense['first.coefficients'] = DensePlan('', True, [8, 6, 1, 1], 1., 1)
    apply_plan(model, plan)
    assert model.conv.bias.shape == (8, )
