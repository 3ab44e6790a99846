# Copyright (c) mmbasis authors. All rights reserved.
"""The small models that a latency table is measured from."""
import json
from collections import defaultdict

import pytest
import torch
import torch.nn as nn

from mmbasis.deploy.layer_models import export_layers
from mmbasis.layers import BasisLayer


class Network(nn.Module):
    """A 1x1 layer, and a 3x3 one of other channels at its output."""

    def __init__(self):
        super().__init__()
        self.pointwise = nn.Conv2d(48, 32, 1)
        self.wide = nn.Conv2d(32, 64, 3, padding=1)

    def forward(self, x, samples=None, mode='tensor'):
        assert mode == 'tensor'
        return self.wide(self.pointwise(x).relu())


@pytest.fixture
def export(tmp_path):
    """Function that exports a network; entries of layers by name and form."""

    def export(count, round_to=4, **kwargs):
        total = export_layers(
            str(tmp_path), Network(), (1, 48, 6, 6), None, count, round_to,
            torchscript=True, **kwargs)
        index = json.loads((tmp_path / 'index.json').read_text())
        assert index['version'] == 2 and len(index['entries']) == total
        found = defaultdict(list)
        for entry in index['entries']:
            assert (tmp_path / entry['onnx']).is_file()
            if entry.get('role') == 'layer':
                name, = entry['uses']
                found[name, entry['form']].append(entry)
        return found, index['entries'][-1]

    return export


def test_layers_build(tmp_path, assert_builds):
    export_layers(str(tmp_path), Network(), (1, 48, 6, 6), None, 1, 4)
    index = json.loads((tmp_path / 'index.json').read_text())
    # the compressed model is the last one
    assert_builds(str(tmp_path / index['entries'][-1]['onnx']))


def test_few_ranks_of_each_form(export):
    for count in (2, 5):
        found, _ = export(count)
        assert {form for name, form in found if name == 'wide'} == {
            'dense', 'output', 'input', 'both', 'spatial'}
        assert {form for name, form in found if name == 'pointwise'} == {
            'dense', 'output'}
        for (_, form), entries in found.items():
            assert 1 <= len(entries) <= count
            assert len(entries) == 1 or form != 'dense'
            # a basis is smaller than the layer, and its ranks are aligned
            for entry in entries:
                sides = entry['rank'], entry['input_rank']
                assert all(x % 4 == 0 and x > 0 for x in sides if x)
                assert form == 'dense' or size(entry) < dense_size(entry)
    # of more ranks that save something, multiples of 8 and of 32
    assert [x['rank'] for x in export(5)[0]['wide', 'output']] == [
        16, 32, 48]
    assert [x['rank'] for x in export(2)[0]['wide', 'output']] == [32]


def size(entry):
    """Weights of a basis layer."""
    shape = torch.empty(entry['weight_shape'])
    dense = nn.Conv2d(shape.shape[1], shape.shape[0], shape.shape[2:])
    layer = BasisLayer(
        dense, entry['rank'], input_rank=entry['input_rank'],
        spatial=entry['form'] == 'spatial')
    return sum(x.numel() for x in layer.parameters() if x.dim() > 1)


def dense_size(entry):
    return torch.empty(entry['weight_shape']).numel()


def test_two_bases_are_on_a_diagonal(export):
    found, _ = export(8)
    pairs = [(x['rank'], x['input_rank']) for x in found['wide', 'both']]
    assert len(pairs) > 2
    assert all(output == 2 * inputs for output, inputs in pairs)


def test_forms_can_be_chosen(export):
    found, last = export(3, forms=('output', 'spatial'))
    assert {form for _, form in found} == {'dense', 'output', 'spatial'}
    # in the compressed model they take turns
    assert {k: x['form'] for k, x in last['ranks'].items()} == dict(
        pointwise='output', wide='spatial')
