# Copyright (c) mmbasis authors. All rights reserved.
"""A replaced layer behaves like the layer it replaces."""
import copy
import functools
import types
import weakref

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.ops import DeformConv2dPack
from mmengine.runner.activation_checkpointing import (
    turn_on_activation_checkpointing,
)
from torch.utils.checkpoint import checkpoint

from mmbasis.compression import compress
from mmbasis.compression.surgery import densified, replace_modules
from mmbasis.layers import (
    BasisLayer,
    ConvKind,
    copy_module,
    kind_of,
    observe,
    why_not,
)
from mmbasis.registry import LAYER_KINDS
from tests.toy import ToyNet

X = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(**kwargs):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, **kwargs))


def replaced(model, rank=6, **kwargs):
    """The model with a basis layer for its first layer."""
    dense = model[0]
    layer = BasisLayer(dense, rank, **kwargs)
    layer.project(dense)
    replace_modules(model, {dense: layer})
    return model


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------- hooks
def double(_, args, y):
    return 2 * y


def double_input(_, args):
    return (2 * args[0], )


HOOKS = {
    'forward':
    lambda m: m.register_forward_hook(double),
    'forward, prepended':
    lambda m: (m.register_forward_hook(lambda _, args, y: y + 1),
               m.register_forward_hook(double, prepend=True))[1],
    'forward, with kwargs':
    lambda m: m.register_forward_hook(
        lambda _, args, kwargs, y: y * (2 + len(kwargs)), with_kwargs=True),
    'forward, always called':
    lambda m: m.register_forward_hook(double, always_call=True),
    'pre':
    lambda m: m.register_forward_pre_hook(double_input),
    'pre, prepended':
    lambda m: (m.register_forward_pre_hook(lambda _, args: (args[0] + 1, )),
               m.register_forward_pre_hook(double_input, prepend=True))[1],
    'pre, with kwargs':
    lambda m: m.register_forward_pre_hook(
        lambda _, args, kwargs: ((2 * args[0], ), kwargs), with_kwargs=True),
}


@pytest.mark.parametrize('hook', HOOKS)
def test_forward_hooks_move(hook):
    model = conv()
    plain = model(X)
    handle = HOOKS[hook](model[0])
    expected = model(X)
    assert (expected - plain).norm() > .1 * plain.norm()
    assert_close(replaced(model)(X), expected)
    assert_close(copy.deepcopy(model)(X), expected)
    dense = densified(model)
    assert type(dense[0]) is nn.Conv2d
    assert_close(dense(X), expected)
    assert_close(model[0].to_dense()(X), expected)
    handle.remove()
    if 'prepended' not in hook:
        assert_close(model(X), plain)
    assert (model(X) - expected).norm() > .1 * plain.norm()


def test_a_hook_that_is_always_called():
    model, called = conv(), []
    model[0].register_forward_hook(
        lambda *_: called.append(1), always_call=True)
    replaced(model)
    with pytest.raises(RuntimeError):
        model(torch.rand(1, 5, 6, 6))
    assert called


def test_backward_hooks_move():
    model = conv()
    x = X.clone().requires_grad_()
    seen = []
    handles = [
        model[0].register_full_backward_hook(lambda m, gx, gy: (3 * gx[0], )),
        model[0].register_full_backward_pre_hook(lambda m, gy: seen.append(m)),
    ]
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    seen.clear()
    replaced(model)(x).sum().backward()
    assert_close(x.grad, expected)
    assert seen == [model[0]] and isinstance(seen[0], BasisLayer)
    for handle in handles:
        handle.remove()
    x.grad = None
    model(x).sum().backward()
    assert_close(3 * x.grad, expected)


def test_hooks_inside_a_layer_move():
    torch.manual_seed(0)
    model = nn.Sequential(DeformConv2dPack(4, 6, 3, padding=1))
    handle = model[0].conv_offset.register_forward_hook(
        lambda *args: args[2] + .3)
    expected = model(X)
    replaced(model)
    assert_close(model(X), expected)
    handle.remove()
    assert (model(X) - expected).norm() > .01 * expected.norm()


def test_a_new_layer_has_no_hooks_until_it_replaces():
    dense = nn.Conv2d(4, 6, 3)
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    layer = BasisLayer(dense, 2)
    layer(X)
    assert not calls
    layer.take_over(dense)
    layer(X)
    dense(X)
    assert calls == [1]
    again = nn.Sequential(layer)
    replace_modules(again, {layer: dense})
    again(X)
    layer(X)
    assert calls == [1, 1]


def test_hooks_of_a_basis_layer_do_not_reach_the_layer_it_replaced():
    """Reconstruction registers hooks on basis layers and calls dense ones."""
    dense, calls = nn.Conv2d(4, 6, 3), []
    model = replaced(nn.Sequential(dense))
    model[0].register_forward_hook(lambda *_: calls.append(1))
    dense(X)
    assert not calls


