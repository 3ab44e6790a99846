# Copyright (c) mmbasis authors. All rights reserved.
"""Compression of models that are run in other ways than MMEngine's usual
ones."""
import copy
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope
from mmpretrain.structures import DataSample

import mmbasis
from mmbasis.compression import basis_layers, get_plan, output_error
from mmbasis.running import Adapter, adapter_of

# an error where no loss is known
BUDGET = dict(type='BudgetPlanner', macs=.5, loss_aware=True)


class Plain(nn.Module):
    """Two images in, from which one prediction is made."""

    def __init__(self):
        super().__init__()
        self.left = nn.Conv2d(3, 16, 3, padding=1)
        self.right = nn.Conv2d(3, 16, 3, padding=1)
        self.join = nn.Conv2d(16, 24, 3, stride=2)
        self.fc = nn.Linear(24, 5)

    def forward(self, first, second):
        x = (self.left(first) + self.right(second)).relu()
        return self.fc(self.join(x).relu().mean((2, 3)))


class OneInput(Plain):

    def forward(self, x):
        return super().forward(x, x.flip(-1))


class Dictionary(Plain):

    def forward(self, batch):
        return dict(logits=super().forward(batch['first'], batch['second']))


class Options(Plain):

    def forward(self, first, second, scale=1., **kwargs):
        return [scale * super().forward(first, second)]


class Loss(Plain):
    """Returns its loss, and no logits."""

    def forward(self, first, second, labels):
        y = super().forward(first, second)
        return dict(loss=F.cross_entropy(y, labels), maps=y[..., None, None])


def images(size, seed):
    generator = torch.Generator().manual_seed(seed)
    # with colours: predictions of noise alone would hardly differ
    first, second = (torch.randn(2, size, 3, 9, 9, generator=generator)
                     + 2 * torch.randn(2, size, 3, 1, 1, generator=generator))
    return first, second, torch.arange(size) % 5


#: what a batch of images and labels is given as
WAYS = {
    'tensor': (OneInput, lambda a, b, y: a),
    'tuple': (OneInput, lambda a, b, y: (a, y)),
    'list': (OneInput, lambda a, b, y: [a, y]),
    'two inputs': (Plain, lambda a, b, y: (a, b)),
    'two inputs and a target': (Plain, lambda a, b, y: (a, b, y)),
    'keywords': (Plain, lambda a, b, y: dict(second=b, first=a, labels=y)),
    'whole dict': (Dictionary, lambda a, b, y: dict(first=a, second=b)),
    'options': (Options, lambda a, b, y: dict(first=a, second=b, scale=2.)),
    'loss': (Loss, lambda a, b, y: dict(first=a, second=b, labels=y)),
}


def check_compressed(model, data, held_out, worst, **recipe):
    """Compress to half the MACs, with everything that looks at data; outputs
    stay near those of the dense model. The plan."""
    dense = copy.deepcopy(model)
    plan = mmbasis.compress(model, BUDGET, [*data, held_out], len(data),
                            **recipe)
    totals = plan.totals()['macs']
    assert .3 < totals['after'] / totals['before'] <= .5
    assert dict(basis_layers(model)).keys() == plan.layers.keys() != set()
    assert get_plan(model) is plan
    truncated = copy.deepcopy(dense)
    ranks = {name: 1 for name in plan.layers}
    mmbasis.compress(
        truncated, dict(type='FixedPlanner', ranks=ranks), data,
        reconstruction='local', recalibration=False)
    error = output_error(model, dense, [held_out])
    assert 0 < error < worst * output_error(truncated, dense, [held_out])
    return plan


@pytest.mark.parametrize('way', WAYS)
def test_plain_modules(way):
    """Batches are unlike: the last one is smaller. The random classifier sees
    too little to be fitted, so that a shift of its inputs stays."""
    cls, give = WAYS[way]
    torch.manual_seed(0)
    model = cls()
    data = [give(*images(size, i)) for i, size in enumerate((16, 16, 3))]
    plan = check_compressed(model, data, give(*images(8, 9)), .3)
    assert plan.dense['fc'].reason == 'prediction layer'
    assert model.training


def test_how_a_batch_is_given_does_not_matter():
    models = []
    for way in ('two inputs', 'keywords', 'two inputs and a target'):
        cls, give = WAYS[way]
        torch.manual_seed(0)
        models.append(cls())
        mmbasis.compress(models[-1], BUDGET,
                         [give(*images(8, i)) for i in range(2)])
    x = images(4, 5)[:2]
    for other in models[1:]:
        assert torch.equal(other(*x), models[0](*x))


