# Copyright (c) mmbasis authors. All rights reserved.
import dataclasses
from collections import OrderedDict
from typing import List, NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import (
    BaseDataPreprocessor,
    BaseModel,
    MMDistributedDataParallel,
)

from mmbasis.registry import ADAPTERS
from mmbasis.running import (
    Adapter,
    CannotRunError,
    MMEngineAdapter,
    UnknownLossError,
    adapter_of,
    evaluation,
    model_complexity,
    tensors,
)
from tests.toy import ToyNet

X = torch.rand(4, 3, 8, 8)
LABELS = torch.tensor([0, 1, 2, 3])


def predict(model, data):
    adapter = adapter_of(model)
    with evaluation(adapter.model):
        return adapter.predict(data)


class Plain(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


# ------------------------------------------------------------ plain modules
class Two(Plain):

    def forward(self, a, b, scale=1.):
        return super().forward(a + b) * scale


class Keywords(Plain):

    def forward(self, *, x, scale=2.):
        return super().forward(x) * scale


class WholeDict(Plain):

    def forward(self, batch):
        return super().forward(batch['image'])


class Anything(Plain):

    def forward(self, x, **kwargs):
        assert set(kwargs) == {'extra'}
        return super().forward(x)


class OfImages(Plain):

    def forward(self, images: List[torch.Tensor], targets=None):
        assert targets is None
        return torch.cat([super(OfImages, self).forward(x[None])
                          for x in images])


IMAGES = [X[0], X[1, :, :6]]


@pytest.mark.parametrize('model, data, scale', [
    (Plain, X, 1),
    (Plain, (X, LABELS), 1),
    (Plain, [X, LABELS], 1),
    (Two, (X, X), 1),
    (Two, [X, X, LABELS], 1),
    (Two, dict(b=X, a=X, labels=LABELS), 1),
    (Two, dict(b=X, a=X, scale=3.), 3),
    (Keywords, dict(x=X), 2),
    (Keywords, dict(x=X, scale=1., labels=LABELS), 1),
    (WholeDict, dict(image=X, labels=LABELS), 1),
    (Anything, dict(x=X, extra=1), 1),
],
                         ids=lambda x: getattr(x, '__name__', None))
def test_what_of_a_batch_a_plain_module_gets(model, data, scale):
    torch.manual_seed(0)
    model = model()
    x = 2 * X if isinstance(model, Two) else X
    expected = Plain.forward(model, x) * scale
    torch.testing.assert_close(predict(model, data), expected)
    assert adapter_of(model).count_images(data) == 4
    assert model_complexity(model, data)['macs'] == 4 * 36 * 5 * 27


@pytest.mark.parametrize('data', [IMAGES, (IMAGES, [dict(), dict()])],
                         ids=['images', 'with targets'])
def test_list_of_images_of_different_sizes(data):
    assert predict(OfImages(), data).shape == (2, 5)


def test_a_batch_that_lacks_an_argument_is_named():
    with pytest.raises(TypeError, match='Two.forward requires a, b, but a '
                       'batch has 1 entries'):
        predict(Two(), [X])
    with pytest.raises(TypeError, match='requires a, b, .* has a, c'):
        predict(Two(), dict(a=X, c=X))


@dataclasses.dataclass
class Outputs:
    logits: torch.Tensor
    hidden: tuple = ()


class Named(NamedTuple):
    logits: torch.Tensor


@pytest.mark.parametrize('wrap', [
    lambda x: x,
    lambda x: [x],
    lambda x: dict(logits=x, mask=x > 0),
    lambda x: OrderedDict(logits=x, aux=[x, x]),
    lambda x: Outputs(x, (x, )),
    lambda x: Named(x),
],
                         ids=[
                             'tensor', 'list', 'dict', 'ordered dict',
                             'dataclass', 'named tuple'
                         ])
def test_outputs_in_any_form(wrap):

    class Model(Plain):

        def forward(self, x):
            return wrap(super().forward(x))

    torch.manual_seed(0)
    model = Model()
    adapter, expected = adapter_of(model), Plain.forward(model, X)
    outputs = adapter.outputs(X)
    assert outputs and all(x.is_floating_point() for x in outputs)
    assert all(torch.equal(x, expected) for x in outputs)
    logits = adapter.logits(X)
    assert torch.equal(logits, expected) and logits.requires_grad
    loss = adapter.loss((X, LABELS))
    torch.testing.assert_close(loss, F.cross_entropy(expected, LABELS))


def test_loss_among_the_outputs():

    class Model(Plain):

        def forward(self, x, labels=None):
            out = super().forward(x)
            return dict(loss=F.mse_loss(out, labels), out=out[..., None])

    model, target = Model(), torch.rand(4, 5)
    loss = adapter_of(model).loss(dict(x=X, labels=target))
    assert torch.equal(loss, F.mse_loss(Plain.forward(model, X), target))
    assert adapter_of(model).logits(dict(x=X, labels=target)) is None


@pytest.mark.parametrize('data', [X, (X, torch.rand(4, 5))])
def test_unknown_loss(data):
    with pytest.raises(UnknownLossError, match='mmbasis.registry.ADAPTERS'):
        adapter_of(Plain()).loss(data)


def test_tensors_skip_what_is_none():
    x, y = torch.rand(2), torch.rand(3)
    found = list(tensors(dict(a=[x, None, 'x', (y, )], b=Outputs(x), c=X)))
    assert all(a is b for a, b in zip(found, [x, y, x, X]))
    assert len(found) == 4


def test_precision_of_the_model():
    model = Plain().double()
    assert predict(model, X).dtype == torch.float64
    model = ToyNet().double()
    data = dict(inputs=X, data_samples=LABELS)
    assert adapter_of(model).outputs(data)[0].dtype == torch.float64


def test_device_of_a_model_that_was_moved_past_mmengine():
    """As part of another model: MMEngine does not know of it."""
    model = ToyNet()
    holder = nn.ModuleList([model])
    holder.to('meta')
    batch = adapter_of(model).prepare(dict(inputs=X, data_samples=LABELS))
    assert batch.kwargs['inputs'].device.type == 'meta'


@pytest.mark.parametrize('model, data', [
    (Plain, X),
    (Two, (X, X)),
    (ToyNet, dict(inputs=X, data_samples=LABELS)),
])
def test_inputs_take_gradients(model, data):
    adapter = adapter_of(model())
    batch = adapter.prepare(data, gradients=True)
    leaves = [x for x in tensors((batch.args, batch.kwargs))
              if x.is_floating_point()]
    assert all(x.is_leaf and x.requires_grad for x in leaves)
    assert not X.requires_grad
    adapter.logits(batch).sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in leaves)
    assert adapter.count_images(batch) == 4
    again = adapter.prepare(batch)
    assert all(a is b for a, b in zip(
        tensors((again.args, again.kwargs)),
        tensors((batch.args, batch.kwargs))))


