# Copyright (c) mmbasis authors. All rights reserved.
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from mmengine.model import BaseModel

import mmbasis
from mmbasis.compression import (
    META_KEY,
    Recipe,
    apply_plan,
    get_plan,
    load_weights,
    plan_of,
    read_checkpoint,
    save_checkpoint,
)
from mmbasis.models import BasisModel
from mmbasis.planning import CompressionPlan, FixedPlanner, Ranks


class Net(BaseModel):

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 12, 3)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.last(self.norm(self.conv(inputs)).relu())


def planner(**ranks):
    """By default rank 4 for both layers; the last one makes predictions."""
    return FixedPlanner(ranks or {'.*': 4}, prediction_layers=True)


@pytest.fixture
def batches():
    return [dict(inputs=torch.rand(2, 3, 9, 9))]


@pytest.fixture
def dense():
    torch.manual_seed(0)
    return Net().eval()


class FormPlanner(FixedPlanner):
    """Rank 4 of a form, for both layers; the first has but 3 inputs."""

    def __init__(self, form):
        super().__init__({'.*': 4}, prediction_layers=True)
        self.form, self.forms = form, (form, )

    def choose(self, free, decided):
        rank = None if self.form == 'input' else 4
        inputs = {3: 2, 16: 4} if self.form in ('input', 'both') else {}
        return [Ranks(rank, inputs.get(x.layer.in_channels),
                      self.form == 'spatial') for x in free]


PARTS = dict(
    output=('basis.weight', 'coefficients.weight', 'coefficients.bias'),
    input=('input_basis.weight', 'basis.weight', 'basis.bias'),
    both=('input_basis.weight', 'basis.weight', 'coefficients.weight',
          'coefficients.bias'),
    spatial=('basis.weight', 'coefficients.weight', 'coefficients.bias'))


@pytest.fixture(params=PARTS)
def form(request):
    return request.param


@pytest.fixture
def compressed(batches, form):
    torch.manual_seed(0)
    model = Net().eval()
    mmbasis.compress(model, FormPlanner(form), batches)
    return model


def same(model, other):
    x = torch.rand(1, 3, 9, 9)
    return torch.equal(model(x), other(x))


# ------------------------------------------------------------ save and read
@pytest.fixture
def path(compressed, tmp_path):
    path = str(tmp_path / 'compressed.pth')
    save_checkpoint(compressed, get_plan(compressed), path,
                    dict(dataset_meta=dict(classes=('a', 'b'))))
    return path


def test_readable_without_pickle(path, compressed, tmp_path):
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint['meta']['dataset_meta'] == dict(classes=('a', 'b'))
    plan = CompressionPlan.from_dict(checkpoint['meta'][META_KEY])
    assert plan.layers == get_plan(compressed).layers
    assert set(checkpoint['state_dict']) == set(compressed.state_dict())
    assert [x.name for x in tmp_path.iterdir()] == ['compressed.pth']


@pytest.mark.parametrize('planner', [
    dict(type='EnergyPlanner', threshold=0.5, overrides={'last': 3}),
    dict(type='FixedPlanner', ranks={'.*': 3}, exclude=['last']),
    dict(type='RatioPlanner', ratio=0.5, include=['conv', 'last']),
])
def test_every_plan_is_readable_without_pickle(planner, batches, tmp_path):
    model = Net()
    planner = dict(planner, prediction_layers=True)
    plan = mmbasis.compress(model, planner, batches, norm=True)
    save_checkpoint(model, plan, str(tmp_path / 'c.pth'), {})
    checkpoint = torch.load(str(tmp_path / 'c.pth'), weights_only=True)
    assert plan_of(checkpoint).layers == plan.layers
    assert plan_of(checkpoint).norm


def test_rebuilt_from_the_checkpoint_alone(path, compressed):
    checkpoint = read_checkpoint(path)
    model = Net().eval()
    apply_plan(model, plan_of(checkpoint), project=False)
    assert not same(model, compressed)
    load_weights(model, checkpoint, path)
    assert same(model, compressed)


def test_flat_keys(path, dense, form):
    keys = set(torch.load(path, weights_only=True)['state_dict'])
    kept = {k for k in dense.state_dict() if k.startswith('norm.')}
    assert keys - kept == {
        f'{layer}.{part}'
        for layer in ('conv', 'last')
        for part in PARTS[form]
    }


def test_same_keys_through_the_wrapper(compressed, dense, batches, form):
    wrapper = BasisModel(dense)
    wrapper.compress(batches, Recipe.of(planner=FormPlanner(form)))
    assert list(wrapper.state_dict()) == list(compressed.state_dict())
    wrapper.load_state_dict(compressed.state_dict())
    assert same(wrapper, compressed)