@pytest.fixture
def pretrain():
    init_default_scope('mmpretrain')
    yield
    init_default_scope('mmengine')


SIMCLR = dict(
    type='SimCLR',
    backbone=dict(
        type='ResNet', depth=18, stem_channels=8, base_channels=8),
    neck=dict(
        type='NonLinearNeck',
        in_channels=64,
        hid_channels=16,
        out_channels=8,
        with_avg_pool=True),
    head=dict(type='ContrastiveHead', loss=dict(type='CrossEntropyLoss')))
MAE = dict(
    type='MAE',
    backbone=dict(
        type='MAEViT',
        arch=dict(
            embed_dims=24,
            num_layers=2,
            num_heads=2,
            feedforward_channels=48),
        img_size=32,
        patch_size=8),
    neck=dict(
        type='MAEPretrainDecoder',
        num_patches=16,
        patch_size=8,
        embed_dim=24,
        decoder_embed_dim=16,
        decoder_depth=1,
        decoder_num_heads=2),
    head=dict(
        type='MAEPretrainHead',
        patch_size=8,
        loss=dict(type='PixelReconstructionLoss', criterion='L2')))


@pytest.mark.parametrize('config, views', [(SIMCLR, 2), (MAE, 1)],
                         ids=['simclr', 'mae'])
def test_self_supervised_models(pretrain, config, views):
    """They have no mode predict: what they make of images is their loss."""
    torch.manual_seed(0)
    model = MODELS.build(config)
    model.init_weights()
    dense = copy.deepcopy(model)

    def batch(size, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(views, size, 3, 32, 32, generator=generator)
        return dict(
            inputs=list(x) if views > 1 else x[0],
            data_samples=[DataSample() for _ in range(size)])

    data = [batch(size, i) for i, size in enumerate((8, 8, 4))]
    plan = mmbasis.compress(model, BUDGET, [*data, batch(8, 9)], len(data))
    totals = plan.totals()['macs']
    assert totals['after'] <= .5 * totals['before']
    assert dict(basis_layers(model)).keys() == plan.layers.keys() != set()
    # what is no layer is as before: positions, queues, counters
    for name, value in dense.named_buffers():
        if 'running' not in name and 'tracked' not in name:
            assert torch.equal(value, model.get_buffer(name)), name
    loss = adapter_of(model).loss(data[0])
    loss.backward()
    for name, layer in basis_layers(model):
        assert layer.basis.weight.grad.isfinite().all(), name


USER_PACKAGE = """
import torch.nn as nn
from mmbasis.registry import ADAPTERS
from mmbasis.running import Adapter, Batch


class Segmenter(nn.Module):

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 2, 1)

    def infer(self, image):
        return self.last(self.body(self.stem(image).relu()).relu())

    def compute_loss(self, image, mask):
        return nn.functional.cross_entropy(self.infer(image), mask)


@ADAPTERS.register_module()
class SegmenterAdapter(Adapter):

    @classmethod
    def handles(cls, model):
        return isinstance(model, Segmenter)

    def bind(self, data):
        return Batch(data, kwargs=data).map(self.move)

    def predict(self, data):
        return self.model.infer(self.prepare(data).kwargs['image'])

    def loss(self, data):
        return self.model.compute_loss(**self.prepare(data).kwargs)
"""


@pytest.fixture
def user_package(tmp_path, monkeypatch):
    from mmbasis.registry import ADAPTERS
    before = dict(ADAPTERS.module_dict)
    (tmp_path / 'segmentation.py').write_text(USER_PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import segmentation
    yield segmentation
    del sys.modules['segmentation']
    ADAPTERS._module_dict.clear()
    ADAPTERS._module_dict.update(before)


def test_a_way_to_run_a_model_from_a_package_of_the_user(user_package):
    """A model that cannot be called is compressed by loss all the same."""
    torch.manual_seed(0)
    model = user_package.Segmenter()
    assert isinstance(adapter_of(model), user_package.SegmenterAdapter)

    def batch(size, seed):
        x = images(size, seed)[0]
        return dict(image=x, mask=(x.mean(1) > 0).long())

    data = [batch(8, 0), batch(8, 1), batch(3, 2)]
    # without bind() of its own it would have the batch whole
    whole, = Adapter(model).prepare(data[0]).args
    assert whole.keys() == data[0].keys()
    plan = check_compressed(model, data, batch(8, 9), .7)
    assert plan.dense['last'].reason == 'prediction layer'