# -------------------------------------------------------- MMEngine's models
class Tutorial(BaseModel):
    """Of MMEngine's "15 minutes to get started", with a smaller net."""

    def __init__(self):
        super().__init__()
        self.net = Plain()

    def forward(self, imgs, labels, mode):
        x = self.net(imgs)
        if mode == 'loss':
            return {'loss': F.cross_entropy(x, labels)}
        elif mode == 'predict':
            return x, labels


@pytest.mark.parametrize('data', [(X, LABELS), [X, LABELS],
                                  dict(imgs=X, labels=LABELS)])
def test_mmengine_model_of_a_tuple(data):
    model = Tutorial()
    adapter, expected = adapter_of(model), model.net(X)
    assert isinstance(adapter, MMEngineAdapter)
    assert torch.equal(predict(adapter, data)[0], expected)
    outputs = adapter.outputs(data)
    assert len(outputs) == 1 and torch.equal(outputs[0], expected)
    assert adapter.logits(data) is None
    assert torch.equal(adapter.loss(data), F.cross_entropy(expected, LABELS))
    assert adapter.count_images(data) == 4
    assert model_complexity(model, data)['macs'] == 4 * 36 * 5 * 27


def refusing(refused, error):
    """A model that refuses a mode."""

    class Model(ToyNet):
        calls = []

        def forward(self, inputs, data_samples=None, mode='tensor'):
            self.calls.append(mode)
            if mode in refused:
                if error is not None:
                    raise error
                return None
            return super().forward(inputs, data_samples, mode)

    Model.calls = []
    return Model()


