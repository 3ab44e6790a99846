# Copyright (c) mmbasis authors. All rights reserved.
"""Steps on a device that is emulated, wherever the tests run: tensors of the
CPU beside those of the model are errors, as on a GPU."""
import copy

import pytest
import torch
from mmengine.optim import OptimWrapper

from mmbasis.compression import (
    Recipe,
    basis_layers,
    output_errors,
    recalibrate_if_better,
    run_recipe,
)
from mmbasis.layers import retract
from mmbasis.models import BasisModel
from mmbasis.optim import carry_over
from tests.other_device import other_device
from tests.toy import ToyNet, dense_checkpoint

FORMS = ['output', 'input', 'both', 'spatial']


@pytest.fixture
def place():
    with other_device() as device:
        yield device


def budget(macs=.5, forms=FORMS):
    return dict(type='BudgetPlanner', macs=macs, forms=forms)


def batches_on(device, count=2, size=8):
    generator = torch.Generator().manual_seed(0)
    return [
        dict(inputs=torch.rand(8, 3, size, size, generator=generator).to(
            device), data_samples=(torch.arange(8) % 4).to(device))
        for _ in range(count)
    ]


def places_of(tensors):
    return {x.device for x in tensors}


def test_the_emulation_refuses_what_a_gpu_refuses(place):
    x = torch.rand(3, device=place)
    assert x.device == place and float(x.sum()) > 0
    assert (x + torch.tensor(1.)).device == place
    assert x.cpu().device.type == 'cpu'
    with pytest.raises(RuntimeError, match='on the same device'):
        x + torch.rand(3)
    with pytest.raises(RuntimeError, match='on the same device'):
        torch.rand(3).add_(x)


@pytest.mark.parametrize('reconstruction', ['local', 'sequential'])
@pytest.mark.parametrize('forms', [FORMS, *([x] for x in FORMS)], ids=str)
def test_compressed_as_on_the_cpu(tmp_path, place, forms, reconstruction):
    """With windows of more positions than are looked at."""
    dense = torch.load(dense_checkpoint(tmp_path / 'dense.pth'))['state_dict']
    recipe = Recipe.of(
        planner=budget(forms=forms), reconstruction=reconstruction)
    outputs, plans = [], []
    for device in ('cpu', place):
        net = ToyNet()
        net.load_state_dict(dense)
        net.to(device).eval()
        reference = copy.deepcopy(net)
        *batches, held_out = batches_on(device, 3, 17)
        plan, analysis = run_recipe(net, recipe, batches, [held_out])
        assert {x.sensitivity.device for name, x in analysis.statistics.items()
                if name in plan.layers} == {torch.device(device)}
        assert places_of(net.state_dict().values()) == {torch.device(device)}
        errors = output_errors(net, reference, [held_out])
        assert errors.device.type == 'cpu' and len(errors) == 8
        recalibrate_if_better(
            net, batches, lambda net=net, reference=reference, x=held_out:
            output_errors(net, reference, [x]))
        retract([layer for _, layer in basis_layers(net)])
        outputs.append(net(held_out['inputs']).detach().cpu())
        plans.append(plan)
    assert plans[0].structure == plans[1].structure
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('optimizer', ['SGD', 'AdamW'])
def test_fine_tuning_and_truncation(tmp_path, place, optimizer):
    """Losses of the teacher, the penalty, and state of the optimizer."""
    model = BasisModel(
        ToyNet(), dense_checkpoint(tmp_path / 'dense.pth'), planner=budget(),
        distillation=dict(terms=[
            dict(module='fc', type='kl'), dict(module='bn2', type='mse')]))
    model.to(place)
    batches = batches_on(place)
    model.compress(batches)
    options = dict(lr=.01, foreach=False)
    if optimizer == 'SGD':
        options['momentum'] = .9

    def optimizer_of(net):
        made = getattr(torch.optim, optimizer)
        return OptimWrapper(made(net.parameters(), **options))

    wrapper = optimizer_of(model)
    losses = model(**batches[0], mode='loss')
    assert len(losses) == 3
    wrapper.update_params(sum(losses.values()))
    before = model.architecture
    model.truncate(batches, Recipe.of(planner=budget(.3)))
    after = optimizer_of(model)
    carry_over(before, wrapper, model, after)
    states = after.optimizer.state
    missing = {k for k, x in model.named_parameters() if x not in states}
    assert not missing
    for weight, state in states.items():
        assert places_of(x for x in state.values() if torch.is_tensor(x)
                         and x.dim()) == {place}
        assert weight.device == place
