# Copyright (c) mmbasis authors. All rights reserved.
"""What dropping a direction of a layer's output costs, in units of the
loss."""
from typing import Any, Dict, List, Sequence

import torch
import torch.nn as nn
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MMLogger
from torch import Tensor

from ..running import (adapter_of, classifies, evaluation, fisher_loss,
                       train_deterministically, undisturbed)
from .calibration import output_samples
from .layers import LayerInfo

#: Of layers with more output channels than this, and fewer inputs, gradients
#: are looked at along the directions of the spectrum only, in which all
#: outputs lie: a moment of 32768 channels (Sparse R-CNN) takes 8 GB.
MAX_ROWS = 2048


class GradientRecorder:
    """Second moments ``G = E[g g^T]`` of the loss' gradients at layers'
    outputs.

    Args:
        layers (Sequence[LayerInfo]): With spectra.
    """

    def __init__(self, layers: Sequence[LayerInfo]) -> None:
        self.layers = [x for x in layers if x.compressible]
        self.moments: Dict[str, Tensor] = {}
        self.counts: Dict[str, int] = {}
        for layer in self.layers:
            groups, rows, in_size = layer.matrix_shape
            size = in_size if _is_wide(layer) else rows
            self.moments[layer.name] = layer.spectrum.values.new_zeros(
                (groups, size, size))
            self.counts[layer.name] = 0
        self._handles: List[Any] = []

    def __enter__(self) -> 'GradientRecorder':
        for layer in self.layers:

            def hook(module, args, output, layer=layer):
                if not torch.is_grad_enabled():
                    return None  # checkpointing runs it again with gradients
                if not output.requires_grad:
                    # of a constant, queries for example; in-place layers may
                    # not change a leaf
                    output = output.requires_grad_() + 0
                output.register_hook(lambda g: self._add(layer, g))
                return output

            self._handles.append(layer.module.register_forward_hook(hook))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _add(self, layer: LayerInfo, gradient: Tensor) -> None:
        samples = output_samples(layer, gradient)
        if _is_wide(layer):
            samples = layer.spectrum.vectors.to(samples).mT @ samples
        # squares of vanishing gradients are too small for float32
        size = samples.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        samples = samples / size
        self.moments[
            layer.name] += (samples @ samples.mT).double() * size.double()**2
        self.counts[layer.name] += samples.shape[-1]

    def finish(self) -> None:
        """Sum over processes and write ``gradient`` and ``sensitivity`` into
        the layers."""
        for layer in self.layers:
            moment = self.moments.pop(layer.name)
            count = moment.new_tensor(float(self.counts[layer.name]))
            if get_world_size() > 1:
                all_reduce(moment)
                all_reduce(count)
            layer.gradient = moment / count.clamp_min(1)
            if _is_wide(layer):
                along = layer.gradient.diagonal(dim1=-2, dim2=-1)
            else:
                vectors = layer.spectrum.vectors
                along = (vectors * (layer.gradient @ vectors)).sum(-2)
            # positions add up: an error stands at each of them
            layer.sensitivity = (layer.spectrum.values *
                                 along).sum(0) * layer.out_positions


def _is_wide(layer: LayerInfo) -> bool:
    _, rows, in_size = layer.matrix_shape
    return rows > max(MAX_ROWS, in_size)


def record_gradients(model: nn.Module, layers: Sequence[LayerInfo],
                     batches: Sequence[Any]) -> None:
    """Fill in ``gradient``, the second moment of the loss' gradient at each
    layer's output (of layers with more than ``MAX_ROWS`` channels and fewer
    inputs: in coordinates of the spectrum's vectors), and ``sensitivity``, the
    increase of the loss by dropping each direction of it.

    To second order, dropping direction ``u_i`` of an output ``y`` changes
    the loss by half of ``E[(u_i^T (y - mean))^2 (u_i^T g)^2]``, which is
    taken as the product of the two expectations and summed over positions.

    Args:
        model (nn.Module): The dense model.
        layers (Sequence[LayerInfo]): Its layers, calibrated with spectra.
        batches (Sequence): Batches with annotations, as in training.

    Raises:
        UnknownLossError: If the model has no loss that is known here.
    """
    logger = MMLogger.get_current_instance()
    adapter = adapter_of(model)
    with undisturbed(model), evaluation(model):
        known = classifies(adapter, batches[0])
        if not known:
            train_deterministically(model)
        with torch.enable_grad(), GradientRecorder(layers) as recorder:
            for index, data in enumerate(batches):
                batch = adapter.prepare(data, gradients=True)
                # detectors draw among proposals, and queries to denoise
                torch.manual_seed(index)
                fisher_loss(adapter, batch, index, known).backward()
                logger.info('Sensitivity: batch %d/%d', index + 1,
                            len(batches))
    recorder.finish()