REFUSALS = dict(
    not_implemented=NotImplementedError('nothing here'),
    invalid=RuntimeError('Invalid mode "tensor". Only supports predict'),
    value=ValueError('mode must be loss or predict, not tensor'),
    none=None)


@pytest.mark.parametrize('error', REFUSALS.values(), ids=REFUSALS)
def test_a_refused_mode_is_asked_for_once(error):
    model = refusing(('tensor', ), error)
    adapter = adapter_of(model)
    data = dict(inputs=X, data_samples=LABELS)
    for _ in range(3):
        assert adapter.outputs(data) == []  # labels are no outputs
    assert model.calls == ['tensor'] + 3 * ['predict']


ERRORS = dict(
    shape=RuntimeError('The size of tensor a (3) must match the size of '
                       'tensor b (4)'),
    kernel=NotImplementedError("Could not run 'nms' from the 'CUDA' backend"),
    key=KeyError('mode tensor'),
    type=TypeError('no mode tensor'),
    assertion=AssertionError('mode tensor'))


@pytest.mark.parametrize('error', ERRORS.values(), ids=ERRORS)
def test_errors_of_the_model_are_no_refusals(error):
    model = refusing(('tensor', ), error)
    with pytest.raises(type(error)) as info:
        adapter_of(model).outputs(dict(inputs=X, data_samples=LABELS))
    assert info.value is error


def test_errors_within_torch_are_no_refusals():

    class Model(ToyNet):

        def forward(self, inputs, data_samples=None, mode='tensor'):
            if mode == 'tensor':  # raises NotImplementedError
                return F.interpolate(inputs[0], 9, mode='bilinear')
            return super().forward(inputs, data_samples, mode)

    with pytest.raises(NotImplementedError, match='bilinear'):
        adapter_of(Model()).outputs(dict(inputs=X, data_samples=LABELS))


def test_no_way_at_all():
    """The error says what was tried, and what to do."""
    model = refusing(('tensor', 'predict', 'loss'), NotImplementedError('no'))
    with pytest.raises(CannotRunError) as info:
        predict(model, dict(inputs=X, data_samples=LABELS))
    for text in ('predict (NotImplementedError: no)', 'loss (Not',
                 'tensor (Not', 'mmbasis.registry.ADAPTERS', 'predict()'):
        assert text in str(info.value)
    with pytest.raises(UnknownLossError, match=r'loss\(\) in.*ADAPTERS'):
        adapter_of(model).loss(dict(inputs=X, data_samples=LABELS))


class Gan(BaseModel):
    """As in MMEngine's tutorial: its training is its own."""

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.ConvTranspose2d(3, 6, 2), nn.ReLU())
        self.discriminator = Plain()

    def forward(self, inputs, data_samples=None, mode=None):
        return self.generator(inputs)

    def train_step(self, data, optim_wrapper):
        raise AssertionError('not to be called')


class GanWithoutMode(Gan):

    def forward(self, inputs, data_samples=None):
        return self.generator(inputs)


@pytest.mark.parametrize('cls', [Gan, GanWithoutMode])
def test_model_with_a_training_step_of_its_own(cls):
    model = cls()
    data = dict(inputs=X, data_samples=LABELS)
    expected = model.generator(X)
    assert torch.equal(predict(model, data), expected)
    outputs = adapter_of(model).outputs(data)
    assert len(outputs) == 1 and torch.equal(outputs[0], expected)
    with pytest.raises(UnknownLossError, match='ADAPTERS'):
        adapter_of(model).loss(data)