def test_hooks_on_a_state_dict_keep_the_layer_dense():
    for name in ('_register_state_dict_hook',
                 '_register_load_state_dict_pre_hook'):
        dense = nn.Conv2d(4, 6, 3)
        getattr(dense, name)(lambda *_: None)
        assert 'state dict' in why_not(dense)
        dense = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())
        getattr(dense, name)(lambda *_: None)
        assert why_not(dense[0]) is None


# ------------------------------------------------------------- own forward
def mmengine_checkpointing(model):
    turn_on_activation_checkpointing(model, ['0'])


def partial_checkpoint(model):
    own = model[0].forward
    model[0].forward = functools.wraps(own)(
        functools.partial(checkpoint, own, use_reentrant=False))


def closure(model):
    own = model[0].forward
    model[0].forward = lambda x: 2 * own(x)


def closure_over_the_module(model):
    layer, own = model[0], model[0].forward

    def forward(x):
        return own(x) * (1 + layer.bias.numel())

    layer.forward = forward


def default_argument(model):

    def forward(x, own=model[0].forward, *, factor=3):
        return factor * own(x)

    model[0].forward = forward


def nested(model):
    closure(model)
    partial_checkpoint(model)
    closure(model)


def itself(model):
    model[0].forward = model[0].forward


def as_accelerate_does(model):
    """accelerate.hooks.add_hook_to_module"""
    module = model[0]
    module._hf_hook = types.SimpleNamespace(scale=2)
    module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        return module._hf_hook.scale * module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(
        functools.partial(new_forward, module), module._old_forward)


