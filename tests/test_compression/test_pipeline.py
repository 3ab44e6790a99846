# Copyright (c) mmbasis authors. All rights reserved.
import copy
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.analysis import FlopAnalyzer
from mmengine.model import (
    BaseModel,
    ExponentialMovingAverage,
    ImgDataPreprocessor,
)

import mmbasis
from mmbasis.compression import apply_plan, basis_layers, get_plan
from mmbasis.layers import BasisLayer
from mmbasis.planning import BudgetPlanner, EnergyPlanner, FixedPlanner
from mmbasis.running import model_complexity


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 24, 3, stride=2, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(24, 16, 2, stride=2)
        self.fc = nn.Linear(16, 20)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.up(F.relu(self.conv2(x))))
        return self.fc(x.mean((2, 3)))


def network(cls=Net):
    torch.manual_seed(0)
    return cls().eval()


def batches(count=2, size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, 3, 11, 11, generator=generator) for _ in range(count)
    ]


def names(model):
    return [name for name, _ in basis_layers(model)]


def test_full_rank_of_a_plain_module():
    model = network()
    x, = batches(1, seed=1)
    expected = model(x)
    planner = FixedPlanner({'.*': 'full'},
                           allow_costlier=True,
                           prediction_layers=True)
    plan = mmbasis.compress(model, planner, batches())
    assert names(model) == ['conv1', 'conv2', 'up', 'fc'] == list(plan.layers)
    assert (model(x) - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize('planner', [
    dict(type='BudgetPlanner', macs=0.5),
    dict(type='BudgetPlanner', params=0.5),
    dict(type='BudgetPlanner', macs=0.5, forms=['output']),
    dict(type='BudgetPlanner', macs=0.5, forms=['input']),
    dict(type='BudgetPlanner', macs=0.5, forms=['both']),
    dict(type='BudgetPlanner', macs=0.5, forms=['both', 'spatial']),
    dict(type='EnergyPlanner', threshold=0.6),
    dict(type='RatioPlanner', ratio=0.5),
])
@pytest.mark.parametrize('norm', [False, True])
def test_plan_says_what_was_done(planner, norm):
    model = network()
    dense_params = sum(p.numel() for p in model.parameters())
    plan = mmbasis.compress(model, planner, batches(), norm=norm)
    assert get_plan(model) is plan
    assert names(model) == list(plan.layers) and plan.layers
    for name, layer in basis_layers(model):
        entry = plan.layers[name]
        assert layer.rank == entry.rank
        assert layer.input_rank == entry.input_rank
        assert layer.spatial == entry.spatial
        # it stands in front of coefficients
        assert (layer.norm is not None) == (norm and entry.form != 'input')
        assert (layer.last.bias is not None) == entry.bias
        assert entry.params[1] == sum(p.numel() for p in layer.parameters())
    totals = plan.totals()
    params = sum(p.numel() for p in model.parameters())
    saved = totals['params']['before'] - totals['params']['after']
    assert params == dense_params - saved
    counted = FlopAnalyzer(model, torch.rand(1, 3, 11, 11)).by_module()
    for name, entry in plan.layers.items():
        layer = model.get_submodule(name)
        parts = {x for x, _ in layer.named_children()} - {'norm'}
        assert sum(counted[f'{name}.{x}'] for x in parts) == entry.macs[1]


def test_data_aware_loses_less_of_the_outputs():
    """Directions that the images do not use cost nothing."""
    torch.manual_seed(0)
    mixing = torch.randn(3, 3) * torch.tensor([3., 0.3, 0.03])
    data = [torch.einsum('bchw,dc->bdhw', x, mixing) for x in batches(8)]
    x = data.pop()
    lost = {}
    for data_aware in (False, True):
        model = network()
        expected = model.conv1(x)
        mmbasis.compress(model,
                         FixedPlanner({'conv1': 3}, data_aware=data_aware),
                         data)
        lost[data_aware] = (model.conv1(x) - expected).norm()
    assert lost[True] < 0.9 * lost[False]


def test_mean_output_is_kept():
    model, data = network(), batches(2)
    expected = model.conv2(model.norm1(model.conv1(data[0])).relu() + 1)
    x = torch.cat(data)
    features = F.relu(model.norm1(model.conv1(x)))
    expected = model.conv2(features).mean((0, 2, 3))
    mmbasis.compress(model, FixedPlanner({'conv2': 1}), data)
    mean = model.conv2(features).mean((0, 2, 3))
    torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('count', [1, 2])
def test_number_of_batches(count):
    seen, data = [], batches(4)

    def loader():
        for i, batch in enumerate(data):
            seen.append(i)
            yield batch

    model, other = network(), network()
    planner = FixedPlanner({'.*': 3})
    kwargs = dict(recalibration=False)
    mmbasis.compress(model, planner, loader(), num_batches=count, **kwargs)
    # no more are read than are used, and one that is held out
    assert seen == list(range(count + 1))
    mmbasis.compress(other, planner, data[:count], **kwargs)
    x, = batches(1, seed=1)
    assert torch.equal(model(x), other(x))
    third = network()
    mmbasis.compress(third, planner, data, num_batches=50, **kwargs)
    assert not torch.equal(third(x), model(x))


def test_result_does_not_depend_on_the_run():
    models = [network(), network()]
    for i, model in enumerate(models):
        torch.manual_seed(100 + i)
        mmbasis.compress(model, BudgetPlanner(macs=0.5), batches())
    x, = batches(1, seed=1)
    assert torch.equal(models[0](x), models[1](x))


@pytest.mark.parametrize('form', ['output', 'input', 'both', 'spatial'])
def test_compressed_model_trains(form):
    model = network()
    planner = BudgetPlanner(macs=0.5, forms=[form])
    plan = mmbasis.compress(
        model, planner, batches(), norm=form != 'spatial')
    assert {x.form for x in plan.layers.values()} == {form}
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, = batches(1)
    target = torch.arange(len(x))
    losses = []
    model.train()
    for _ in range(20):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize('form', ['output', 'input', 'both', 'spatial'])
def test_mode_is_kept(form):
    for training in (True, False):
        model = network().train(training)
        planner = BudgetPlanner(macs=0.5, forms=[form])
        mmbasis.compress(model, planner, batches(), norm=form != 'spatial')
        assert {m.training for m in model.modules()} == {training}
        assert names(model)


# ----------------------------------------------------- shared, tied, wrapped
class Shared(nn.Module):
    """One convolution with two parents, as in heads over many levels."""

    def __init__(self):
        super().__init__()
        conv = nn.Conv2d(8, 8, 3, padding=1)
        self.stem = nn.Conv2d(3, 8, 3)
        self.small = nn.Sequential(conv, nn.BatchNorm2d(8))
        self.large = nn.Sequential(conv, nn.BatchNorm2d(8))

    def forward(self, x):
        x = self.stem(x)
        return self.small(x[..., ::2, ::2]).mean() + self.large(x)


def test_shared_layers_stay_shared():
    model = network(Shared)
    planner = EnergyPlanner(0.5, prediction_layers=True)
    plan = mmbasis.compress(model, planner, batches())
    assert 'small.0' in plan.layers and 'large.0' not in plan.layers
    assert isinstance(model.small[0], BasisLayer)
    assert model.small[0] is model.large[0]
    parameters = sum(p.numel() for p in model.parameters())
    totals = plan.totals()['params']
    dense = network(Shared)
    assert parameters == sum(p.numel() for p in dense.parameters()) - (
        totals['before'] - totals['after'])


def test_weights_of_shared_layers_load(tmp_path):
    model, again = network(Shared), network(Shared)
    plan = mmbasis.compress(model, EnergyPlanner(0.5), batches())
    apply_plan(again, plan, project=False)
    again.load_state_dict(model.state_dict())
    x, = batches(1)
    assert torch.equal(again(x), model(x))


class Tied(nn.Module):

    def __init__(self):
        super().__init__()
        self.encode = nn.Conv2d(3, 8, 3)
        self.decode = nn.ConvTranspose2d(8, 3, 3)
        self.decode.weight = self.encode.weight
        self.free = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return self.decode(self.free(self.encode(x)))


def test_tied_weights_stay_tied():
    model = network(Tied)
    plan = mmbasis.compress(model, BudgetPlanner(macs=0.5), batches())
    assert names(model) == ['free']
    assert model.decode.weight is model.encode.weight
    assert plan.dense['encode'].reason == 'shares its parameters with decode'
    assert not plan.dense['encode'].compressible


@pytest.mark.parametrize('wrap', [
    lambda model: nn.Sequential(model),
    lambda model: nn.DataParallel(model),
    lambda model: nn.ModuleDict(dict(inner=model)),
])
def test_nested_models(wrap):
    inner = network()
    model = wrap(inner)
    data = batches()
    if isinstance(model, nn.ModuleDict):
        model.forward = inner.forward
    mmbasis.compress(model, BudgetPlanner(macs=0.5), data)
    assert names(inner)


def test_parts_that_no_pass_reaches_may_be_uninitialised():
    model = network()
    model.unused = nn.LazyBatchNorm2d()
    plan = mmbasis.compress(
        model,
        FixedPlanner({'conv1': 2}),
        batches(),
        reconstruction='local')  # which needs no copy, they cannot be copied
    assert list(plan.layers) == ['conv1']
    assert isinstance(model.unused, nn.LazyBatchNorm2d)


def test_frozen_layers_stay_frozen():
    model = network()
    model.conv1.requires_grad_(False)
    mmbasis.compress(model, FixedPlanner({'conv1': 2, 'fc': 2}), batches())
    assert not any(p.requires_grad for p in model.conv1.parameters())
    assert all(p.requires_grad for p in model.fc.parameters())


def test_attention_is_left_alone():
    """Its projections are read, not called."""

    class Attention(nn.Module):

        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(11, 12)
            self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

        def forward(self, x):
            x = self.embed(x.flatten(1, 2))
            return self.attention(x, x, x)[0]

    model = network(Attention)
    x, = batches(1)
    plan = mmbasis.compress(model, FixedPlanner({'.*': 3}), batches())
    assert list(plan.layers) == ['embed']
    reason = plan.dense['attention.out_proj'].reason
    assert reason.startswith('nn.MultiheadAttention reads its weight')
    assert model(x).shape == (4, 33, 12)


@pytest.mark.parametrize('form', ['output', 'input', 'both', 'spatial'])
def test_deepcopy_of_a_compressed_model(form):
    model = network()
    planner = BudgetPlanner(macs=0.5, forms=[form])
    mmbasis.compress(model, planner, batches())
    clone = copy.deepcopy(model)
    x, = batches(1)
    expected = model(x)
    assert torch.equal(clone(x), expected)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert torch.equal(model(x), expected)
    assert get_plan(clone) == get_plan(model)
    with pytest.raises(RuntimeError, match='these weights are dense'):
        clone.load_state_dict(network().state_dict())


# -------------------------------------------------------------------- errors
def unchanged(model, before):
    state = model.state_dict()
    return list(state) == list(before) and all(
        torch.equal(state[k].nan_to_num(), v.nan_to_num())
        for k, v in before.items()) and not names(model)


@pytest.mark.parametrize('planner, error, message', [
    (dict(type='BudgetPlanner', macs=0.001), ValueError, 'cannot be met'),
    (dict(type='BudgetPlanner', macs=0.), ValueError, 'must be in'),
    (dict(type='BudgetPlanner', macs=0.5,
          include=['neck']), ValueError, 'matches none'),
    (dict(type='FixedPlanner', ranks={'fc': 99}), ValueError, 'rank 99'),
    (dict(type='BudgetPlanner', mac=0.5), TypeError, "'mac'"),
    (dict(type='NoPlanner'), KeyError, 'NoPlanner'),
])
def test_error_leaves_the_model_alone(planner, error, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        mmbasis.compress(model, planner, batches())
    assert unchanged(model, before) and get_plan(model) is None
    model.load_state_dict(before)


@pytest.mark.parametrize('planner', [
    BudgetPlanner(macs=0.5),
    EnergyPlanner(0.5),
])
def test_broken_weights(planner):
    model = network()
    with torch.no_grad():
        model.up.weight[0, 0, 0, 0] = float('nan')
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='NaN or infinite in up'):
        mmbasis.compress(model, planner, batches())
    assert unchanged(model, before)


class SemiSupervised(nn.Module):

    def __init__(self):
        super().__init__()
        self.student, self.teacher = Net(), Net()

    def forward(self, x):
        return self.teacher(x)


def test_student_and_teacher():
    """As in Soft Teacher and CAE: a mean teacher could not follow a student of
    other ranks."""
    model = network(SemiSupervised)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='a Net, student and teacher'):
        mmbasis.compress(model, BudgetPlanner(macs=0.5), batches())
    assert unchanged(model, before)


