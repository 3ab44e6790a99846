# Copyright (c) mmbasis authors. All rights reserved.
import copy

import pytest
import torch
import torch.nn as nn

import mmbasis
from mmbasis.compression import (
    output_error,
    output_errors,
    recalibrate,
    recalibrate_if_better,
)
from mmbasis.planning import FixedPlanner


class Net(nn.Module):

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16, momentum=.3)
        self.conv2 = nn.Conv2d(16, 8, 3, bias=False)
        self.bn2 = nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.bn2(self.conv2(x)).relu().mean((2, 3))


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        1 + torch.randn(16, 3, 9, 9, generator=generator) for _ in range(count)
    ]


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net().eval()
    recalibrate(net, batches(4, seed=5))
    return net


def test_statistics_are_averages_over_the_batches(model):
    data = batches(3)
    modes = [module.training for module in model.modules()]
    recalibrate(model, data)
    y = [model.conv1(x) for x in data]
    torch.testing.assert_close(model.bn1.running_mean,
                               torch.cat(y).mean((0, 2, 3)))
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in y])
    torch.testing.assert_close(model.bn1.running_var, variances.mean(0))
    assert model.bn1.momentum == .3
    assert [module.training for module in model.modules()] == modes


def test_kept_where_truncation_is_rough(model):
    """Bases from the weights alone shift the statistics; automatic
    recalibration brings held-out outputs nearer to the dense ones."""
    planner = FixedPlanner(dict(conv1=3, conv2=2), data_aware=False)
    held_out = batches(2, seed=9)
    errors = []
    for recalibration in (False, True):
        small = copy.deepcopy(model)
        mmbasis.compress(
            small,
            planner,
            batches(3),
            reconstruction='local',
            recalibration=recalibration)
        errors.append(output_error(small, model, held_out))
    assert errors[1] < .7 * errors[0]
    rough = copy.deepcopy(model)
    mmbasis.compress(rough, planner, batches(3))
    assert recalibrate_if_better(rough, batches(3),
                                 lambda: output_errors(rough, model, held_out))
    assert output_error(rough, model, held_out) == pytest.approx(errors[1])


def test_taken_back_where_it_does_not_help(model):
    state = copy.deepcopy(model.state_dict())
    shifted = [x + 1 for x in batches(2)]
    kept = recalibrate_if_better(
        model, shifted,
        lambda: (model.bn1.running_mean - state['bn1.running_mean']).abs())
    assert not kept
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize('changes, kept', [
    ([-1., -1.1, -.9, -1.], True),
    ([-1., 1.5, -.9, -1.], False),  # on average less, but by chance
    ([1., 1., 1., 1.], False),
    ([-1.], True),  # one value, as of a single batch, says all there is
    ([], False),
])
def test_kept_where_the_change_is_beyond_chance(model, changes, kept):
    before = torch.full((len(changes), ), 3.)
    errors = iter([before, before + torch.tensor(changes)])
    assert recalibrate_if_better(
        model, batches(2), lambda: next(errors)) is kept


def test_errors_of_images(model):
    """One error per image, whichever batch it comes in."""
    small, held_out = copy.deepcopy(model), batches(2, seed=9)
    small.conv1.weight.data[0] = 0
    errors = output_errors(small, model, held_out)
    assert len(errors) == sum(map(len, held_out))
    assert output_error(small, model, held_out) == pytest.approx(
        float(errors.mean()), rel=1e-5)
    torch.testing.assert_close(
        errors[:len(held_out[0])], output_errors(small, model, held_out[:1]))


def test_automatic_needs_a_batch_to_spare(model, monkeypatch):
    """One batch more than asked for decides; without it nothing is done, nor
    for planners that do not look at data."""
    asked = []
    monkeypatch.setattr('mmbasis.compression.pipeline.recalibrate_if_better',
                        lambda *_: asked.append(1))
    for count, planner in ((2, FixedPlanner({'.*':
                                             2})), (3, FixedPlanner({'.*':
                                                                     2})),
                           (2, FixedPlanner({'.*': 2}, data_aware=False))):
        mmbasis.compress(
            copy.deepcopy(model), planner, batches(3), num_batches=count)
        asked.append(0)
    assert asked == [1, 0, 0, 0]


def test_unknown_value(model):
    with pytest.raises(ValueError, match='recalibration must be True or'):
        mmbasis.compress(
            model, FixedPlanner({'.*': 2}), batches(1), recalibration='yes')
