# Copyright (c) mmbasis authors. All rights reserved.
"""Steps of compression: each on the device of the model, with the results of
a CPU."""
import copy
import dataclasses
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
from mmengine.optim import OptimWrapper

import mmbasis
from mmbasis.compression import (
    Recipe,
    basis_layers,
    output_error,
    recalibrate,
    run_recipe,
    save_checkpoint,
)
from mmbasis.hooks import OrthogonalityHook, SpectrumHook
from mmbasis.models import BasisModel, load_compressed
from mmbasis.planning import CompressionPlan
from mmbasis.planning.statistics import LayerRecorder
from mmbasis.running import adapter_of, evaluation, tensors
from tests.analyses import measured
from tests.toy import ToyNet, toy_cfg

pytestmark = pytest.mark.gpu

FORMS = ['output', 'input', 'both', 'spatial']


def net_of(dense, device='cpu'):
    net = ToyNet()
    net.load_state_dict(torch.load(dense, weights_only=True)['state_dict'])
    return net.to(device)


def batches_for(device, count=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        dict(inputs=torch.rand(8, 3, size, size, generator=generator).to(
            device), data_samples=torch.arange(8, device=device) % 4)
        for _ in range(count)
    ]


def budget(macs=.5, forms=FORMS):
    return dict(type='BudgetPlanner', macs=macs, forms=forms)


def held_by(value):
    """All tensors in statistics."""
    if dataclasses.is_dataclass(value):
        value = [getattr(value, x.name) for x in dataclasses.fields(value)]
        return [x for part in value for x in held_by(part)]
    return list(tensors(value))


@contextmanager
def without_waiting(device):
    """No step waits for the GPU; nothing to see on a CPU."""
    if device.type == 'cuda':
        torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('data_aware', [True, False])
def test_statistics_and_sensitivities(dense, device, data_aware):
    found = measured(net_of(dense, device), batches_for(device), data_aware,
                     loss=True)
    wanted = measured(net_of(dense), batches_for('cpu'), data_aware,
                      loss=True)
    assert found.statistics.keys() == wanted.statistics.keys()
    for name, known in found.statistics.items():
        assert {x.device for x in held_by(known)} == {device}, name
        other = wanted.statistics[name]
        for a, b in ((known.spectrum.values, other.spectrum.values),
                     (known.sensitivity, other.sensitivity),
                     (known.gradient, other.gradient),
                     (known.inputs and known.inputs.values,
                      other.inputs and other.inputs.values),
                     (known.columns and known.columns.values,
                      other.columns and other.columns.values)):
            if b is None:
                assert a is None, name
            else:
                torch.testing.assert_close(
                    a.cpu(), b, rtol=1e-2, atol=1e-4 * float(b.abs().max()),
                    msg=name)


@pytest.mark.parametrize('size', [8, 20])
def test_statistics_wait_for_nothing(dense, device, size):
    """Layers are recorded without a look at what the GPU has computed, also
    where positions are drawn."""
    net, batches = net_of(dense, device), batches_for(device, 2, size)
    analysis = measured(net, batches)
    chosen = analysis.selection.chosen
    columns = [x for x in chosen if not x.why_not('spatial')]
    inputs = [x for x in chosen if not x.why_not('input')]
    assert columns and inputs
    adapter = adapter_of(net)
    with evaluation(net), LayerRecorder(
            analysis.layers, chosen, inputs, columns) as recorder:
        recorder.run(adapter, batches[:1])  # finds how to run it
        with without_waiting(device):
            recorder.run(adapter, batches[1:])
    for moment in recorder.moments.values():
        assert float(moment[0, -1, -1]) > 0


@pytest.mark.parametrize('reconstruction', ['local', 'sequential'])
@pytest.mark.parametrize('form', FORMS)
def test_compressed_as_on_the_cpu(dense, device, form, reconstruction):
    """The ranks of one, followed on both."""
    plan = mmbasis.compress(
        net_of(dense), budget(forms=[form]), batches_for('cpu'))
    recipe = Recipe.of(plan=plan, reconstruction=reconstruction)
    one, other = net_of(dense), net_of(dense, device)
    run_recipe(one, recipe, batches_for('cpu'), [])
    run_recipe(other, recipe, batches_for(device), [])
    assert {x.device for x in other.parameters()} == {device}
    x = batches_for('cpu')[0]['inputs']
    one.eval()
    other.eval()
    wanted = one(x)
    torch.testing.assert_close(
        other(x.to(device)).cpu(), wanted, rtol=1e-2,
        atol=1e-2 * float(wanted.abs().max()))


def test_full_rank_is_dense(dense, device):
    net = net_of(dense, device).eval()
    x = batches_for(device)[0]['inputs']
    wanted = net(x)
    planner = dict(
        type='FixedPlanner', ranks={'.*': 'full'}, allow_costlier=True,
        prediction_layers=True)
    mmbasis.compress(net, planner, batches_for(device),
                     reconstruction='local')
    assert len(dict(basis_layers(net))) == 4
    torch.testing.assert_close(net(x), wanted, rtol=1e-4, atol=1e-5)


