# Copyright (c) mmbasis authors. All rights reserved.
import copy
import os

import pytest
import torch
import torch.nn as nn
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.registry import MODELS as PRETRAIN_MODELS

from mmbasis.compression import Term, compress
from mmbasis.compression.recalibration import kl_divergence, normalized_mse
from mmbasis.models import BasisModel
from mmbasis.models.distillation import Distillation
from mmbasis.planning import FixedPlanner
from tests.toy import ToyNet, dense_checkpoint, run, toy_cfg

TERMS = [
    dict(module='fc', type='kl', weight=.7, temperature=4.),
    dict(module='conv2', type='mse', weight=.5)
]


@pytest.fixture
def dense(tmp_path):
    return dense_checkpoint(tmp_path / 'dense.pth')


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.rand(8, 3, 8, 8), torch.arange(8) % 4


def model(dense, **distillation):
    net = ToyNet()
    net.load_state_dict(torch.load(dense)['state_dict'])
    distillation = dict(dict(checkpoint=dense, terms=TERMS), **distillation)
    return BasisModel(net, distillation=distillation)


def test_no_loss_between_equals(dense, batch):
    losses = model(dense).eval()(*batch, mode='loss')
    assert losses['loss_distill_fc'] < 1e-6
    assert losses['loss_distill_conv2'] < 1e-6
    plain = ToyNet().eval()
    plain.load_state_dict(torch.load(dense)['state_dict'])
    expected = .3 * plain(*batch, mode='loss')['loss']
    torch.testing.assert_close(losses['loss'], expected)


def test_pattern_is_a_term_for_each_module(dense, batch):
    names = ('conv1', 'conv2', 'conv3')
    losses = []
    for terms in ([dict(module='conv[1-3]', type='mse', weight=2.)],
                  [dict(module=x, type='mse', weight=2.) for x in names]):
        net = model(dense, terms=terms).eval()
        net.conv1.weight.data *= 1.1
        losses.append({
            k: v
            for k, v in net(*batch, mode='loss').items() if 'distill' in k
        })
    assert list(losses[0]) == ['loss_distill_conv[1-3]']
    assert len(losses[1]) == 3 and all(x > 0 for x in losses[1].values())
    torch.testing.assert_close(losses[0]['loss_distill_conv[1-3]'],
                               sum(losses[1].values()))


def test_gradient_reaches_the_student_alone(dense, batch):
    student = model(dense, task_weight=0.)
    student.fc.weight.data += .1 * torch.randn_like(student.fc.weight)
    losses = student.eval()(*batch, mode='loss')
    losses['loss_distill_fc'].backward()
    assert student.fc.weight.grad.abs().sum() > 0
    teacher = student.distillation.teacher
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_is_not_part_of_the_model(dense):
    with_teacher, bare = model(dense), ToyNet()
    assert list(with_teacher.state_dict()) == list(bare.state_dict())
    assert len(list(with_teacher.parameters())) == len(list(bare.parameters()))
    twin = copy.deepcopy(with_teacher)
    assert twin.distillation is with_teacher.distillation
    # nor does it follow the model into training
    teacher = with_teacher.distillation.teacher
    before = copy.deepcopy(teacher.state_dict())
    x = torch.rand(8, 3, 8, 8)
    expected = copy.deepcopy(teacher).eval()(x)
    with_teacher.train()
    assert torch.equal(teacher(x), expected)
    assert all(
        torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_losses():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 5)
    p, q = (b / 3).softmax(1), (a / 3).softmax(1)
    expected = 9 * (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(kl_divergence(a, b, 3.), expected)
    x = torch.randn(4, 3, 5, 5)
    scale = torch.tensor([1., 10., 100.]).view(1, 3, 1, 1)
    torch.testing.assert_close(
        normalized_mse(scale * (x + .1), scale * x),
        normalized_mse(x + .1, x),
        rtol=1e-3,
        atol=1e-5)


def test_run_and_resume(tmp_path, dense):
    """Terms are logged, the teacher is never saved, and a resumed run is the
    uninterrupted one."""
    hook = dict(
        planner=dict(type='BudgetPlanner', macs=.5),
        distillation=dict(checkpoint=dense, terms=TERMS))
    cfg = toy_cfg(tmp_path / 'run', dense, hook)
    cfg.optim_wrapper.optimizer.lr = .005
    cfg.custom_hooks.append(dict(type='EMAHook'))
    whole = run(cfg)
    assert all(p.isfinite().all() for p in whole.model.parameters())
    scalars = whole.message_hub.log_scalars
    assert 'train/loss_distill_fc' in scalars
    assert 'train/loss_distill_conv2' in scalars
    saved = torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=True)
    assert not any('teacher' in key for key in saved['state_dict'])
    assert any(isinstance(h, EMAHook) for h in whole.hooks)

    cfg.merge_from_dict(
        dict(
            resume=True,
            load_from=str(tmp_path / 'run' / 'epoch_1.pth'),
            work_dir=str(tmp_path / 'resumed')))
    resumed = run(cfg)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