@pytest.mark.parametrize('size', [0, 100, 2000, -100])
def test_truncated_file(path, size):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:size])
    with pytest.raises(
            ValueError,
            match='compressed.pth cannot be read, it '
            'may be truncated'):
        read_checkpoint(path)


def test_other_files(path, tmp_path):
    with pytest.raises(FileNotFoundError, match='absent.pth does not exist'):
        read_checkpoint(str(tmp_path / 'absent.pth'))
    with pytest.raises(FileNotFoundError, match='does not exist'):
        read_checkpoint(str(tmp_path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match='holds a list, not weights'):
        read_checkpoint(path)
    Path(path).write_text('no checkpoint')
    with pytest.raises(ValueError, match='cannot be read'):
        read_checkpoint(path)


def test_bare_state_dict(dense, tmp_path):
    path = str(tmp_path / 'bare.pth')
    torch.save(dense.state_dict(), path)
    checkpoint = read_checkpoint(path)
    assert plan_of(checkpoint) is None
    model = Net().eval()
    load_weights(model, checkpoint, path)
    assert same(model, dense)


def test_plan_of_a_newer_version(path):
    checkpoint = torch.load(path)
    checkpoint['meta'][META_KEY]['version'] = 99
    with pytest.raises(ValueError, match='version 99.*upgrade mmbasis'):
        plan_of(checkpoint)


# ---------------------------------------------------------- wrong structures
def test_dense_weights_in_a_compressed_model(dense, compressed):
    before = {k: v.clone() for k, v in compressed.state_dict().items()}
    state = dense.state_dict()
    with pytest.raises(
            RuntimeError,
            match='these weights are dense, but the '
            'model is compressed'):
        compressed.load_state_dict(state)
    with pytest.raises(RuntimeError, match='these weights are dense'):
        compressed.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match='these weights are dense'):
        load_weights(compressed, dict(state_dict=state), 'x.pth')
    after = compressed.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_compressed_weights_in_a_dense_model(dense, compressed):
    state = compressed.state_dict()
    with pytest.raises(RuntimeError, match='these weights are compressed'):
        load_weights(dense, dict(state_dict=state), 'x.pth')
    wrapper = BasisModel(dense)
    for strict in (True, False):
        with pytest.raises(
                RuntimeError,
                match='these weights are compressed .2 basis layers., but '
                'the model is dense'):
            wrapper.load_state_dict(state, strict=strict)


def test_dense_weights_in_a_compressed_wrapper(dense, compressed):
    wrapper = BasisModel(compressed)
    with pytest.raises(RuntimeError, match='these weights are dense'):
        wrapper.load_state_dict(dense.state_dict(), strict=False)


@pytest.mark.parametrize('ranks, message', [
    (dict(conv=3, last=3), 'conv has basis filters of shape'),
    (dict(conv=3), "layers .'last'. .1 in all. are compressed in only one"),
])
def test_weights_of_other_ranks(compressed, batches, ranks, message):
    other = Net()
    mmbasis.compress(other, planner(**ranks), batches)
    for model, state in ((other, compressed.state_dict()),
                         (compressed, other.state_dict())):
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state, strict=False)


def test_guard_inside_a_larger_model(dense, compressed):
    """As MMEngine's average of the weights holds the model."""
    holder = nn.ModuleDict(dict(module=compressed))
    holder.load_state_dict(holder.state_dict())
    state = nn.ModuleDict(dict(module=dense)).state_dict()
    with pytest.raises(RuntimeError, match='these weights are dense'):
        holder.load_state_dict(state, strict=False)


def test_incomplete_weights(dense):
    state = dense.state_dict()
    before = {k: v.clone() for k, v in state.items()}
    changed = {k: v + 1 for k, v in state.items()}
    missing = {k: v for k, v in changed.items() if k != 'norm.running_var'}
    with pytest.raises(
            RuntimeError,
            match='x.pth does not fit the model: '
            'norm.running_var: missing .1 of'):
        load_weights(dense, dict(state_dict=missing), 'x.pth')
    other = dict(changed, **{'last.bias': torch.zeros(5)})
    with pytest.raises(RuntimeError, match=r'last.bias: \(5,\), not \(12,\)'):
        load_weights(dense, dict(state_dict=other), 'x.pth')
    after = dense.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_more_weights_than_needed(dense):
    """A classifier's head is of no use to a detector."""
    state = {**dense.state_dict(), 'head.weight': torch.zeros(3)}
    load_weights(dense, dict(state_dict=state), 'x.pth')


def test_compressed_model_can_be_pickled(compressed, dense):
    again = pickle.loads(pickle.dumps(compressed))
    assert same(again, compressed)
    with pytest.raises(RuntimeError, match='these weights are dense'):
        again.load_state_dict(dense.state_dict())
