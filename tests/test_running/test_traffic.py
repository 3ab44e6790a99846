# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
import torch.nn as nn

from mmbasis.running import Operation, TrafficWatch, evaluation
from tests.analyses import measured

SIZE = 4 * 8 * 8


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


class Shortcut(nn.Module):

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x):
        return self.inner(x) + x


class Joined(nn.Module):

    def forward(self, x):
        return torch.cat([x, x], 1)[:, :4]


def between(*modules, data_aware=False):
    model = nn.Sequential(nn.SiLU(), conv(), *modules, conv(), nn.SiLU())
    return measured(model, [torch.randn(2, 4, 8, 8)], data_aware).between


@pytest.mark.parametrize('modules, found', [
    ([], []),
    ([nn.BatchNorm2d(4), nn.ReLU()], []),
    ([nn.BatchNorm2d(4), nn.ReLU(inplace=True)], []),
    ([Shortcut(conv()), nn.ReLU()], []),
    ([nn.Dropout(), nn.Identity(), nn.Flatten(2), nn.Unflatten(2, (8, 8))],
     []),
    ([nn.SiLU()], [(SIZE, SIZE)]),
    ([nn.SiLU(inplace=True)], [(SIZE, SIZE)]),
    ([nn.SiLU(), nn.ReLU()], [(SIZE, SIZE)] * 2),
    ([Shortcut(conv(), nn.SiLU())], [(SIZE, SIZE), (2 * SIZE, SIZE)]),
    ([nn.MaxPool2d(2)], [(SIZE, SIZE / 4)]),
    ([Joined()], [(2 * SIZE, 2 * SIZE)]),
])
def test_operations_between_layers(modules, found):
    """For one image; what is fused or only a view moves nothing."""
    assert between(*modules) == tuple(Operation(*x) for x in found)


def test_statistics_are_no_part_of_the_network():
    modules = [nn.BatchNorm2d(4), nn.SiLU()]
    assert between(*modules, data_aware=True) == between(*modules)


def test_outputs_are_as_before():
    model, x = nn.Sequential(conv(), nn.SiLU(inplace=True)), torch.randn(
        1, 4, 8, 8)
    with evaluation(model):
        plain = model(x)
        with TrafficWatch():
            assert torch.equal(model(x), plain)
