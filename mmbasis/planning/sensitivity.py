# Copyright (c) mmbasis authors. All rights reserved.
"""What dropping a direction of a layer's output costs, in units of the
loss."""
import copy
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import all_reduce, get_rank, get_world_size
from mmengine.logging import MMLogger
from torch import Tensor

from .calibration import (evaluation, output_samples, tensor_outputs,
                          train_deterministically)
from ..layers import observe
from .layers import LayerInfo

#: Labels are drawn from softened predictions: on its training images a
#: network is so sure of itself that its gradients all but vanish.
TEMPERATURE = 2.
#: Of layers with more output channels than this, and fewer inputs, gradients
#: are looked at along the directions of the spectrum only, in which all
#: outputs lie: a moment of 32768 channels (Sparse R-CNN) takes 8 GB.
MAX_ROWS = 2048


class UnknownLossError(ValueError):
    """The model has no loss that is known here."""


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

            def hook(module, args, kwargs, output, layer=layer):
                if not torch.is_grad_enabled():
                    return None  # checkpointing runs it again with gradients
                if not output.requires_grad:
                    # of a constant, queries for example; in-place layers may
                    # not change a leaf
                    output = output.requires_grad_() + 0
                output.register_hook(lambda g: self._add(layer, g))
                return output

            self._handles.append(observe(layer.module, hook))
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


def _sampled_labels(logits: Tensor, batch: int) -> Tensor:
    """Draw labels from predictions, the same for an image however images are
    spread over processes.

    Args:
        logits (Tensor): Shape ``(N, classes)``.
        batch (int): Index of the batch, seed of its random numbers.

    Returns:
        Tensor: Shape ``(N, )``.
    """
    rank, world = get_rank(), get_world_size()
    generator = torch.Generator().manual_seed(batch)
    uniform = torch.rand(len(logits) * world, 1, generator=generator)
    cumulative = (logits.detach() / TEMPERATURE).softmax(-1).cumsum(-1)
    labels = (cumulative < uniform[rank::world].to(cumulative)).sum(-1)
    return labels.clamp_max(logits.shape[-1] - 1)


def total_loss(model: nn.Module, inputs: Any, samples: Any, batch: int,
               classifies: bool) -> Tensor:
    """The loss of a batch, summed over its images.

    Classifiers are asked for labels of their own: that makes the gradients'
    second moment the Fisher information of the model. Any other MMEngine
    model gives its training loss.
    """
    if not classifies:
        losses = model(inputs, samples, mode='loss')
        return model.parse_losses(losses)[0] * len(inputs)
    if hasattr(model, 'parse_losses'):
        outputs = model(inputs, samples, mode='tensor')
    else:
        outputs = model(inputs)
    logits = _logits(outputs)
    labels = _sampled_labels(logits, batch)
    return F.cross_entropy(logits, labels, reduction='sum')


def _logits(outputs: Any) -> Optional[Tensor]:
    """The logits of a classifier, None if these are other outputs."""
    if isinstance(outputs, (tuple, list)) and len(outputs) == 1:
        outputs = outputs[0]
    is_matrix = isinstance(outputs, Tensor) and outputs.dim() == 2
    return outputs if is_matrix else None


def _classifies(model: nn.Module, data: Any) -> bool:
    """Whether a model puts out logits.

    Raises:
        UnknownLossError: If it neither does nor knows its training loss.
    """
    if _logits(tensor_outputs(model, data)) is not None:
        return True
    if hasattr(model, 'parse_losses'):
        return False
    raise UnknownLossError(
        'loss-aware planning needs an MMEngine model, whose training loss is '
        'known, or a plain classifier, which puts out one tensor of shape '
        '(images, classes): set loss_aware=False')


def _prepare(model: nn.Module, data: Any) -> Tuple[Tensor, Any]:
    """Inputs that take gradients (even layers behind frozen ones must get
    theirs), and data samples."""
    if hasattr(model, 'data_preprocessor'):
        data = model.data_preprocessor(data, False)
    elif not isinstance(data, dict):
        data = data[0] if isinstance(data, (tuple, list)) else data
        data = dict(inputs=data)
    inputs = data['inputs'].detach().clone().requires_grad_()
    return inputs, data.get('data_samples')


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of weights are computed.

    To ask for those of the inputs alone would do that, too, but not in models
    that checkpoint activations.
    """
    parameters = [x for x in model.parameters() if x.requires_grad]
    for parameter in parameters:
        parameter.requires_grad = False
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad = True


@contextmanager
def _remembering(model: nn.Module) -> Iterator[None]:
    """Attributes of modules are as before afterwards, and the entries of those
    that are dictionaries or lists.

    Heads may keep what they put out for their loss (CondInst), and a model
    with such graphs cannot be copied; or hang modules elsewhere, too (DDQ).
    """
    own, before = vars(nn.Module()), []
    for module in model.modules():
        values = {k: v for k, v in vars(module).items() if k not in own}
        entries = [(x, copy.copy(x))
                   for x in [*values.values(), module._modules]
                   if isinstance(x, (dict, list))]
        before.append((module, values, entries))
    try:
        yield
    finally:
        for module, values, entries in before:
            for key in vars(module).keys() - own.keys() - values.keys():
                del vars(module)[key]
            vars(module).update(values)
            for value, old in entries:
                value.clear()
                (value.update if isinstance(value, dict) else value.extend)(
                    old)


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
    with _remembering(model), evaluation(model):
        classifies = _classifies(model, batches[0])
        if not classifies:
            train_deterministically(model)
        with torch.enable_grad(), _frozen(model), GradientRecorder(
                layers) as recorder:
            for index, data in enumerate(batches):
                inputs, samples = _prepare(model, data)
                # detectors draw among proposals, and queries to denoise
                torch.manual_seed(index)
                # in-place layers may not change a leaf
                total_loss(model, inputs + 0, samples, index,
                           classifies).backward()
                logger.info('Sensitivity: batch %d/%d', index + 1,
                            len(batches))
    recorder.finish()
