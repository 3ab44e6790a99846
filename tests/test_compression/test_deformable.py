# Copyright (c) mmbasis authors. All rights reserved.
"""Models with deformable convolutions, in all forms of a basis."""
import copy

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.ops import DeformConv2d, DeformConv2dPack, ModulatedDeformConv2dPack
from mmengine.optim import OptimWrapper

from mmbasis import compress
from mmbasis.compression import (
    apply_plan,
    basis_layers,
    get_plan,
    load_weights,
    plan_of,
    read_checkpoint,
    save_checkpoint,
)
from mmbasis.compression.surgery import densified
from mmbasis.factorization import merge, spectrum_of_input
from mmbasis.layers import DeformConvKind
from mmbasis.optim import carry_over
from mmbasis.planning import BudgetPlanner, Ranks
from mmbasis.planning.planners import FixedPlanner
from mmbasis.running import model_complexity
from mmbasis.running.adapter import sampled_labels
from tests.analyses import measured

FORMS = ['output', 'input', 'both']
each_form = pytest.mark.parametrize('form', FORMS)


class Net(nn.Module):
    """One of each class; ``mixed`` samples in four ways by group."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.v1 = DeformConv2dPack(16, 16, 3, padding=1)
        self.v2 = ModulatedDeformConv2dPack(
            16, 16, 3, padding=1, stride=2, groups=2, deform_groups=2)
        self.mixed = DeformConv2dPack(16, 16, 3, padding=1, deform_groups=4)
        self.offset = nn.Conv2d(16, 18, 1)
        self.plain = DeformConv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)
        for module in (self.v1, self.v2, self.mixed):
            nn.init.normal_(module.conv_offset.weight, std=.2)
            nn.init.normal_(module.conv_offset.bias, std=.5)

    def forward(self, x):
        return self.behind(self.v1(self.stem(x).relu()))

    def behind(self, x):
        x = self.mixed(self.v2(x.relu()).relu()).relu()
        x = self.plain(offset=self.offset(x), x=x).relu()
        return self.head(x.mean((2, 3)))


LAYERS = 'v1', 'v2', 'mixed', 'plain'


class FormPlanner(FixedPlanner):
    """Most of the ranks of a form, where a layer can have it."""

    def __init__(self, form, share=.75):
        super().__init__(dict.fromkeys(LAYERS, 2))
        self.form, self.share, self.forms = form, share, tuple(FORMS)

    def choose(self, free, decided):
        found = []
        for x in (x.layer for x in free):
            rank, inputs = (int(n * self.share)
                            for n in (x.full_rank, x.in_channels))
            if self.form == 'output' or not x.narrowable:
                inputs = None
            elif self.form == 'input':
                rank = None
            found.append(Ranks(rank, inputs))
        return found


def images(count=16):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, 8, 8, generator=generator)


def network():
    torch.manual_seed(0)
    return Net().eval()


def error(model, reference):
    with torch.no_grad():
        wrong = model(images()) - reference(images())
    return float(wrong.norm() / reference(images()).norm())


@pytest.mark.parametrize('forms', [*([form] for form in FORMS), FORMS])
def test_budget_is_kept_and_counted(forms):
    model, reference = network(), network()
    plan = compress(model, BudgetPlanner(macs=.6, forms=forms), [images()])
    totals = plan.totals()['macs']
    assert .85 * .6 < totals['after'] / totals['before'] <= .6
    for name in set(LAYERS) & set(plan.layers):
        if name != 'mixed' or forms == ['output']:
            assert plan.layers[name].form in forms
    if 'output' not in forms:
        assert plan.dense['mixed'].reason.startswith(
            'no input basis: its 4 deformable groups')
    counted, dense = (model_complexity(x, images(1))['macs']
                      for x in (model, reference))
    assert dense - counted == totals['before'] - totals['after']


def test_a_choice_that_mixes_deformable_groups_is_an_error():
    class Wrong(FormPlanner):

        def choose(self, free, decided):
            return [Ranks(3, 3) for _ in free]

    with pytest.raises(ValueError, match='mixed, a DeformConv2dPack, can have '
                       'no input basis: its 4 deformable groups'):
        Wrong('both').plan(measured(network(), [images()]))


@each_form
@pytest.mark.parametrize('reconstruction', ['local', 'sequential'])
def test_full_rank_is_the_same_function(form, reconstruction):
    reference = network()
    model = copy.deepcopy(reference)
    planner = FormPlanner(form, 1.)
    planner.cost = FixedPlanner({'.*': 1}, allow_costlier=True).cost
    plan = compress(model, planner, [images()], reconstruction=reconstruction)
    assert {plan.layers[x].form for x in ('v1', 'v2', 'plain')} == {form}
    assert error(model, reference) < 1e-3


@each_form
def test_reconstruction_fits_layers(form):
    """Layers behind others make up for their errors."""
    reference, errors = network(), {}
    for way in ('local', 'sequential'):
        model = copy.deepcopy(reference)
        compress(model, FormPlanner(form, .5), [images(32)],
                 reconstruction=way)
        errors[way] = error(model, reference)
        for name in ('v1', 'v2'):
            layer, dense = (getattr(x, name) for x in (model, reference))
            assert torch.equal(layer.basis.conv_offset.weight,
                               dense.conv_offset.weight)
    assert errors['sequential'] < .8 * errors['local']


@each_form
def test_checkpoint_and_dense_model(form, tmp_path):
    model, path = network(), str(tmp_path / 'c.pth')
    compress(model, FormPlanner(form), [images()])
    save_checkpoint(model, get_plan(model), path, {})
    again, checkpoint = Net().eval(), read_checkpoint(path)
    apply_plan(again, plan_of(checkpoint), project=False)
    load_weights(again, checkpoint, path)
    assert torch.equal(again(images()), model(images()))

    model = network()  # bias is what the first version cannot hold
    compress(model, FormPlanner(form), [images()], reconstruction='local')
    for _, layer in basis_layers(model):
        if not layer.kind.can_have_bias(layer.basis):
            nn.init.zeros_(layer.last.bias)
            layer.last.bias = None
    torch.testing.assert_close(
        densified(model)(images()), model(images()), rtol=1e-3, atol=1e-5)


def test_gradient_of_what_the_input_basis_changes():
    """What the loss feels of the input by way of the offsets does not count:
    these are made of the dense input."""
    model = network()
    known = measured(model, [images()], loss=True).statistics['v1']
    x = model.stem(images()).relu().detach()
    seen = x.clone().requires_grad_()
    logits = model.behind(DeformConvKind.run_behind(model.v1, x, seen))
    loss = F.cross_entropy(logits, sampled_labels(logits, 0), reduction='sum')
    gradient, = torch.autograd.grad(loss, seen)
    gradient = gradient.transpose(0, 1).flatten(1).double()
    matrix = DeformConvKind.to_matrix(model.v1).detach()
    expected = spectrum_of_input(matrix, 16, known.input_covariance,
                                 (gradient @ gradient.mT).unsqueeze(0))
    torch.testing.assert_close(
        known.inputs.shares, expected.shares, rtol=1e-3, atol=1e-6)


@each_form
def test_state_of_the_optimizer_goes_along(form):
    """That of the offset branch as it was, that of the factors as that of a
    gradient of the dense weights."""
    before = network()
    wrapper = OptimWrapper(torch.optim.SGD(before.parameters(), .1, .9))
    before(images()).square().sum().backward()
    wrapper.optimizer.step()
    after = copy.deepcopy(before)
    compress(after, FormPlanner(form), [images()], reconstruction='local')
    new = OptimWrapper(torch.optim.SGD(after.parameters(), .1, .9))
    carry_over(before, wrapper, after, new)
    for name in ('v1', 'v2'):
        layer, dense = (getattr(x, name) for x in (after, before))
        product = layer.kind.from_matrix(merge(*layer.factors), dense)
        by_factor = torch.autograd.grad(
            product, layer.weights, dense.weight.grad)
        for key, parameter in layer.basis.conv_offset.named_parameters():
            torch.testing.assert_close(
                new.optimizer.state[parameter]['momentum_buffer'],
                dense.conv_offset.get_parameter(key).grad)
        for weight, gradient in zip(layer.weights, by_factor):
            torch.testing.assert_close(
                new.optimizer.state[weight]['momentum_buffer'], gradient)
