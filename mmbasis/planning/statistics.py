# Copyright (c) mmbasis authors. All rights reserved.
"""What a few batches say of each layer."""
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Dict, Mapping, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.dist import all_reduce
from mmengine.logging import MMLogger
from torch import Tensor

from ..factorization import Spectrum, spectrum_of_factor, spectrum_of_moment
from ..layers import observe
from ..running import Adapter, evaluation
from .layers import UNUSED, Layer, Selection, freeze
from .samples import (
    input_samples,
    is_expansion,
    joint_moment,
    output_samples,
)


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What was measured of a layer.

    Args:
        weight_positions (float): How often the weights are applied for one
            image, so that ``weight.numel() * weight_positions`` is its MACs.
        out_positions (float): Output positions for one image.
        calls (float): Calls in one forward pass; more than one where the
            layer is shared.
        spectrum (Spectrum, optional): Directions of its output: of the
            output's covariance on data, or of the weights.
        mean (Tensor, optional): Mean output without bias, ``(G, P / G)``.
        gradient (Tensor, optional): Second moment of the loss' gradient at
            its output, shape ``(G, P / G, P / G)``; ``(G, R, R)``, in
            coordinates of the spectrum's vectors, where that takes too much.
            None where no gradient was taken, or none reached the layer.
        sensitivity (Tensor, optional): Increase of the loss by dropping each
            direction of the spectrum, shape ``(R, )``. None where it is
            unknown, which is not the same as zero.
    """
    weight_positions: float = 0
    out_positions: float = 0
    calls: float = 0
    spectrum: Optional[Spectrum] = None
    mean: Optional[Tensor] = None
    gradient: Optional[Tensor] = None
    sensitivity: Optional[Tensor] = None


@dataclass(frozen=True, eq=False)
class Analysis:
    """All that planning needs to know of a model.

    Args:
        selection (Selection): Its layers, and which of them are chosen.
        statistics (Mapping[str, LayerStatistics]): By layer name.
    """
    selection: Selection
    statistics: Mapping[str, LayerStatistics]

    def __post_init__(self) -> None:
        freeze(self, 'statistics')

    @property
    def layers(self) -> Sequence[Layer]:
        return self.selection.layers


class LayerRecorder(ExitStack):
    """Record, over forward passes, positions and moments of layers.

    Use it as a context manager around the passes, and count these in
    ``passes`` and their images in ``images``.

    Args:
        layers (Sequence[Layer]): The layers.
        moments (Sequence[Layer]): Those whose moments are collected, too.
    """

    def __init__(self,
                 layers: Sequence[Layer],
                 moments: Sequence[Layer] = ()) -> None:
        super().__init__()
        self.layers = layers
        self.images = self.passes = 0
        #: of the outputs, or of the inputs where these are fewer
        self.moments: Dict[str, Tensor] = {}
        for layer in moments:
            groups, rows, in_size = layer.matrix_shape
            size = 1 + (in_size if is_expansion(layer) else rows)
            self.moments[layer.name] = layer.module.weight.new_zeros(
                (groups, size, size), dtype=torch.float64)
        #: positions of weights and outputs, and calls, of each layer
        self._table = torch.zeros(len(layers), 3, dtype=torch.float64)
        for layer, row in zip(layers, self._table):
            hook = partial(self._record, layer, row)
            self.callback(observe(layer.module, hook).remove)

    def _record(self, layer: Layer, row: Tensor, module: nn.Module,
                args: tuple, kwargs: dict, y: Tensor) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        channels = getattr(module, 'out_channels', None) or module.out_features
        positions = y.numel() // channels
        at_weights = positions if layer.kind is None else (
            layer.kind.weight_positions(module, x, y))
        row += torch.tensor([at_weights, positions, 1], dtype=torch.float64)
        if layer.name in self.moments:
            self.moments[layer.name] += joint_moment(
                input_samples(layer, x, y) if is_expansion(layer) else
                output_samples(layer, y))

    def finish(self) -> Dict[str, LayerStatistics]:
        """Sum over processes: statistics by layer name, with spectra where
        moments were collected and the layer ran.

        Raises:
            RuntimeError: If no image was seen.
            ValueError: If a layer returned NaN or infinite values.
        """
        seen = torch.tensor([self.images, self.passes], dtype=torch.float64)
        all_reduce(seen)
        all_reduce(self._table)
        images, passes = seen.tolist()
        if images == 0:
            raise RuntimeError('calibration saw no image: the dataloader is '
                               'empty')
        found = {}
        for layer, row in zip(self.layers, self._table.tolist()):
            known = LayerStatistics(row[0] / images, row[1] / images,
                                    row[2] / passes)
            moment = self.moments.pop(layer.name, None)
            if moment is not None:
                all_reduce(moment)
                if known.weight_positions:
                    known = _with_spectrum(layer, known, moment)
            found[layer.name] = known
        return found


def _with_spectrum(layer: Layer, statistics: LayerStatistics,
                   moment: Tensor) -> LayerStatistics:
    moment = moment / moment[0, -1, -1]
    mean = moment[:, :-1, -1:]
    covariance = moment[:, :-1, :-1] - mean @ mean.mT
    if not torch.isfinite(covariance).all():
        raise ValueError(f'{layer.name} returns NaN or infinite values on '
                         'the calibration images')
    matrix = weight_matrix(layer)
    if is_expansion(layer):
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


def measure(adapter: Adapter,
            selection: Selection,
            batches: Sequence[Any],
            data_aware: bool = True) -> Analysis:
    """Measure positions and spectra of layers.

    In a distributed run each process passes its part of the images; all end
    with the same statistics.

    Args:
        adapter (Adapter): Runs the dense model.
        selection (Selection): Its layers.
        batches (Sequence): Batches, as the model takes them.
        data_aware (bool): Take spectra of the chosen layers from the
            covariance of their outputs, instead of from their weights. One
            batch is looked at without it. Defaults to True.

    Returns:
        Analysis: Layers that did not run are excluded.

    Raises:
        RuntimeError: If there are no batches.
        ValueError: If an output is not finite.
    """
    logger = MMLogger.get_current_instance()
    if not data_aware:
        batches = batches[:1]
    with evaluation(adapter.model), LayerRecorder(
            selection.layers,
            selection.chosen if data_aware else ()) as recorder:
        for data in batches:
            adapter.predict(data)
            recorder.images += adapter.count_images(data)
            recorder.passes += 1
            logger.info('Calibration: batch %d/%d, %d images',
                        recorder.passes, len(batches), recorder.images)
    statistics = recorder.finish()
    selection = selection.without({
        name: UNUSED
        for name, known in statistics.items() if not known.weight_positions
    })
    for layer in selection.chosen:
        known = statistics[layer.name]
        if known.spectrum is None:
            statistics[layer.name] = replace(
                known, spectrum=spectrum_of_factor(weight_matrix(layer)))
    return Analysis(selection, statistics)