def test_own_test_step():
    """What a model does in testing is what its test_step does."""

    class Model(ToyNet):

        def test_step(self, data):
            return self.conv2(self.conv1(data['image']))

    assert predict(Model(), dict(image=X)).shape == (4, 16, 8, 8)


@pytest.mark.parametrize('cls', [Plain, Two])
def test_module_that_is_tested_by_steps(cls):
    model = Plain()
    model.__class__ = type('Stepping', (cls, ), {})
    model.test_step = lambda data: Plain.forward(model, data['picture'])
    assert predict(model, dict(picture=X)).shape == (4, 5)
    assert adapter_of(model).outputs(dict(picture=X))[0].shape == (4, 5)


def test_batches_that_are_unlike():
    """A smaller last batch, images of different sizes, other keys."""

    class Model(ToyNet):

        def forward(self, inputs, data_samples=None, mode='tensor',
                    extra=None):
            images = inputs if isinstance(inputs, list) else [inputs]
            return torch.cat([
                super(Model, self).forward(x if x.dim() == 4 else x[None])
                for x in images
            ])

    adapter = adapter_of(Model())
    for data, count in ((dict(inputs=X, data_samples=LABELS), 4),
                        (dict(inputs=X[:1]), 1), (dict(inputs=IMAGES), 2),
                        (dict(inputs=X, extra=1), 4)):
        assert len(adapter.predict(data)) == count
        assert adapter.count_images(data) == count


class Preprocessor(BaseDataPreprocessor):

    def forward(self, data, training=False):
        return dict(inputs=data['img'].float() / 2)


def test_preprocessor_is_used():
    model = ToyNet(data_preprocessor=Preprocessor()).eval()
    byte = torch.arange(4 * 192).view(4, 3, 8, 8).byte()
    found = adapter_of(model).outputs(dict(img=byte))[0]
    assert torch.equal(found, model(byte.float() / 2))


# ----------------------------------------------------------------- registry
def test_wrappers_are_looked_into():
    model = ToyNet()
    adapter = adapter_of(nn.DataParallel(model))
    assert adapter.model is model and isinstance(adapter, MMEngineAdapter)
    assert adapter_of(adapter) is adapter
    wrapper = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    assert adapter_of(wrapper).model is model
    assert type(adapter_of(Plain())) is Adapter


@pytest.fixture
def registered():
    """Forgets what a test registers."""
    before = dict(ADAPTERS.module_dict)
    yield
    ADAPTERS.module_dict.clear()
    ADAPTERS.module_dict.update(before)


class Captioner(nn.Module):
    """Has neither forward() nor a mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def infer(self, image):
        return self.conv(image)


def test_a_way_of_a_user(registered):
    """A new way to run a model comes from a user's own package."""

    @ADAPTERS.register_module()
    class General(Adapter):

        @classmethod
        def handles(cls, model):
            return hasattr(model, 'infer')

    @ADAPTERS.register_module()
    class OfCaptioner(Adapter):

        @classmethod
        def handles(cls, model):
            return isinstance(model, Captioner)

        def predict(self, data):
            return self.model.infer(data['image'])

        def loss(self, data):
            return (self.predict(data) - data['target']).square().mean()

    model = Captioner()
    data = dict(image=X, target=0.)
    adapter = adapter_of(model)
    assert type(adapter) is OfCaptioner  # the last one
    expected = model.conv(X)
    assert torch.equal(adapter.predict(data), expected)
    assert torch.equal(adapter.outputs(data)[0], expected)
    assert torch.equal(adapter.loss(data), expected.square().mean())
    assert adapter.count_images(data) == 4
    assert isinstance(adapter_of(ToyNet()), MMEngineAdapter)
