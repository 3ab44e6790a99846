# Copyright (c) mmbasis authors. All rights reserved.
"""Analyses of models that no image is needed for, and of measured ones."""
import torch
import torch.nn as nn

from mmbasis.factorization import spectrum_of_factor
from mmbasis.planning import (
    Analysis,
    Costs,
    Form,
    LayerStatistics,
    Rules,
    find_layers,
    measure,
    measure_sensitivity,
    with_columns,
)
from mmbasis.planning.statistics import weight_matrix
from mmbasis.running import Targets, adapter_of

#: no layer makes predictions, or says where others sample
NO_TARGETS = Targets(set(), set())


def analysis_of(model, planner=None, positions=None):
    """With spectra of the weights, and given positions of each layer, or
    pairs of those of the weights and of the output. Inputs are as large as
    the places of the weights."""
    layers = find_layers(model)
    selection = (planner or Rules()).select(layers, NO_TARGETS)
    statistics = {}
    for i, layer in enumerate(layers):
        count = positions[i] if positions else 64
        pair = count if isinstance(count, tuple) else (count, count)
        spectrum = None
        if layer.obstacle is None:
            spectrum = spectrum_of_factor(weight_matrix(layer))
        statistics[layer.name] = LayerStatistics(
            *pair, 1, spectrum, in_positions=pair[0])
    return Analysis(selection, statistics)


def measured(model, batches, data_aware=True, loss=False):
    """What images say of all layers that can be compressed."""
    adapter = adapter_of(model)
    selection = Rules().select(find_layers(model), NO_TARGETS)
    analysis = measure(adapter, selection, batches, data_aware)
    if loss:
        analysis = measure_sensitivity(adapter, analysis, batches)
    return with_columns(analysis)


def costs_of(analysis, **form):
    """MACs and parameters by layer name."""
    return {
        x.name: Costs(x, analysis.statistics[x.name], Form(**form))
        for x in analysis.layers
    }


def make_plan(planner, model, positions=None, **form):
    """The plan for :func:`analysis_of` a model."""
    analysis = analysis_of(model, planner, positions)
    return planner.plan(analysis, Form(**form))


def ranks(plan):
    """Rank by layer name; of another form than the output's, both ranks."""
    return {
        name: entry.rank if entry.form == 'output' else entry.ranks
        for name, entry in plan.layers.items()
    }


def random_layers(rng, count):
    """A row of random layers, and positions of their weights and outputs."""
    layers, positions = [], []
    for _ in range(count):
        groups = int(rng.choice([1, 1, 2, 3]))
        c_in, c_out = (int(groups * rng.integers(1, 12)) for _ in range(2))
        kernel = int(rng.integers(1, 4))
        kind = rng.choice(['conv', 'transpose', 'linear'])
        if kind == 'linear':
            layer = nn.Linear(c_in, c_out, bias=bool(rng.integers(2)))
        else:
            cls = nn.Conv2d if kind == 'conv' else nn.ConvTranspose2d
            layer = cls(
                c_in, c_out, kernel, groups=groups, bias=bool(rng.integers(2)))
        layers.append(layer)
        # transposed convolutions: inputs and outputs differ in size
        at_input = int(rng.integers(1, 400))
        at_output = at_input * (4 if kind == 'transpose' else 1)
        positions.append((at_input, at_output))
    return nn.Sequential(*layers), positions


def chain():
    """Layers of every kind, a depthwise one among them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 32, 3, groups=2), nn.Conv2d(32, 32, 3, groups=32),
        nn.ConvTranspose2d(32, 16, 2), nn.Linear(16, 24))
