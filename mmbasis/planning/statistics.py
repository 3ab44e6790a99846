# Copyright (c) mmbasis authors. All rights reserved.
"""What a few batches say of each layer: its outputs, and what they matter."""
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Dict, Iterator, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from torch import Tensor

from .. import running
from ..factorization import (
    InputSpectrum,
    Spectrum,
    metric_of,
    spectrum_of_factor,
    spectrum_of_input,
    spectrum_of_moment,
)
from ..layers import first_argument, observe
from ..utils.collectives import sum_over_processes, together
from . import samples as sampling
from .layers import FORMS, UNUSED, Layer, Selection, freeze

#: forms with an input basis
TWO_SIDED = 'input', 'both'


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What was measured of a layer.

    Args:
        weight_positions (float): How often the weights are applied for one
            image, so that ``weight.numel() * weight_positions`` is its MACs.
        out_positions (float): Output positions for one image.
        calls (float): Calls in one forward pass.
        spectrum (Spectrum, optional): Directions of its output: of the
            output's covariance on data, or of the weights.
        mean (Tensor, optional): Mean output without bias, ``(G, P / G)``.
        gradient (Tensor, optional): Second moment of the loss' gradient at
            its output, ``(G, P / G, P / G)``; where that takes too much,
            ``(G, R, R)`` in coordinates of the spectrum's vectors.
        sensitivity (Tensor, optional): Increase of the loss by dropping each
            direction of the spectrum, shape ``(R, )``. None is unknown: no
            gradient was taken, or none reached the layer.
        in_positions (float): Input positions for one image.
        input_covariance (Tensor, optional): Of the input channels,
            ``(G, C / G, C / G)``.
        inputs (InputSpectrum, optional): Directions of its input; None where
            it can have no input basis.
        adds (bool): Whether its output, perhaps normalised, goes into a sum
            with a tensor of the same shape, and nowhere else.
        middle_positions (float): Positions for one image as high as its
            output and as wide as its input.
        column_covariance (Tensor, optional): Of the columns of its windows,
            ``(G, C k / G, C k / G)``.
        columns (InputSpectrum, optional): Directions of these, in the metric
            of the ``gradient``; None where the layer has no spatial form.
        importance (tuple[Tensor]): How strongly the loss feels an error at
            each sample of its output: the norm of the gradient there, call
            after call on the batches of this process. Empty is unknown.
    """
    weight_positions: float = 0
    out_positions: float = 0
    calls: float = 0
    spectrum: Optional[Spectrum] = None
    mean: Optional[Tensor] = None
    gradient: Optional[Tensor] = None
    sensitivity: Optional[Tensor] = None
    in_positions: float = 0
    input_covariance: Optional[Tensor] = None
    inputs: Optional[InputSpectrum] = None
    adds: bool = False
    middle_positions: float = 0
    column_covariance: Optional[Tensor] = None
    columns: Optional[InputSpectrum] = None
    importance: Tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Analysis:
    """All that planning needs to know: layers, what was measured, and what the
    network does for one image between them."""
    selection: Selection
    statistics: Mapping[str, LayerStatistics]
    between: Tuple[running.Operation, ...] = ()

    def __post_init__(self) -> None:
        freeze(self, 'statistics')

    @property
    def layers(self) -> Sequence[Layer]:
        return self.selection.layers


class LayerRecorder(ExitStack):
    """Record, over forward passes, positions of layers and moments of some.

    Use it as a context manager around :meth:`run` or passes of your own; count
    these in ``passes`` and their images in ``images``.
    """

    def __init__(self,
                 layers: Sequence[Layer],
                 moments: Sequence[Layer] = (),
                 inputs: Sequence[Layer] = (),
                 columns: Sequence[Layer] = ()) -> None:
        super().__init__()
        self.layers = layers
        self.images = self.passes = 0
        #: sums of outer products of outputs, or of inputs where these are
        #: fewer, with a 1 behind them, so that sum and count are in there
        self.moments: Dict[str, Tensor] = {}
        #: the same of input channels, where they can have a basis
        self.inputs: Dict[str, Tensor] = {}
        #: and of the columns of windows, where these can be split
        self.columns: Dict[str, Tensor] = {}
        for layer in moments:
            groups, rows, in_size = layer.matrix_shape
            size = in_size if sampling.is_expansion(layer) else rows
            self.moments[layer.name] = _no_moment(layer, size)
        for layer in inputs:
            self.inputs[layer.name] = _no_moment(layer, layer.in_channels)
        for layer in columns:
            self.columns[layer.name] = _no_moment(
                layer, layer.module.weight.shape[2] * layer.in_channels)
        #: positions of weights, outputs and inputs, calls, whether it ends in
        #: a sum, and positions between the halves of its window, of each layer
        self._table = torch.zeros(len(layers), 6, dtype=torch.float64)
        self._watch: Optional[running.SumWatch] = None
        #: for one image of the first batch
        self.between: Tuple[running.Operation, ...] = ()
        self._traffic = running.TrafficWatch()
        for layer, row in zip(layers, self._table):
            hook = partial(self._record, layer, row)
            watched = observe(layer.module, hook, self._enter)
            self.callback(watched.remove)

    def run(self, adapter: running.Adapter, batches: Sequence[Any]) -> None:
        """Run a model on batches."""
        for data in batches:
            with nullcontext() if self.passes else self._look(
                    adapter.count_images(data)):
                adapter.predict(data)
            self.images += adapter.count_images(data)
            self.passes += 1
            MMLogger.get_current_instance().info(
                'Calibration: batch %d/%d, %d images', self.passes,
                len(batches), self.images)

    @contextmanager
    def _look(self, images: int) -> Iterator[None]:
        """Note, in a pass, where the model adds shortcuts, and what it does
        between its layers."""
        self._watch = running.SumWatch()
        with self._watch, self._traffic:
            yield
        between = tuple(running.Operation(*(x / images for x in operation))
                        for operation in self._traffic.found)
        self.between, *_ = together('calibration, first batch', between)
        self._table[:, 4] = torch.tensor(
            [x.name in self._watch.residual for x in self.layers])
        self._watch = None

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if self._watch is not None:
            self._traffic.enter()

    def _record(self, layer: Layer, row: Tensor, module: nn.Module,
                args: tuple, kwargs: dict, y: Tensor) -> None:
        x = first_argument(module, args, kwargs)[0]
        channels = getattr(module, 'out_channels', None) or module.out_features
        positions = y.numel() // channels
        at_weights = positions if layer.kind is None else (
            layer.kind.weight_positions(module, x, y))
        in_channels = getattr(module, 'in_channels', None) or x.shape[-1]
        row[:4] += torch.tensor(
            [at_weights, positions, x.numel() // in_channels, 1],
            dtype=torch.float64)
        row[5] += positions * x.shape[-1] / max(y.shape[-1], 1)
        if layer.name in self.moments:
            if sampling.is_expansion(layer):
                samples = sampling.input_samples(layer, x)
            else:
                samples = sampling.output_samples(layer, y)
            _add_moment(self.moments[layer.name], samples)
        if layer.name in self.inputs:
            _add_moment(self.inputs[layer.name],
                        sampling.output_samples(layer, x))
        if layer.name in self.columns:
            _add_moment(self.columns[layer.name],
                        sampling.column_samples(layer, x))
        if self._watch is not None:
            self._watch.follow(layer.name, module, args, kwargs, y)
            self._traffic.leave(y)

    def finish(self) -> Dict[str, LayerStatistics]:
        """Sum over processes: statistics by layer name, with spectra where
        moments were collected and the layer ran.

        Raises:
            RuntimeError: If no image was seen.
            ValueError: If a layer returned NaN or infinite values.
        """
        seen = torch.tensor([self.images, self.passes], dtype=torch.float64)
        sum_over_processes('calibration', seen, self._table)
        images, passes = seen.tolist()
        if images == 0:
            raise RuntimeError('calibration saw no image: the dataloader is '
                               'empty')
        found = {}
        for layer, row in zip(self.layers, self._table.tolist()):
            known = LayerStatistics(
                row[0] / images,
                row[1] / images,
                row[3] / passes,
                in_positions=row[2] / images,
                adds=row[4] > 0,
                middle_positions=row[5] / images)
            moment = self.moments.pop(layer.name, None)
            if moment is not None:
                sum_over_processes(f'calibration of {layer.name}', moment)
                if known.weight_positions:
                    known = _with_spectrum(layer, known, moment)
            found[layer.name] = replace(
                known,
                input_covariance=_pop_covariance(self.inputs, layer),
                column_covariance=_pop_covariance(self.columns, layer))
        return found


def _pop_covariance(moments: Dict[str, Tensor],
                    layer: Layer) -> Optional[Tensor]:
    """Over processes; None of a layer that is not looked at, or did not
    run."""
    moment = moments.pop(layer.name, None)
    if moment is None:
        return None
    sum_over_processes(f'calibration of the inputs of {layer.name}', moment)
    ran = bool(moment[0, -1, -1])
    return _mean_and_covariance(moment)[1] if ran else None


def _no_moment(layer: Layer, size: int) -> Tensor:
    return layer.module.weight.new_zeros(
        (layer.matrix_shape[0], size + 1, size + 1), dtype=torch.float64)


def _add_moment(moment: Tensor, samples: Tensor) -> None:
    samples = torch.cat([samples, torch.ones_like(samples[:, :1])], 1)
    sampling.add_products(moment, samples, samples)


def _mean_and_covariance(moment: Tensor) -> Tuple[Tensor, Tensor]:
    """Of the samples in a moment, ``(G, N, 1)`` and ``(G, N, N)``."""
    moment = moment / moment[0, -1, -1]
    mean = moment[:, :-1, -1:]
    return mean, moment[:, :-1, :-1] - mean @ mean.mT


def _with_spectrum(layer: Layer, statistics: LayerStatistics,
                   moment: Tensor) -> LayerStatistics:
    mean, covariance = _mean_and_covariance(moment)
    if not torch.isfinite(covariance).all():
        raise ValueError(f'{layer.name} returns NaN or infinite values on '
                         'the calibration images')
    matrix = weight_matrix(layer)
    if sampling.is_expansion(layer):
        spectrum = spectrum_of_factor(matrix, covariance)
        mean = matrix @ mean
    else:
        spectrum = spectrum_of_moment(covariance, matrix)
        if layer.has_bias:
            mean = mean - layer.module.bias.detach().double().view_as(mean)
    return replace(statistics, spectrum=spectrum, mean=mean.squeeze(-1))


def weight_matrix(layer: Layer) -> Tensor:
    """The weights ``H`` of a layer, float64, shape ``(G, P / G, D)``."""
    return layer.known_kind.to_matrix(layer.module).detach().double()


def measure(adapter: running.Adapter,
            selection: Selection,
            batches: Sequence[Any],
            data_aware: bool = True,
            forms: Sequence[str] = FORMS) -> Analysis:
    """Measure positions and spectra of layers.

    Args:
        adapter (Adapter): Runs the dense model.
        selection (Selection): Its layers.
        batches (Sequence): Batches, as the model takes them; in a distributed
            run those of this process. All end with the same statistics.
        data_aware (bool): Take spectra of the chosen layers from the
            covariance of their outputs, instead of from their weights. One
            batch is looked at without it. Defaults to True.
        forms (Sequence[str]): What layers may become, and so what is measured
            of their inputs. Defaults to all forms.

    Returns:
        Analysis: Layers that did not run are excluded.

    Raises:
        RuntimeError: If there are no batches.
        ValueError: If an output is not finite.
    """
    moments = selection.chosen if data_aware else []
    inputs = [x for x in moments if _may_be(x, forms, *TWO_SIDED)]
    columns = [x for x in moments if _may_be(x, forms, 'spatial')]
    with running.evaluation(adapter.model), LayerRecorder(
            selection.layers, moments, inputs, columns) as recorder:
        recorder.run(adapter, batches if data_aware else batches[:1])
    statistics = recorder.finish()
    selection = selection.without({
        name: UNUSED
        for name, known in statistics.items() if not known.weight_positions
    })
    for layer in selection.chosen:
        statistics[layer.name] = _with_defaults(
            layer, statistics[layer.name], forms)
    return Analysis(selection, statistics, recorder.between)


def _may_be(layer: Layer, allowed: Sequence[str], *forms: str) -> bool:
    """Whether a layer may have one of some forms, if that is allowed."""
    return any(x in allowed and not layer.why_not(x) for x in forms)


def _with_defaults(layer: Layer, known: LayerStatistics,
                   forms: Sequence[str]) -> LayerStatistics:
    """With what weights alone say, where nothing else is known."""
    matrix = weight_matrix(layer)
    if known.spectrum is None:
        known = replace(known, spectrum=spectrum_of_factor(matrix))
    if _may_be(layer, forms, *TWO_SIDED):
        known = replace(known, inputs=spectrum_of_input(
            matrix, layer.in_channels, known.input_covariance))
    return known


def with_columns(analysis: Analysis,
                 forms: Sequence[str] = FORMS) -> Analysis:
    """With directions of the columns of windows, which depend on gradients if
    these were taken, of chosen layers that may have the spatial form."""
    found = {
        x.name: replace(known, columns=_spectrum_of_columns(x, known))
        for x, known in ((x, analysis.statistics[x.name])
                         for x in analysis.selection.chosen)
        if _may_be(x, forms, 'spatial')}
    return replace(analysis, statistics={**analysis.statistics, **found})


def _spectrum_of_columns(layer: Layer,
                         known: LayerStatistics) -> InputSpectrum:
    """By what their errors do to the output, in the metric of the loss'
    gradients where it is known."""
    matrix = weight_matrix(layer)
    if known.gradient is not None:
        assert known.spectrum is not None
        if known.gradient.shape[-1] != matrix.shape[-2]:
            matrix = known.spectrum.vectors.mT @ matrix
        matrix = metric_of(known.gradient) @ matrix
    size = layer.module.weight.shape[2] * layer.in_channels
    return spectrum_of_input(matrix, size, known.column_covariance)
