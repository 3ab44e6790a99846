# Copyright (c) mmbasis authors. All rights reserved.
"""What errors in the outputs and inputs of layers matter to the loss."""
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Iterator, List, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from torch import Tensor

from .. import running
from ..factorization import spectrum_of_input
from ..layers import observe
from ..utils.collectives import sum_over_processes, together
from . import samples as sampling
from .layers import Layer
from .statistics import Analysis, LayerStatistics, weight_matrix

#: Of layers with more output channels than this, and fewer inputs, gradients
#: are looked at along the directions of the spectrum only, in which all
#: outputs lie: a moment of 32768 channels takes 8 GB.
MAX_ROWS = 2048


class _Gradients:
    """Second moment ``G = E[g g^T]`` of the loss' gradients at an output."""

    def __init__(self, layer: Layer, known: LayerStatistics) -> None:
        assert known.spectrum is not None
        self.layer, self.known, self.spectrum = layer, known, known.spectrum
        groups, rows, in_size = layer.matrix_shape
        self.is_wide = rows > max(MAX_ROWS, in_size)
        size = in_size if self.is_wide else rows
        zeros = self.spectrum.values.new_zeros
        self.moment, self.count = zeros((groups, size, size)), zeros(())
        #: the same at the input
        self.inputs = None if known.inputs is None else zeros(
            (groups, layer.in_channels, layer.in_channels))
        #: the input while the layer runs
        self._whole: Optional[Tensor] = None

    def attach(self, stack: ExitStack) -> None:
        """Watch the layer until the stack is closed."""
        module = self.layer.module
        stack.callback(observe(module, self.watch, self.watch_input).remove)
        reader = self.layer.known_kind.dense_reader(module)
        if reader is not None:
            stack.callback(observe(reader, before=self.pass_by).remove)

    def watch_input(self, module: nn.Module, args: tuple) -> Optional[tuple]:
        """Called before the layer runs."""
        if self.inputs is None or not (torch.is_grad_enabled() and args
                                       and args[0].requires_grad):
            return None
        # the gradient of this use of the tensor alone
        x = args[0].view_as(args[0])
        x.register_hook(self._add_input)
        self._whole = args[0]
        return (x, *args[1:])

    def pass_by(self, module: nn.Module, args: tuple) -> Optional[tuple]:
        """Called before a part of the layer runs that would not see an input
        basis: its gradients do not count."""
        return None if self._whole is None else (self._whole, *args[1:])

    def _add_input(self, gradient: Tensor) -> None:
        samples = sampling.output_samples(self.layer, gradient)
        assert self.inputs is not None
        self.inputs += _products(samples)

    def watch(self, module: nn.Module, args: tuple, kwargs: dict,
              output: Tensor) -> Optional[Tensor]:
        """Hook on the forward pass of the layer."""
        self._whole = None
        if not torch.is_grad_enabled():
            return None  # checkpointing runs it again with gradients
        if not output.requires_grad:
            # of a constant, queries for example; in-place layers may not
            # change a leaf
            output = output.requires_grad_() + 0
        output.register_hook(self._add)
        return output

    def _add(self, gradient: Tensor) -> None:
        samples = sampling.output_samples(self.layer, gradient)
        if self.is_wide:
            samples = self.spectrum.vectors.to(samples).mT @ samples
        self.moment += _products(samples)
        self.count += samples.shape[-1]

    def finish(self) -> LayerStatistics:
        """Sum over processes: with a sensitivity if a gradient came."""
        inputs = [] if self.inputs is None else [self.inputs]
        sum_over_processes(f'sensitivity of {self.layer.name}', self.moment,
                           self.count, *inputs)
        # none came (no_grad, detach), or nothing but zeros or NaN
        if not (self.moment.any() and self.moment.isfinite().all()):
            return self.known
        gradient, vectors = self.moment.div_(self.count), self.spectrum.vectors
        if self.is_wide:
            along = gradient.diagonal(dim1=-2, dim2=-1)
        else:
            along = (vectors * (gradient @ vectors)).sum(-2)
        # positions add up: an error stands at each of them
        sensitivity = (self.spectrum.values *
                       along).sum(0) * self.known.out_positions
        known = replace(
            self.known, gradient=gradient, sensitivity=sensitivity)
        if self.inputs is not None and (self.inputs.any()
                                        and self.inputs.isfinite().all()):
            known = replace(known, inputs=spectrum_of_input(
                weight_matrix(self.layer), self.layer.in_channels,
                known.input_covariance, self.inputs))
        return known


