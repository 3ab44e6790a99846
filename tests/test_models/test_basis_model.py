# Copyright (c) mmbasis authors. All rights reserved.
"""The wrapper: what it starts from, and that it is the model otherwise."""
import copy
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel, ExponentialMovingAverage
from mmengine.optim import (
    OptimWrapper,
    OptimWrapperDict,
    build_optim_wrapper,
)
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner.checkpoint import load_checkpoint

from mmbasis.compression import (
    Recipe,
    basis_layers,
    get_plan,
    save_checkpoint,
)
from mmbasis.factorization import orthogonality_penalty
from mmbasis.layers import BasisLayer
from mmbasis.models import BasisModel, basis_model
from mmbasis.models.builder import build_compressed
from tests.toy import ToyNet, dense_checkpoint, run, toy_cfg

PLANNER = dict(type='FixedPlanner', ranks={'conv.*': 3})
TERMS = [dict(module='fc', type='kl')]
FACTORS = {'conv1.basis.weight', 'conv1.coefficients.weight'}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.rand(8, 3, 8, 8), torch.arange(8) % 4


@pytest.fixture
def dense(tmp_path):
    return dense_checkpoint(tmp_path / 'dense.pth')


def trained(path, cls=ToyNet):
    net = cls()
    load_checkpoint(net, path)
    return net


def plan_of_rank(rank, batch):
    wrapper = BasisModel(ToyNet())
    recipe = Recipe.of(planner=dict(PLANNER, ranks={'conv.*': rank}))
    return wrapper.compress([batch], recipe)


@pytest.fixture
def compressed(tmp_path, dense, batch):
    """A checkpoint of rank 3, and its plan."""
    wrapper = BasisModel(trained(dense), **dict(planner=PLANNER))
    plan = wrapper.compress([batch])
    path = str(tmp_path / 'compressed.pth')
    save_checkpoint(wrapper, plan, path, {})
    return path, plan


# ------------------------------------------------------------------- start
def test_plan_and_checkpoint_of_another_plan(compressed, batch):
    path, plan = compressed
    with pytest.raises(
            ValueError, match='has a plan, but the checkpoint is compr'):
        BasisModel(ToyNet(), plan=plan_of_rank(2, batch), checkpoint=path)
    same = BasisModel(ToyNet(), plan=plan.to_dict(), checkpoint=path)
    assert {k: x.rank for k, x in same.plan.layers.items()} == {
        'conv1': 3,
        'conv2': 3,
        'conv3': 3
    }
    weights = torch.load(path, weights_only=True)['state_dict']
    assert same.state_dict().keys() == weights.keys()
    assert all(torch.equal(same.state_dict()[k], x)
               for k, x in weights.items())


def test_planner_and_checkpoint_of_another_planner(compressed):
    path, _ = compressed
    with pytest.raises(ValueError, match='asks for .* but the checkpoint'):
        BasisModel(
            ToyNet(), planner=dict(PLANNER, ranks={'conv1': 2}),
            checkpoint=path)
    assert BasisModel(ToyNet(), planner=PLANNER, checkpoint=path).plan


def test_dense_checkpoint_of_a_compressed_architecture(dense, compressed):
    architecture = dict(type='ToyNet')
    model = build_compressed(architecture, compressed[1].to_dict())
    with pytest.raises(RuntimeError, match='the checkpoint is dense, but'):
        BasisModel(model, checkpoint=dense)
    assert get_plan(model) is not None


def pretrained(path, **init_cfg):
    net = ToyNet()
    net.init_cfg = dict(dict(type='Pretrained', checkpoint=path), **init_cfg)
    return net


@MODELS.register_module(force=True)
class PretrainedNet(ToyNet):

    def __init__(self, path, as_list=False, **kwargs):
        super().__init__(**kwargs)
        config = dict(type='Pretrained', checkpoint=path)
        self.init_cfg = [config] if as_list else config


@pytest.mark.parametrize('as_list', [False, True])
def test_pretrained_weights_teach(tmp_path, dense, as_list):
    """They count as trained, whether or not a teacher is asked for."""
    hook = dict(planner=PLANNER, distillation=dict(terms=TERMS))
    cfg = toy_cfg(tmp_path / 'run', None, hook, epochs=1)
    cfg.model = dict(type='PretrainedNet', path=dense, as_list=as_list)
    model = run(cfg).model
    teacher = model.distillation.teacher.state_dict()
    expected = torch.load(dense, weights_only=True)['state_dict']
    assert all(torch.equal(teacher[k].cpu(), v) for k, v in expected.items())
    assert model.source == dense