@MODELS.register_module(force=True)
class HeadNet(ToyNet):
    """Names its classifier as the classifiers of mmpretrain do."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.head = torch.nn.ModuleDict(dict(fc=self.fc))
        del self.fc

    @property
    def fc(self):
        return self.head['fc']


@pytest.fixture
def head_cfg(tmp_path, dense):
    content = torch.load(dense, weights_only=True)
    content['state_dict'] = {
        k.replace('fc.', 'head.fc.'): v
        for k, v in content['state_dict'].items()
    }
    torch.save(content, dense)
    cfg = toy_cfg(tmp_path / 'run', dense)
    cfg.model.type = 'HeadNet'
    return cfg


def test_dense_model_teaches_by_default(tmp_path, dense, head_cfg):
    """From its first iteration, after resuming, and when training starts from
    a compressed checkpoint; the file it came from is enough."""
    whole = run(head_cfg)
    losses = 'train/loss_distill_head.fc'
    assert losses in whole.message_hub.log_scalars
    teacher = whole.model.distillation.teacher.state_dict()
    expected = torch.load(dense, weights_only=True)['state_dict']
    assert all(torch.equal(teacher[k].cpu(), v) for k, v in expected.items())

    saved = str(tmp_path / 'run' / 'epoch_1.pth')
    head_cfg.merge_from_dict(
        dict(resume=True, load_from=saved, work_dir=str(tmp_path / 'resumed')))
    resumed = run(head_cfg)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)
    head_cfg.merge_from_dict(
        dict(resume=False, work_dir=str(tmp_path / 'again')))
    again = run(head_cfg)
    assert losses in again.message_hub.log_scalars
    again = again.model.distillation.teacher.state_dict()
    assert all(torch.equal(again[k].cpu(), v) for k, v in expected.items())

    os.remove(dense)
    fresh = run(head_cfg)  # a start goes without a teacher, and says so
    assert fresh.model.distillation is None
    head_cfg.resume = True
    with pytest.raises(RuntimeError, match='dense.pth of the checkpoint does'):
        run(head_cfg)


def test_logits_of_a_transformer():
    """Whose layer is not named fc; compressed or not."""
    init_default_scope('mmpretrain')
    net = PRETRAIN_MODELS.build(
        dict(
            type='ImageClassifier',
            backbone=dict(
                type='VisionTransformer',
                arch=dict(
                    embed_dims=8,
                    num_layers=1,
                    num_heads=2,
                    feedforward_channels=16),
                img_size=16,
                patch_size=8),
            head=dict(
                type='VisionTransformerClsHead', num_classes=5,
                in_channels=8)))
    term = Term('head.layers.head', 'kl', weight=.7, temperature=4.)
    assert Distillation(net).terms == [term]
    planner = FixedPlanner({'head.layers.head': 3},
                           allow_costlier=True,
                           prediction_layers=True)
    compress(net, planner, [dict(inputs=torch.rand(2, 3, 16, 16))])
    assert 'head.layers.head.coefficients' in dict(net.named_modules())
    assert Distillation(net).terms == [term]


def test_head_without_layers_teaches_nothing():
    """Proposals of Sparse R-CNN are learnt, not computed."""
    net = nn.Module()
    net.neck, net.rpn_head = nn.Conv2d(8, 8, 1), nn.Embedding(4, 4)
    assert [x.module for x in Distillation(net).terms] == ['neck']
    tracker = nn.ModuleDict(dict(detector=net, track_head=nn.Linear(8, 8)))
    terms = Distillation(tracker).terms
    assert [x.module for x in terms] == ['detector.neck']


def test_no_teacher(head_cfg):
    head_cfg.custom_hooks[-1].distillation = False
    scalars = run(head_cfg).message_hub.log_scalars
    assert not any('distill' in key for key in scalars)
    head_cfg.load_from = None  # random weights have nothing to teach
    head_cfg.custom_hooks[-1].distillation = True
    untaught = run(head_cfg)
    assert untaught.model.distillation.teacher is None
    scalars = untaught.message_hub.log_scalars
    assert 'train/loss' in scalars
    assert not any('distill' in key for key in scalars)


def test_calls_of_forward_itself_are_seen():
    """Detectors call the forward of a head past its hooks; what does not pair
    is left out."""

    class Detector(ToyNet):

        def __init__(self):
            super().__init__()
            self.bbox_head = self.conv3

        def forward(self, inputs, data_samples=None, mode='tensor'):
            x = self.conv2(self.conv1(inputs))
            y = [self.bbox_head.forward(x)]
            if mode != 'loss':
                return y
            extra = self.bbox_head(x[:, :, ::2])
            return dict(loss=y[0].mean() + extra.mean())

    torch.manual_seed(0)
    net = BasisModel(Detector(), distillation=True).eval()
    net.distillation.take(net.architecture, None)
    net.conv2.weight.data += .01
    losses = net(torch.rand(2, 3, 8, 8), mode='loss')
    assert losses['loss_distill_bbox_head'] > 0
    assert net.distillation.task_weight == 1
    assert 'forward' not in vars(net.bbox_head)


@pytest.mark.parametrize('terms, message', [
    ([dict(module='nothing', type='mse')], "no module 'nothing', nor"),
    ([dict(module='fc', type='mae')], "must be 'kl' or 'mse'"),
    ([dict(module='fc', type='mse', temperature=2.)], 'term of distillation'),
    (None, 'no head.fc, neck'),
])
def test_bad_terms(dense, terms, message):
    with pytest.raises(ValueError, match=message):
        model(dense, terms=terms)


def test_forward_of_the_instance_s_own_stays(dense, batch):
    """As activation checkpointing sets it; and a layer of two names is
    compared under both."""
    net = ToyNet()
    net.load_state_dict(torch.load(dense)['state_dict'])
    net.alias = net.conv2
    calls = []
    original = net.conv2.forward

    def forward(x):
        calls.append(1)
        return original(x)

    net.conv2.forward = forward
    terms = [dict(module='conv2|alias', type='mse'), TERMS[0]]
    wrapper = BasisModel(net, distillation=dict(terms=terms))
    wrapper.distillation.take(net, None)
    wrapper.fc.weight.data *= 2
    for count in (1, 2):
        losses = wrapper.eval()(*batch, mode='loss')
        assert losses['loss_distill_fc'] > 0
        assert net.conv2.forward is forward
        assert len(calls) >= count
    assert 'forward' not in vars(net.fc)
    with pytest.raises(RuntimeError, match='size of tensor|channels'):
        wrapper(batch[0][:, :2], batch[1], mode='loss')
    assert net.conv2.forward is forward and 'forward' not in vars(net.fc)


# ------------------------------------------------- what a step costs


class Counting(ToyNet):
    """Notes how it is called. In mode ``'loss'`` its outputs may be in other
    units, or depend on its samples."""
    units, samples = 1., False

    def forward(self, inputs, data_samples=None, mode='tensor'):
        self.calls = [*vars(self).get('calls', []), (mode, data_samples)]
        if mode == 'loss':
            inputs = inputs * self.units
        if self.samples:
            inputs = inputs + data_samples.view(-1, 1, 1, 1)
        return super().forward(inputs, data_samples, mode)


def taught(dense, **attributes):
    """A model that differs from its teacher."""
    torch.manual_seed(0)
    net = Counting()
    net.load_state_dict(torch.load(dense)['state_dict'])
    vars(net).update(attributes)
    wrapper = BasisModel(net, distillation=dict(terms=TERMS))
    wrapper.distillation.take(net, None)
    wrapper.conv1.weight.data *= 1.1
    return wrapper.eval()


@pytest.mark.parametrize('own', [dict(units=2.), dict(samples=True)],
                         ids=['units', 'samples'])
def test_teacher_goes_the_way_of_the_student(dense, batch, own):
    wrapper = taught(dense, **own)
    teacher = wrapper.distillation.teacher
    for _ in range(2):
        losses = wrapper(*batch, mode='loss')
    assert teacher.calls[-1][0] == 'loss'
    with torch.no_grad():
        features = [
            net.conv2(torch.relu(net.bn1(net.conv1(
                batch[0] * own.get('units', 1) + bool(own.get('samples')) *
                batch[1].view(-1, 1, 1, 1)))))
            for net in (wrapper.architecture, teacher)
        ]
    torch.testing.assert_close(losses['loss_distill_conv2'],
                               .5 * normalized_mse(*features))


def test_autocast_converts_the_teacher_once(dense, batch):
    wrapper = taught(dense)
    teacher = wrapper.distillation.teacher
    before = copy.deepcopy(teacher.state_dict())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        wrapper(*batch, mode='loss')
        assert teacher.conv1.weight.dtype == torch.bfloat16
        assert teacher.bn1.weight.dtype == torch.float32
        weight = teacher.conv1.weight.data
        losses = wrapper(*batch, mode='loss')
        assert teacher.conv1.weight.data.data_ptr() == weight.data_ptr()
        # what autocast itself would make of it
        plain = Counting().eval()
        plain.load_state_dict(before)
        with torch.no_grad():
            expected = kl_divergence(
                wrapper.architecture(batch[0]).float(),
                plain(batch[0]).float(), 4.)
    torch.testing.assert_close(losses['loss_distill_fc'], .7 * expected)
    wrapper(*batch, mode='loss')
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]) and (
            value.dtype == before[key].dtype)


def test_compiled_step_is_the_step(dense, batch):
    """``compile=`` of MMEngine: the same numbers, from a few graphs that are
    compiled once."""
    from torch._dynamo.utils import counters
    results = []
    for backend in (None, 'aot_eager'):
        torch._dynamo.reset()
        counters.clear()
        net = ToyNet()
        net.load_state_dict(torch.load(dense)['state_dict'])
        wrapper = BasisModel(
            net,
            planner=dict(type='FixedPlanner', ranks={'conv[12]': 6}),
            distillation=dict(checkpoint=dense, terms=TERMS),
            orthogonality=dict(weight=.1))
        wrapper.has_weights = True
        data = dict(inputs=batch[0], data_samples=batch[1])
        wrapper.compress([data])
        optim = OptimWrapper(torch.optim.SGD(wrapper.parameters(), lr=.01))
        if backend is not None:
            wrapper.train_step = torch.compile(
                wrapper.train_step, backend=backend)
        graphs = []
        for _ in range(4):
            losses = wrapper.train().train_step(data, optim)
            graphs.append(counters['stats']['unique_graphs'])
        results.append((losses, [*wrapper.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    # the teacher's two ways, the student, distances, penalty and a few ends
    assert 4 <= graphs[1] <= 16
    assert graphs[1] == graphs[3], 'it is compiled again in later steps'
