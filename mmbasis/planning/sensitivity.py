# Copyright (c) mmbasis authors. All rights reserved.
"""What dropping a direction of a layer's output costs, in units of the
loss."""
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.dist import all_reduce
from mmengine.logging import MMLogger
from torch import Tensor

from ..layers import observe
from ..running import (
    Adapter,
    classifies,
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


class _Gradients:
    """Second moment ``G = E[g g^T]`` of the loss' gradients at the output of
    a layer whose spectrum is known."""

    def __init__(self, layer: Layer, known: LayerStatistics) -> None:
        assert known.spectrum is not None
        self.layer, self.known, self.spectrum = layer, known, known.spectrum
        groups, rows, in_size = layer.matrix_shape
        size = in_size if _is_wide(layer) else rows
        zeros = self.spectrum.values.new_zeros
        self.moment, self.count = zeros((groups, size, size)), zeros(())

    def watch(self, module: nn.Module, args: tuple, kwargs: dict,
              output: Tensor) -> Optional[Tensor]:
        """Hook on the forward pass of the layer."""
        if not torch.is_grad_enabled():
            return None  # checkpointing runs it again with gradients
        if not output.requires_grad:
            # of a constant, queries for example; in-place layers may not
            # change a leaf
            output = output.requires_grad_() + 0
        output.register_hook(self._add)
        return output

    def _add(self, gradient: Tensor) -> None:
        samples = output_samples(self.layer, gradient)
        if _is_wide(self.layer):
            samples = self.spectrum.vectors.to(samples).mT @ samples
        # squares of vanishing gradients are too small for float32
        size = samples.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        samples = samples / size
        self.moment += (samples @ samples.mT).double() * size.double()**2
        self.count += samples.shape[-1]

    def finish(self) -> LayerStatistics:
        """Sum over processes: with ``gradient`` and ``sensitivity`` if a
        gradient came."""
        all_reduce(self.moment)
        all_reduce(self.count)
        # none came (no_grad, detach), or nothing but zeros or NaN
        if not (self.moment.any() and self.moment.isfinite().all()):
            return self.known
        gradient, vectors = self.moment.div_(self.count), self.spectrum.vectors
        if _is_wide(self.layer):
            along = gradient.diagonal(dim1=-2, dim2=-1)
        else:
            along = (vectors * (gradient @ vectors)).sum(-2)
        # positions add up: an error stands at each of them
        sensitivity = (self.spectrum.values *
                       along).sum(0) * self.known.out_positions
        return replace(self.known, gradient=gradient, sensitivity=sensitivity)


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
    model, logger = adapter.model, MMLogger.get_current_instance()
    gradients = [
        _Gradients(x, analysis.statistics[x.name])
        for x in analysis.selection.chosen
    ]
    with undisturbed(model), evaluation(model), ExitStack() as hooks:
        is_classifier = classifies(adapter, batches[0])
        if not is_classifier:
            train_deterministically(model)
        for x in gradients:
            hooks.callback(observe(x.layer.module, x.watch).remove)
        for index, data in enumerate(batches):
            # detectors draw among proposals, and queries to denoise
            torch.manual_seed(index)
            with torch.enable_grad():
                # layers behind frozen ones must get their gradients, too
                inputs = adapter.prepare(data, gradients=True)
                loss = fisher_loss(adapter, inputs, index, is_classifier)
                if loss.requires_grad:
                    loss.backward()
            logger.info('Sensitivity: batch %d/%d', index + 1, len(batches))
    found = {x.layer.name: x.finish() for x in gradients}
    _log_unknown([k for k, x in found.items() if x.sensitivity is None],
                 len(found))
    return replace(analysis, statistics={**analysis.statistics, **found})


def _log_unknown(names: Sequence[str], count: int) -> None:
    if names:
        MMLogger.get_current_instance().warning(
            'No gradient (or only zeros or NaN) reached %d of %d layers '
            '(%s): what they are worth to the loss is unknown, and their '
            'energy counts instead', len(names), count,
            ', '.join([*names[:5], '…'][:len(names)]))