def test_reconstruction_and_recalibration(dense, device):
    reference = net_of(dense, device)
    batches, held_out = batches_for(device, 4), batches_for(device, 5)[4:]
    errors = {}
    for how in ('local', 'sequential'):
        net = copy.deepcopy(reference)
        plan = run_recipe(
            net, Recipe.of(planner=budget(.3), reconstruction=how), batches,
            held_out)[0]
        assert plan.totals()['macs']['after'] > 0
        errors[how] = output_error(net, reference, held_out)
    assert errors['sequential'] < errors['local']
    before = net.bn1.running_mean.clone()
    recalibrate(net, batches)
    assert net.bn1.running_mean.device == device
    assert not torch.equal(net.bn1.running_mean, before)


def test_random_numbers_are_as_before(dense, device):
    net = net_of(dense, device)
    states = []
    for _ in range(2):
        states.append(torch.get_rng_state())
        if device.type == 'cuda':
            states[-1] = torch.cat([states[-1], torch.cuda.get_rng_state()])
        if len(states) == 1:
            mmbasis.compress(net, budget(), batches_for(device))
    assert torch.equal(*states)


def test_a_training_step_waits_for_nothing(dense, device):
    """With teacher and orthogonality, beyond what PyTorch and MMEngine do."""
    model = BasisModel(
        ToyNet(), dense, planner=budget(), orthogonality=dict(weight=.01),
        distillation=dict(terms=[
            dict(module='fc', type='kl'), dict(module='bn2', type='mse')]))
    model.to(device)
    model.compress(batches_for(device))
    wrapper = OptimWrapper(
        torch.optim.SGD(model.parameters(), .01, momentum=.9))
    data = batches_for(device)[0]

    def step():
        losses = model(**data, mode='loss')
        wrapper.update_params(sum(losses.values()))
        return losses

    first = step()  # the teacher is adapted, state of the optimizer is made
    with without_waiting(device):
        step()
    assert 'loss_orthogonality' in first and len(first) == 4
    assert model.distillation.teacher.fc.weight.device == device


def test_retraction_and_spectra(dense, device):
    net = net_of(dense, device)
    mmbasis.compress(net, budget(), batches_for(device))
    with torch.no_grad():
        for _, layer in basis_layers(net):
            for weight in layer.weights:
                weight.mul_(1.5)
    x = batches_for(device)[0]['inputs']
    before = net.eval()(x)
    runner = Mock(model=net)
    OrthogonalityHook().act(runner, 1)
    torch.testing.assert_close(net(x), before, rtol=1e-3, atol=1e-4)
    SpectrumHook().act(runner, 1)
    scalars = runner.visualizer.add_scalars.call_args[0][0]
    assert scalars['orthogonality/max'] < 1e-5


def test_checkpoint_goes_anywhere(tmp_path, dense, device):
    """What a GPU wrote is loaded by a CPU, and the other way round."""
    net = net_of(dense, device)
    plan = mmbasis.compress(net, budget(), batches_for(device))
    path = str(tmp_path / 'compressed.pth')
    save_checkpoint(net, plan, path, {})
    content = torch.load(path, weights_only=True)
    assert {x.device.type for x in content['state_dict'].values()} == {'cpu'}
    cfg = toy_cfg(tmp_path, None)
    x = batches_for('cpu')[0]['inputs']
    wanted = net.eval()(x.to(device)).cpu()
    for place in ('cpu', device):
        loaded = load_compressed(cfg, path, device=place)
        torch.testing.assert_close(
            loaded(x.to(place)).cpu(), wanted, rtol=1e-3, atol=1e-4)


def test_plan_is_plain(dense, device):
    """No tensor of a GPU is left in what is written as JSON."""
    net = net_of(dense, device)
    plan = mmbasis.compress(net, budget(), batches_for(device))
    again = CompressionPlan.from_dict(plan.to_dict())
    assert again.structure == plan.structure


@pytest.mark.parametrize('channels', [512])
def test_memory_of_a_large_layer(device, channels):
    """Statistics take what docs/gpu.md says: the card is not exhausted."""
    small = device.type == 'cpu'
    channels = 32 if small else channels
    conv = torch.nn.Sequential(
        torch.nn.Conv2d(channels, channels, 3, padding=1),
        torch.nn.Conv2d(channels, channels, 3, padding=1)).to(device)
    batches = [torch.rand(2, channels, 14, 14, device=device)]
    if not small:
        torch.cuda.reset_peak_memory_stats()
    analysis = measured(conv, batches)
    kept = sum(x.numel() * x.element_size()
               for known in analysis.statistics.values()
               for x in held_by(known))
    # outputs, inputs and columns of 8 bytes: see docs/gpu.md
    each = 8 * channels**2 * (1 + 3 + 3 * 9)
    assert kept <= 1.05 * 2 * each + 1e5
    if not small:
        assert torch.cuda.max_memory_allocated() < 6 * 2 * each + 2**30
