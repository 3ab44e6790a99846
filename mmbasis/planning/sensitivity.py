# Copyright (c) mmbasis authors. All rights reserved.
"""What dropping a direction of a layer's output costs, in units of the
loss."""
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.dist import all_reduce
from mmengine.logging import MMLogger
from torch import Tensor

from ..layers import observe
from ..running import (
    Adapter,
    evaluation,
    fisher_loss,
    train_deterministically,
    undisturbed,
)
from .layers import Layer
from .samples import output_samples
from .statistics import Analysis, LayerStatistics

#: Of layers with more output channels than this, and fewer inputs, gradients
#: are looked at along the directions of the spectrum only, in which all
#: outputs lie: a moment of 32768 channels takes 8 GB.
MAX_ROWS = 2048


class GradientRecorder(ExitStack):
    """Second moments ``G = E[g g^T]`` of the loss' gradients at the outputs
    of the chosen layers of an analysis.

    Use it as a context manager around forward and backward passes.

    Args:
        analysis (Analysis): With spectra.
    """

    def __init__(self, analysis: Analysis) -> None:
        super().__init__()
        self.layers = analysis.selection.chosen
        self.statistics = dict(analysis.statistics)
        self.moments: Dict[str, Tensor] = {}
        self.counts: Dict[str, Tensor] = {}
        for layer in self.layers:
            groups, rows, in_size = layer.matrix_shape
            size = in_size if _is_wide(layer) else rows
            zeros = self._spectrum(layer).values.new_zeros
            self.moments[layer.name] = zeros((groups, size, size))
            self.counts[layer.name] = zeros(())

    def _spectrum(self, layer: Layer) -> Any:
        return self.statistics[layer.name].spectrum

    def __enter__(self) -> 'GradientRecorder':
        for layer in self.layers:
            hook = partial(self._watch, layer)
            self.callback(observe(layer.module, hook).remove)
        return super().__enter__()

    def _watch(self, layer: Layer, module: nn.Module, args: tuple,
               kwargs: dict, output: Tensor) -> Optional[Tensor]:
        if not torch.is_grad_enabled():
            return None  # checkpointing runs it again with gradients
        if not output.requires_grad:
            # of a constant, queries for example; in-place layers may not
            # change a leaf
            output = output.requires_grad_() + 0
        output.register_hook(partial(self._add, layer))
        return output

    def _add(self, layer: Layer, gradient: Tensor) -> None:
        samples = output_samples(layer, gradient)
        if _is_wide(layer):
            samples = self._spectrum(layer).vectors.to(samples).mT @ samples
        # squares of vanishing gradients are too small for float32
        size = samples.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        samples = samples / size
        products = (samples @ samples.mT).double()
        self.moments[layer.name] += products * size.double()**2
        self.counts[layer.name] += samples.shape[-1]

    def finish(self) -> Dict[str, LayerStatistics]:
        """Sum over processes: statistics by layer name, with ``gradient`` and
        ``sensitivity`` where a gradient came; the other layers are logged."""
        unknown = []
        for layer in self.layers:
            moment = self.moments.pop(layer.name)
            count = self.counts[layer.name]
            all_reduce(moment)
            all_reduce(count)
            # none came (no_grad, detach), or nothing but zeros or NaN
            if moment.any() and moment.isfinite().all():
                self.statistics[layer.name] = self._with_sensitivity(
                    layer, moment / count)
            else:
                unknown.append(layer.name)
        if unknown:
            MMLogger.get_current_instance().warning(
                'No gradient (or only zeros or NaN) reached %d of %d layers '
                '(%s): what they are worth to the loss is unknown, and their '
                'energy counts instead', len(unknown), len(self.layers),
                ', '.join(unknown[:5] + ['…'] * (len(unknown) > 5)))
        return self.statistics

    def _with_sensitivity(self, layer: Layer,
                          gradient: Tensor) -> LayerStatistics:
        spectrum = self._spectrum(layer)
        if _is_wide(layer):
            along = gradient.diagonal(dim1=-2, dim2=-1)
        else:
            along = (spectrum.vectors * (gradient @ spectrum.vectors)).sum(-2)
        known = self.statistics[layer.name]
        # positions add up: an error stands at each of them
        sensitivity = (spectrum.values * along).sum(0) * known.out_positions
        return replace(known, gradient=gradient, sensitivity=sensitivity)


def _is_wide(layer: Layer) -> bool:
    _, rows, in_size = layer.matrix_shape
    return rows > max(MAX_ROWS, in_size)


def measure_sensitivity(adapter: Adapter, analysis: Analysis,
                        batches: Sequence[Any]) -> Analysis:
    """Measure what the loss makes of errors in the chosen layers.

    To second order, dropping direction ``u_i`` of an output ``y`` changes
    the loss by half of ``E[(u_i^T (y - mean))^2 (u_i^T g)^2]``, which is
    taken as the product of the two expectations and summed over positions.

    Args:
        adapter (Adapter): Runs the dense model.
        analysis (Analysis): With spectra.
        batches (Sequence): Batches with annotations, as in training.

    Returns:
        Analysis: With ``gradient`` and ``sensitivity`` of each chosen layer
        that a gradient reached; those of the others stay unknown.

    Raises:
        UnknownLossError: If the model has no loss that is known.
    """
    model = adapter.model
    with undisturbed(model), evaluation(model):
        is_classifier = adapter.logits(batches[0]) is not None
        if not is_classifier:
            train_deterministically(model)
        with torch.enable_grad(), GradientRecorder(analysis) as recorder:
            for index, data in enumerate(batches):
                # detectors draw among proposals, and queries to denoise
                torch.manual_seed(index)
                # layers behind frozen ones must get their gradients, too
                inputs = adapter.prepare(data, gradients=True)
                loss = fisher_loss(adapter, inputs, index, is_classifier)
                if loss.requires_grad:
                    loss.backward()
                MMLogger.get_current_instance().info(
                    'Sensitivity: batch %d/%d', index + 1, len(batches))
    return replace(analysis, statistics=recorder.finish())