class _Importance:
    """The norm of the loss' gradient at each sample of a layer's output."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.norms: List[Tensor] = []
        #: those of the calls in this batch, as forward passes make them
        self._calls: List[Tensor] = []
        #: whether calls come in the order of a plain forward pass
        self._in_order = True

    def watch(self, module: nn.Module, args: tuple, kwargs: dict,
              output: Tensor) -> Optional[Tensor]:
        """Hook on the forward pass of the layer."""
        if not torch.is_grad_enabled():
            self._in_order = False  # checkpointing runs the last call first
            return None
        if not output.requires_grad:
            output = output.requires_grad_() + 0
        output.register_hook(partial(self._add, len(self._calls)))
        count = sampling.output_samples(self.layer, output.detach()).shape[-1]
        self._calls.append(output.new_zeros(count, dtype=torch.float64))
        return output

    def _add(self, call: int, gradient: Tensor) -> None:
        self._calls[call] = torch.linalg.vector_norm(
            sampling.output_samples(self.layer, gradient), dim=(0, 1),
            dtype=torch.float64)

    def end_batch(self, images: int) -> None:
        """Let images count alike: the size of an image's gradients depends on
        the labels that were drawn for it."""
        calls, self._calls = self._calls, []
        if any(len(x) % images for x in calls):
            images = 1  # regions, for example
        rows = [x.view(images, -1) for x in calls]
        mean = torch.cat(rows, 1).mean(1, True) if rows else torch.zeros(1)
        self.norms += [(x / mean.clamp_min(1e-300)).flatten() for x in rows]

    def finish(self, known: LayerStatistics) -> LayerStatistics:
        """With what was found, if it belongs to the calls of a forward pass
        and says anything."""
        in_order = self._in_order or known.calls <= 1
        says = any(bool(x.any()) for x in self.norms) and all(
            bool(x.isfinite().all()) for x in self.norms)
        return replace(known, importance=tuple(
            self.norms)) if in_order and says else known


def _products(samples: Tensor) -> Tensor:
    """``sum g g^T``, float64: squares of vanishing gradients are too small for
    float32."""
    size = samples.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    samples = samples / size
    return sampling.gram(samples).double() * size.double()**2


def measure_sensitivity(adapter: running.Adapter, analysis: Analysis,
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
        that a gradient reached; ``importance`` also of prediction layers.

    Raises:
        UnknownLossError: If the model has no loss that is known.
    """
    model = adapter.model
    gradients = [_Gradients(x, analysis.statistics[x.name])
                 for x in analysis.selection.chosen]
    importance = [_Importance(x) for x in analysis.selection.fitted]
    with running.undisturbed(model), running.evaluation(
            model), ExitStack() as stack:
        classifies = adapter.logits(batches[0]) is not None
        for x in gradients:
            x.attach(stack)
        for y in importance:
            stack.callback(observe(y.layer.module, y.watch).remove)
        _look(adapter, batches, classifies, importance)
    found = {x.layer.name: x.finish() for x in gradients}
    _warn_of_unknown(found)
    statistics = {**analysis.statistics, **found}
    statistics.update((y.layer.name, y.finish(statistics[y.layer.name]))
                      for y in importance)
    return replace(analysis, statistics=statistics)


def _look(adapter: running.Adapter, batches: Sequence[Any], classifies: bool,
          importance: Sequence[_Importance]) -> None:
    """Take all gradients. The loss is unknown to all processes if it is to
    one of them."""
    unknown = None
    try:
        for data in _backward(adapter, batches, classifies):
            for x in importance:
                x.end_batch(adapter.count_images(data))
    except running.UnknownLossError as error:
        unknown = str(error)
    for text in together('sensitivity', unknown):
        if text is not None:
            raise running.UnknownLossError(text)


def _warn_of_unknown(found: Mapping[str, LayerStatistics]) -> None:
    """Say which layers no gradient reached."""
    unknown = [name for name, x in found.items() if x.sensitivity is None]
    if unknown:
        MMLogger.get_current_instance().warning(
            'No gradient (or only zeros or NaN) reached %d of %d layers '
            '(%s): what they are worth to the loss is unknown, and their '
            'energy counts instead', len(unknown), len(found),
            ', '.join(unknown[:5] + ['…'] * (len(unknown) > 5)))


def _backward(adapter: running.Adapter, batches: Sequence[Any],
              classifies: bool) -> Iterator[Any]:
    """Take the gradients of the loss on each batch; yields it behind that."""
    if not classifies:
        running.train_deterministically(adapter.model)
    for index, data in enumerate(batches):
        # detectors draw among proposals, and queries to denoise
        torch.manual_seed(index)
        with torch.enable_grad():
            # layers behind frozen ones must get their gradients, too
            inputs = adapter.prepare(data, gradients=True)
            loss = running.fisher_loss(adapter, inputs, index, classifies)
            if loss.requires_grad:
                loss.backward()
        MMLogger.get_current_instance().info('Sensitivity: batch %d/%d',
                                             index + 1, len(batches))
        yield data