def test_pretrained_weights_keep_an_explicit_teacher(tmp_path, dense):
    other = str(tmp_path / 'other.pth')
    torch.save(
        {k: 2 * v
         for k, v in torch.load(dense)['state_dict'].items()}, other)
    hook = dict(
        planner=PLANNER, distillation=dict(terms=TERMS, checkpoint=other))
    cfg = toy_cfg(tmp_path / 'run', None, hook, epochs=1)
    cfg.model = dict(type='PretrainedNet', path=dense)
    teacher = run(cfg).model.distillation.teacher.state_dict()
    expected = torch.load(other, weights_only=True)
    assert all(torch.equal(teacher[k].cpu(), v) for k, v in expected.items())


def test_pretrained_weights_under_a_plan(dense, batch):
    plan = plan_of_rank(3, batch)
    wrapper = BasisModel(pretrained(dense), plan=plan, distillation=False)
    with torch.no_grad():
        small, whole = wrapper.conv2.weight, trained(dense).conv2.weight
    left = (small - whole).norm()
    # truncated at rank 3, and not initialised again
    values = torch.linalg.svdvals(whole.flatten(1))
    torch.testing.assert_close(left, values[3:].norm(), rtol=1e-3, atol=1e-4)
    wrapper.init_weights()
    assert torch.equal(wrapper.conv2.weight, small)


def test_checkpoint_of_the_wrapper_names_its_teacher(tmp_path, dense):
    """As one that is given as load_from does."""
    hook = dict(planner=PLANNER, distillation=dict(terms=TERMS))
    run(toy_cfg(tmp_path / 'first', dense, hook, epochs=1))
    cfg = toy_cfg(tmp_path / 'second', None, {}, epochs=1)
    cfg.custom_hooks[-1] = dict(type='mmbasis.BasisCompressionHook')
    cfg.model = dict(
        type='mmbasis.BasisModel',
        architecture=dict(type='ToyNet'),
        checkpoint=str(tmp_path / 'first' / 'epoch_1.pth'),
        distillation=dict(terms=TERMS))
    runner = run(cfg)
    assert 'train/loss_distill_fc' in runner.message_hub.log_scalars
    teacher = runner.model.distillation.teacher.state_dict()
    expected = torch.load(dense, weights_only=True)['state_dict']
    assert all(torch.equal(teacher[k].cpu(), v) for k, v in expected.items())


@pytest.fixture
def other_classes(tmp_path, batch):
    """A run whose checkpoint is compressed, with 4 classes, and whose dense
    weights are there; its config with 7 classes."""
    path = dense_checkpoint(tmp_path / 'dense.pth')
    hook = dict(planner=PLANNER)
    cfg = toy_cfg(tmp_path / 'first', path, hook, epochs=1)
    cfg.model.type = 'WideNet'
    run(cfg)
    cfg.model.num_classes = 7
    cfg.merge_from_dict(
        dict(
            load_from=str(tmp_path / 'first' / 'epoch_1.pth'),
            work_dir=str(tmp_path / 'second')))
    cfg.custom_hooks[-1] = dict(type='mmbasis.BasisCompressionHook')
    return cfg


@MODELS.register_module(force=True)
class WideNet(ToyNet):
    """With a number of classes, and a backbone to compare by default."""

    def __init__(self, num_classes=4, **kwargs):
        super().__init__(**kwargs)
        self.fc = nn.Linear(16, num_classes)
        self.backbone = nn.Identity()

    def forward(self, inputs, *args, **kwargs):
        return super().forward(self.backbone(inputs), *args, **kwargs)


def test_other_number_of_classes(other_classes):
    """Trains without a teacher, and says so."""
    runner = run(other_classes)
    assert runner.model.fc.weight.shape == (7, 16)
    assert len(list(basis_layers(runner.model))) == 3
    assert runner.model.distillation is None
    log, = Path(runner.log_dir).glob('*.log')
    assert 'Training without a teacher: it is of another model' in (
        log.read_text())


def test_other_number_of_classes_with_a_teacher(other_classes):
    other_classes.custom_hooks[-1]['distillation'] = dict(terms=TERMS)
    with pytest.raises(
            RuntimeError,
            match='distillation needs the dense weights, but it is of '
            r'another model: .*fc.weight: \(4, 16\), not \(7, 16\)'):
        run(other_classes)