OWN = [
    mmengine_checkpointing, partial_checkpoint, closure,
    closure_over_the_module, default_argument, nested, itself,
    as_accelerate_does
]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('own', OWN)
def test_own_forward_is_rebound(own):
    model = conv()
    own(model)
    expected = model(X)
    dense = model[0]
    assert why_not(dense) is None
    replaced(model)
    assert_close(model(X), expected)
    with torch.no_grad():  # what the dense layer does is of no account
        dense.weight.zero_()
        dense.bias.zero_()
    assert_close(model(X), expected)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    # copies, and back
    again, other = copy.deepcopy(model), densified(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(again(X), expected)
    assert_close(other(X), expected)
    assert type(other[0]) is nn.Conv2d
    assert not model(X).any()


def ignores_its_class(model):
    layer = model[0]
    layer.forward = lambda x: F.conv2d(x, 2 * layer.weight, layer.bias)


def method_of_another(model):

    def forward(self, x):
        return 2 * self._conv_forward(x, self.weight, self.bias)

    model[0].forward = types.MethodType(forward, model[0])


def holds_weights(model):
    own, weight = model[0].forward, model[0].weight
    model[0].forward = lambda x: own(x) + weight.sum()


def holds_weights_in_data(model):
    own, data = model[0].forward, dict(a=[model[0].weight])
    model[0].forward = lambda x: own(x) + data['a'][0].sum()


def hidden_in_an_object(model):

    class Wrapper:

        def __init__(self, module):
            self.module, self.own = module, module.forward

        def __call__(self, x):
            return 2 * self.own(x)

    model[0].forward = Wrapper(model[0])


def hidden_in_slots(model):

    class Wrapper:
        __slots__ = ('own', )

        def __init__(self, own):
            self.own = own

        def __call__(self, x):
            return 2 * self.own(x)

    model[0].forward = Wrapper(model[0].forward)


def hidden_in_a_weak_reference(model):
    own, layer = model[0].forward, weakref.ref(model[0])
    model[0].forward = lambda x: own(x) + layer().weight.sum()


def hidden_in_a_cache(model):
    own = functools.lru_cache(model[0].forward)
    model[0].forward = lambda x: 2 * own(x)


def method_of_an_object(model):
    place = types.SimpleNamespace(own=model[0].forward)

    class Wrapper:
        inner = staticmethod(place)

        def __init__(self):
            self.place = place

        def call(self, x):
            return 2 * self.place.own(x)

    own = model[0].forward
    wrapper = Wrapper()
    model[0].forward = lambda x: wrapper.call(x) if x is None else own(x)


def by_a_global(model):
    scope = dict(own=model[0].forward, layer=model[0])
    exec('def forward(x):\n    return 2 * own(x)', scope)
    model[0].forward = scope['forward']


def by_a_global_of_a_global(model):
    scope = dict(layer=model[0])
    exec(
        'def helper(x):\n    return layer.weight.sum()\n'
        'def build(own):\n    return lambda x: own(x) + helper(x)', scope)
    model[0].forward = scope['build'](model[0].forward)


REFUSED = [
    ignores_its_class, method_of_another, holds_weights, holds_weights_in_data,
    hidden_in_an_object, hidden_in_slots, hidden_in_a_weak_reference,
    hidden_in_a_cache, method_of_an_object, by_a_global,
    by_a_global_of_a_global
]


@pytest.mark.parametrize('own', REFUSED)
def test_own_forward_that_cannot_be_rebound(own):
    model = conv()
    own(model)
    reason = why_not(model[0])
    assert reason.startswith('its forward was replaced on the instance (')
    before, expected = dict(vars(model[0])), model(X)
    with pytest.raises(Exception, match='forward|layer|weights|calls'):
        replaced(model)
    assert type(model[0]) is nn.Conv2d and vars(model[0]) == before
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize('name', ['_conv_forward', '_call_impl'])
def test_other_methods_of_the_instance(name):
    dense = nn.Conv2d(4, 6, 3)
    setattr(dense, name, getattr(dense, name))
    assert why_not(dense) == f'its {name} was replaced on the instance'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('own', OWN)
@pytest.mark.parametrize('rank', [None, 2])
def test_copies_run_what_they_hold(own, rank):
    """Whether the layer is dense or not, or a module around it."""
    model = nn.Sequential(conv())
    for net in (model, model[0]):
        own(net) if own is not closure_over_the_module or net is model[
            0] else closure(net)
    if rank:
        layer = BasisLayer(model[0][0], rank)
        layer.project(model[0][0])
        replace_modules(model, {model[0][0]: layer})
    expected = model(X)
    clone, dense = copy_module(model), densified(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not model(X).any()
    assert_close(clone(X), expected)
    assert_close(dense(X), expected)
    assert_close(copy_module(clone)(X), expected)


@pytest.mark.parametrize('own', [method_of_another, hidden_in_an_object])
def test_copies_run_methods_of_their_own(own):
    """Which copying knows, though no basis layer could have them."""
    model = conv()
    own(model)
    expected, clone = model(X), copy_module(model)
    with torch.no_grad():
        model[0].weight.zero_()
    assert_close(clone(X), expected)


def test_no_copy_runs_what_another_holds():
    model = conv()
    by_a_global(model)
    with pytest.raises(Exception, match='^0 cannot be copied.* a global'):
        copy_module(model)


def test_hooks_on_gradients_keep_the_layer_dense():
    for name in ('weight', 'bias'):
        dense = nn.Conv2d(4, 6, 3)
        assert why_not(dense) is None
        getattr(dense, name).register_hook(lambda grad: 2 * grad)
        assert 'gradients' in why_not(dense)


# ------------------------------------------------------- weights and biases
@pytest.mark.parametrize('has_bias', [True, False])
@pytest.mark.parametrize('dense, function', [
    (nn.Conv2d(4, 6, 3), F.conv2d),
    (nn.ConvTranspose2d(4, 6, 3), F.conv_transpose2d),
    (nn.Linear(6, 5), F.linear),
])
@pytest.mark.parametrize('norm', [False, True])
def test_weight_and_bias_are_those_of_the_function(dense, function, norm,
                                                   has_bias):
    dense = copy.deepcopy(dense)
    if not has_bias:
        dense.bias = None
    layer = BasisLayer(dense, 3, bias=True, norm=norm)
    layer.project(dense)
    nn.init.normal_(layer.coefficients.bias)
    if norm:
        nn.init.uniform_(layer.norm.weight, .5, 2)
        nn.init.normal_(layer.norm.bias)
        nn.init.normal_(layer.norm.running_mean)
        nn.init.uniform_(layer.norm.running_var, .5, 2)
    layer.eval()
    assert_close(function(X, layer.weight, layer.bias), layer(X))
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    assert set(layer.state_dict()) & {'weight', 'bias'} == set()
    loss = function(X, layer.weight, layer.bias).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_no_bias():
    assert BasisLayer(nn.Conv2d(4, 6, 3, bias=False), 2).bias is None
    layer = BasisLayer(nn.Conv2d(4, 6, 3), 2)
    assert layer.bias is layer.coefficients.bias


def test_weight_and_bias_are_not_to_be_set():
    layer = BasisLayer(nn.Conv2d(4, 6, 3), 2)
    for name in ('weight', 'bias'):
        with pytest.raises((AttributeError, KeyError)):
            setattr(layer, name, nn.Parameter(torch.zeros(6)))
        with pytest.raises((AttributeError, KeyError)):
            layer.register_parameter(name, nn.Parameter(torch.zeros(6)))


@pytest.mark.parametrize('weight', [True, False])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('norm', [True, False])
def test_what_is_trained_stays_so(weight, bias, norm):
    dense = nn.Conv2d(4, 6, 3)
    dense.weight.requires_grad, dense.bias.requires_grad = weight, bias
    layer = BasisLayer(dense, 2, norm=norm)
    assert layer.basis.weight.requires_grad == weight
    assert layer.coefficients.weight.requires_grad == weight
    assert layer.coefficients.bias.requires_grad == bias
    if norm:
        assert layer.norm.weight.requires_grad == weight
    for again in (layer.to_dense(), layer.fold_norm().to_dense()):
        assert again.weight.requires_grad == weight
        assert again.bias.requires_grad == bias


@pytest.mark.parametrize('weight', [True, False])
def test_an_added_bias_is_trained_if_the_weight_is(weight):
    dense = nn.Conv2d(4, 6, 3, bias=False).requires_grad_(weight)
    layer = BasisLayer(dense, 2, bias=True)
    assert layer.coefficients.bias.requires_grad == weight
    assert layer.to_dense().bias.requires_grad == weight


def test_plain_attributes_are_there():
    dense = nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect')
    dense.note, dense.rank = ['anything'], 'not ours'
    layer = BasisLayer(dense, 2)
    assert layer.note is dense.note and layer.to_dense().note is dense.note
    assert layer.padding_mode == 'reflect' and layer.rank == 2


def test_notes_on_parameters_are_there():
    dense = nn.Conv2d(4, 6, 3)
    dense.weight.no_decay, dense.bias.role = True, 'a bias'
    layer = BasisLayer(dense, 2, norm=True)
    assert layer.basis.weight.no_decay and layer.coefficients.weight.no_decay
    assert layer.coefficients.bias.role == 'a bias'
    again = layer.to_dense()
    assert again.weight.no_decay and again.bias.role == 'a bias'


# ---------------------------------------------------------- kinds of a user
class CausalConv(nn.Conv2d):
    """Linear in its weights, by a forward of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (2, 0, 2, 0)), self.weight, self.bias)


@pytest.fixture
def registry():
    before = dict(LAYER_KINDS.module_dict)
    yield LAYER_KINDS
    LAYER_KINDS.module_dict.clear()
    LAYER_KINDS.module_dict.update(before)


def test_a_kind_from_outside(registry):
    assert kind_of(CausalConv(4, 6, 3)) is None

    @registry.register_module()
    class CausalKind(ConvKind):
        dense_types = (CausalConv, )

    dense = CausalConv(4, 6, 3)
    assert kind_of(dense) is CausalKind and why_not(dense) is None
    assert_close(replaced(nn.Sequential(dense))(X), dense(X))


def test_a_kind_from_outside_wins(registry):

    @registry.register_module()
    class MyConvKind(ConvKind):
        name = 'MyConv'
        dense_types = (nn.Conv2d, )

    assert kind_of(nn.Conv2d(4, 6, 3)) is MyConvKind
    assert kind_of(nn.Conv1d(4, 6, 3)) is ConvKind
    assert BasisLayer(nn.Conv2d(4, 6, 3), 2).kind.name == 'MyConv'


def test_no_kind():
    with pytest.raises(TypeError, match='CausalConv cannot be represented'):
        BasisLayer(CausalConv(4, 6, 3), 2)


# ---------------------------------------------------------------- observing
def changes_output(net):
    net.conv2.register_forward_hook(lambda _, args, y: 2 * y + 1)


def changes_input(net):
    net.conv2.register_forward_pre_hook(lambda _, args: (2 * args[0] + 1, ))


def changes_both(net):
    own = net.conv2.forward
    net.conv2.forward = lambda x: 2 * own(2 * x + 1) + 1


@pytest.mark.parametrize('reconstruction', ['local', 'sequential'])
@pytest.mark.parametrize('change',
                         [changes_output, changes_input, changes_both])
def test_compression_sees_the_layer_and_not_what_is_around_it(
        change, reconstruction):
    torch.manual_seed(0)
    batches = [
        dict(inputs=torch.rand(8, 3, 8, 8), data_samples=torch.arange(8) % 4)
        for _ in range(3)
    ]
    model = ToyNet().eval()
    change(model)
    x = batches[0]['inputs']
    expected = model(x)
    planner = dict(type='FixedPlanner', ranks=dict(conv2=8))
    compress(model, planner, batches, reconstruction=reconstruction)
    assert isinstance(model.conv2, BasisLayer)
    assert (model(x) - expected).norm() < .1 * expected.norm()


def test_observers_end_in_turn():
    model, seen = conv(), []
    closure(model)
    expected, before = model(X), dict(vars(model[0]))
    first = observe(model[0], lambda m, args, kwargs, y: seen.append(y))
    second = observe(
        model[0], before=lambda m, args: seen.append(args[0]))
    assert torch.equal(model(X), expected)
    assert seen[0] is X and torch.equal(2 * seen[1], expected)
    second.remove()
    model(X)
    assert len(seen) == 3
    first.remove()
    model(X)
    assert len(seen) == 3 and vars(model[0]) == before