def test_compressed_twice():
    model = network()
    plan = mmbasis.compress(model, BudgetPlanner(macs=0.5), batches())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for planner in (BudgetPlanner(macs=0.5), plan):
        with pytest.raises(ValueError, match='compressed already'):
            mmbasis.compress(model, planner, batches())
    with pytest.raises(ValueError, match='compressed already'):
        apply_plan(model, plan)
    assert all(
        torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_no_images():
    with pytest.raises(RuntimeError, match='dataloader is empty'):
        mmbasis.compress(network(), BudgetPlanner(macs=0.5), [])


# ---------------------------------------------------------------- complexity
class ToyModel(BaseModel):

    def __init__(self):
        super().__init__(ImgDataPreprocessor())
        self.net = network()

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.net(inputs)


def test_complexity_of_a_model():
    model = ToyModel().train()
    data = dict(inputs=[torch.rand(3, 11, 11)], data_samples=None)
    before = model_complexity(model, data)
    assert before['params'] == sum(p.numel() for p in model.parameters())
    counted = FlopAnalyzer(model.net.eval(), torch.rand(1, 3, 11, 11))
    assert before['macs'] == counted.total()
    json.dumps(before)
    model.train()
    plan = mmbasis.compress(model, FixedPlanner({'.*': 3}), [
        dict(inputs=list(torch.rand(2, 3, 11, 11))),
    ])
    after = model_complexity(model, data)
    totals = plan.totals()
    for key in ('macs', 'params'):
        saved = totals[key]['before'] - totals[key]['after']
        assert before[key] - after[key] == saved > 0
    assert model.training and 'forward' not in vars(model)


def test_linear_layers_are_represented_by_linear_layers():
    model = network()
    mmbasis.compress(model, FixedPlanner({'fc': 2}), batches())
    assert isinstance(model.fc, BasisLayer)
    assert type(model.fc.basis) is type(model.fc.coefficients) is nn.Linear


class Momentum(nn.Module):
    """A pretext task: an encoder and its moving average."""

    def __init__(self):
        super().__init__()
        self.encoder = Net()
        self.average = ExponentialMovingAverage(self.whole(), momentum=.5)

    def whole(self):
        return self.encoder

    def forward(self, x):
        if self.training:
            self.average.update_parameters(self.whole())
        return self.encoder(x) - 2 * self.average(x)


class Parts(Momentum):
    """One whose encoder is put together for the average only, as MoCo's."""

    def whole(self):
        return nn.Sequential(self.encoder, nn.Identity())


@pytest.mark.parametrize('form', ['output', 'input', 'both', 'spatial'])
@pytest.mark.parametrize('cls, prefix', [(Momentum, 'average.module.'),
                                         (Parts, 'average.module.0.')])
def test_moving_average_inside_the_model_follows(cls, prefix, form):
    model = network(cls)
    x, = batches(1, seed=1)
    for parameter in model.encoder.parameters():
        parameter.data.mul_(1.1)
    expected = model(x)
    full = copy.deepcopy(model)
    planner = FixedPlanner({'.*': 'full'}, allow_costlier=True)
    plan = mmbasis.compress(full, planner, batches(1), reconstruction='local')
    assert (full(x) - expected).norm() < 1e-4 * expected.norm()
    assert plan.dense[f'{prefix}conv1'].reason.startswith('moving')

    planner = BudgetPlanner(macs=.5, loss_aware=False, forms=[form])
    plan = mmbasis.compress(model, planner, batches(1))
    layers = dict(basis_layers(model))
    name = next(x for x in plan.layers if x.startswith('encoder.'))
    layer = layers[name]
    follower = layers[name.replace('encoder.', prefix)]
    assert follower.spatial == layer.spatial == (form == 'spatial')
    assert (follower.rank, follower.input_rank) == (layer.rank,
                                                    layer.input_rank)
    assert not any(x.requires_grad for x in follower.weights)
    model.train()(x)  # the first update copies
    for name, value in model.encoder.named_parameters():
        assert torch.equal(value, model.get_parameter(f'{prefix}{name}'))
    other = network(cls)
    apply_plan(other, plan, project=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model.eval()(x))