# ---------------------------------------------------------------- attributes
class Featured(ToyNet):

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = 1.
        self._hidden = 0
        self._size = 4

    @property
    def size(self):
        return self._size

    @size.setter
    def size(self, value):
        self._size = 2 * value

    def hidden(self):
        return self._hidden

    def extract_feat(self, x):
        return self.scale * self.conv1(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Featured()


def test_attributes_are_the_model_s(net, batch):
    wrapper = BasisModel(net)
    wrapper.scale = 3.
    assert net.scale == 3. and 'scale' not in vars(wrapper)
    wrapper._hidden = 5  # private ones, too
    assert net.hidden() == wrapper.hidden() == 5
    wrapper.size = 3
    assert net.size == wrapper.size == 6
    x = batch[0]
    assert torch.equal(wrapper.extract_feat(x), 3 * net.conv1(x))
    wrapper.conv1.note = 'here'
    assert net.conv1.note == 'here'
    wrapper.new = 1
    assert net.new == 1
    del wrapper.new
    assert not hasattr(net, 'new') and not hasattr(wrapper, 'new')
    with pytest.raises(AttributeError, match="'Featured'.*'missing'"):
        _ = wrapper.missing
    with pytest.raises(AttributeError, match='missing'):
        del wrapper.missing
    wrapper.init_cfg = dict(type='Normal')
    assert net.init_cfg == dict(type='Normal')


def test_children_parameters_and_buffers_are_the_model_s(net):
    wrapper = BasisModel(net)
    wrapper.fc = nn.Linear(16, 9)
    assert net.fc is wrapper.fc and net.fc.out_features == 9
    wrapper.gain = nn.Parameter(torch.ones(2))
    wrapper.register_buffer('count', torch.zeros(1))
    wrapper.add_module('extra', nn.Linear(2, 2))
    for name in ('gain', 'count', 'extra.weight'):
        assert name in net.state_dict() and name in wrapper.state_dict()
    assert wrapper.gain is net.gain
    wrapper.count = wrapper.count + 1
    assert net.count == 1
    del wrapper.extra, wrapper.gain
    assert not hasattr(net, 'extra') and not hasattr(net, 'gain')
    assert 'architecture' not in dict(wrapper.named_modules())


def test_own_attributes_stay_with_the_wrapper(net):
    wrapper = BasisModel(net)
    wrapper.has_weights, wrapper.source = True, 'a.pth'
    wrapper.train_step = compiled = torch.compile(wrapper.train_step)
    for name in ('has_weights', 'source', 'train_step'):
        assert name not in vars(net)
    assert wrapper.train_step is compiled
    wrapper.eval()
    assert not net.training and not net.conv1.training
    wrapper.train()
    assert wrapper.training and net.training
    assert wrapper.is_init is net.is_init is False
    net.init_weights()
    assert wrapper.is_init


class Stateful(ToyNet):
    """Reads older checkpoints, and adds to those it writes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._register_state_dict_hook(self._add)

    @staticmethod
    def _add(model, state, prefix, metadata):
        state[f'{prefix}extra'] = torch.ones(1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        for key in list(state_dict):
            if key.startswith(f'{prefix}classifier.'):
                state_dict[key.replace('classifier.',
                                       'fc.')] = state_dict.pop(key)
        state_dict.pop(f'{prefix}extra', None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def test_state_dict_is_the_model_s():
    """Its keys, hooks and conversions."""
    net = Stateful()
    wrapper = BasisModel(net)
    state = copy.deepcopy(wrapper.state_dict())
    assert list(state) == list(net.state_dict()) and 'extra' in state
    old = {k.replace('fc.', 'classifier.'): v + 1 for k, v in state.items()}
    wrapper.load_state_dict(copy.deepcopy(old))
    assert torch.equal(net.fc.weight, state['fc.weight'] + 1)


def test_copies_are_apart(net, batch):
    """As moving averages of the weights are."""
    wrapper = BasisModel(net, planner=PLANNER)
    wrapper.compress([batch])
    twin = copy.deepcopy(wrapper)
    assert isinstance(twin, BasisModel) and twin.architecture is not net
    assert twin.conv1 is twin.architecture.conv1 is not net.conv1
    assert twin.plan == wrapper.plan
    twin.scale, twin.conv1.basis.weight.data[:] = 7., 0.
    assert net.scale == 1. and net.conv1.basis.weight.any()
    x = batch[0]
    average = ExponentialMovingAverage(wrapper, momentum=.5)
    with torch.no_grad():
        assert torch.equal(average(x), wrapper(x))
        wrapper.fc.bias += 1
        average.update_parameters(wrapper)
    assert set(average.state_dict()) == {
        'steps', *(f'module.{k}' for k in wrapper.state_dict())
    }
    assert torch.equal(average.module.fc.bias, net.fc.bias)


# ------------------------------------------------------------------ training
class Tuples(BaseModel):
    """Takes two positional arguments, and adds to its losses by itself."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, imgs, labels, mode='tensor'):
        x = self.head(self.conv1(imgs).relu().mean((2, 3)))
        if mode == 'loss':
            return dict(loss=F.cross_entropy(x, labels), acc=x.mean())
        return x

    def parse_losses(self, losses):
        total, logged = super().parse_losses(losses)
        return total, dict(logged, parsed=torch.ones(1))

    def val_step(self, data):
        return 'validated', self(*data)

    def test_step(self, data):
        return 'tested', self(*data)


def optimizer(model):
    return OptimWrapper(torch.optim.SGD(model.parameters(), .1))


def test_arguments_of_another_name(batch):
    torch.manual_seed(0)
    terms = [dict(module='head', type='kl', weight=1.)]
    wrapper = BasisModel(
        Tuples(),
        planner=dict(type='FixedPlanner', ranks={'conv1': 3}),
        orthogonality=dict(weight=.1),
        distillation=dict(terms=terms))
    wrapper.has_weights = True
    wrapper.compress([batch])
    expected = {'loss', 'acc', 'loss_distill_head', 'loss_orthogonality'}
    assert wrapper(*batch, mode='loss').keys() == expected
    assert wrapper(*batch, 'loss').keys() == expected  # by position
    images, labels = batch
    assert wrapper(
        labels=labels, imgs=images, mode='loss').keys() == expected
    assert wrapper(images, labels).shape == (8, 4)
    before = wrapper.conv1.basis.weight.clone()
    logged = wrapper.train_step(batch, optimizer(wrapper))
    assert logged.keys() == expected | {'parsed'}
    assert not torch.equal(wrapper.conv1.basis.weight, before)
    for step, word in (('val_step', 'validated'), ('test_step', 'tested')):
        found, outputs = getattr(wrapper, step)(batch)
        assert found == word and torch.equal(outputs, wrapper(*batch))


class LossByDefault(Tuples):

    def forward(self, imgs, labels, mode='loss'):
        return super().forward(imgs, labels, mode)


def test_mode_by_default(batch):
    wrapper = BasisModel(LossByDefault(), orthogonality=dict(weight=.1))
    assert 'loss_orthogonality' in wrapper(*batch)
    assert wrapper(*batch, mode='tensor').shape == (8, 4)


class OwnStep(Tuples):

    def train_step(self, data, optim_wrapper):
        loss = self(*data, mode='loss')['loss']
        optim_wrapper.update_params(loss)
        return dict(own=loss)


class OwnForward(Tuples):

    def _run_forward(self, data, mode):
        return dict(loss=2 * self(*data, mode=mode)['loss'])


@pytest.mark.parametrize('cls, key', [(OwnStep, 'own'), (OwnForward, 'loss')])
def test_models_that_train_themselves(cls, key, batch):
    planner = dict(type='FixedPlanner', ranks={'conv1': 3})
    for asked in (dict(distillation=dict(terms=TERMS)),
                  dict(orthogonality=dict(weight=.1))):
        with pytest.raises(ValueError, match=f'{cls.__name__} has a train_s'):
            BasisModel(cls(), planner=planner, **asked)
    wrapper = BasisModel(cls(), planner=planner)
    with pytest.raises(RuntimeError, match='has a planner, but the model'):
        wrapper.train_step(batch, optimizer(wrapper))
    wrapper.compress([batch])
    before = wrapper.conv1.basis.weight.clone()
    logged = wrapper.train_step(batch, optimizer(wrapper))
    assert key in logged and 'loss_distill_head' not in logged
    assert not torch.equal(wrapper.conv1.basis.weight, before)


def test_what_is_no_model():
    with pytest.raises(TypeError, match='an MMEngine model, but got Linear'):
        BasisModel(nn.Linear(2, 2))


@MODELS.register_module(force=True)
class ToyGAN(BaseModel):
    """Two networks with an optimizer each."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
            nn.Conv2d(16, 3, 3, padding=1))
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(),
            nn.Linear(8 * 9, 1))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        fake = self.generator(inputs)
        if mode == 'predict':
            return list(zip(self.discriminator(fake), data_samples))
        return self.discriminator(fake)

    def train_step(self, data, optim_wrapper):
        logged = {}
        for name, sign in (('generator', 1), ('discriminator', -1)):
            one = optim_wrapper[name]
            self.zero_grad()  # both steps reach both networks
            with one.optim_context(getattr(self, name)):
                loss = sign * self(**data).mean()
            one.update_params(loss)
            logged[f'loss_{name}'] = loss
        return logged


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class ToyConstructor:

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.config = optim_wrapper_cfg

    def __call__(self, model):
        return OptimWrapperDict(
            **{
                name: build_optim_wrapper(getattr(model, name), config)
                for name, config in self.config.items()
            })


def test_several_optimizers(tmp_path):
    """Through the hook: compressed, trained, saved and resumed."""
    planner = dict(
        type='FixedPlanner', ranks={'generator.[02]': 2}, data_aware=True)
    cfg = toy_cfg(
        tmp_path / 'run', None, dict(planner=planner), epochs=2)
    cfg.model = dict(type='ToyGAN')
    one = dict(optimizer=dict(type='SGD', lr=.01, momentum=.9))
    cfg.optim_wrapper = dict(
        constructor='ToyConstructor', generator=one, discriminator=one)
    cfg.param_scheduler = None
    whole = run(cfg)
    model = whole.model
    assert isinstance(model, BasisModel)
    assert {k for k, _ in basis_layers(model)} == {
        'generator.0', 'generator.2'
    }
    assert {'train/loss_generator', 'train/loss_discriminator'} <= set(
        whole.message_hub.log_scalars)
    ours = {id(x) for x in model.parameters()}
    for name in ('generator', 'discriminator'):
        held = [
            x for group in whole.optim_wrapper[name].param_groups
            for x in group['params']
        ]
        assert held and {id(x) for x in held} == {
            id(x) for x in getattr(model, name).parameters()
        } <= ours
    cfg.merge_from_dict(
        dict(
            resume=True,
            load_from=str(tmp_path / 'run' / 'epoch_1.pth'),
            work_dir=str(tmp_path / 'resumed')))
    resumed = run(cfg).model
    for a, b in zip(model.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_penalty_is_the_sum_over_bases():
    """Also of those that are computed in one product."""
    net = nn.Sequential(
        nn.Conv2d(6, 8, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(12, 16, 3, groups=2),
        nn.Conv2d(8, 8, 3))
    for i, layer in enumerate(net):
        net[i] = BasisLayer(layer, 3, input_rank=5 if i == 3 else None)
        for weight in net[i].weights:
            nn.init.normal_(weight)
    bases = [basis.detach() for layer in net for basis in layer.bases]
    assert len(bases) == 5
    expected = sum(
        (x @ x.mT - torch.eye(x.shape[1])).square().sum() for x in bases)
    stacks = basis_model._stacked_bases(net)
    assert len(stacks) == 3
    torch.testing.assert_close(sum(map(orthogonality_penalty, stacks)),
                               expected)


def test_compiled_steps(tmp_path, dense):
    """``compile=dict(…)`` of MMEngine sets ``train_step`` on the model."""
    cfg = toy_cfg(tmp_path / 'run', dense, dict(planner=PLANNER), epochs=1)
    del cfg.optim_wrapper.optimizer.momentum  # compiling it fails
    cfg.compile = dict(backend='eager')
    compiled = run(cfg).model
    assert 'train_step' in vars(compiled)
    assert 'train_step' not in vars(compiled.architecture)
    cfg.compile = False
    cfg.work_dir = str(tmp_path / 'plain')
    plain = run(cfg).model
    for a, b in zip(compiled.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_average_of_the_weights(tmp_path, dense):
    cfg = toy_cfg(tmp_path / 'run', dense, dict(planner=PLANNER), epochs=1)
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=.5))
    runner = run(cfg)
    average = next(x for x in runner.hooks
                   if isinstance(x, EMAHook)).ema_model.module
    assert average.architecture.conv1 is average.conv1
    assert average.plan == runner.model.plan
    saved = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=True)
    assert set(saved['state_dict']) >= FACTORS
    assert {f'module.{x}' for x in FACTORS} <= set(saved['ema_state_dict'])
