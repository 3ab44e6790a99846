# Copyright (c) mmbasis authors. All rights reserved.
"""What a few batches say of each layer: positions, and moments of outputs."""
import random
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterator, List, Sequence, Tuple

import numpy as np
import torch
import torch.nn as nn
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MMLogger
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ..factorization import spectrum_of_factor, spectrum_of_moment
from ..layers import observe
from .layers import LayerInfo

#: Positions of one image that a layer's moments are computed from. More add
#: time, not accuracy: neighbours are alike.
MAX_POSITIONS = 256


def chosen_positions(count: int, device: torch.device) -> Tensor:
    """Which of a number of positions are looked at, at most ``MAX_POSITIONS``.

    They are drawn at random (a regular grid would see only one phase of a
    strided transposed convolution), the same for each image, so that the
    result does not depend on how images are split into batches.
    """
    if count <= MAX_POSITIONS:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(count)
    chosen = torch.randperm(count, generator=generator)
    return chosen[:MAX_POSITIONS].to(device)


def sample_positions(x: Tensor, axis: int, groups: int) -> Tensor:
    """Channels of the chosen positions of each image.

    Args:
        x (Tensor): Output of a layer.
        axis (int): The axis of the channels.
        groups (int): ``G``.

    Returns:
        Tensor: Shape ``(G, C / G, positions)``, float32.
    """
    axis %= x.dim()
    x = x.unsqueeze(0) if axis == 0 else x
    axis = max(axis, 1)
    x = x.movedim(axis, 1).flatten(2) if x.dim() > 2 else x.unsqueeze(-1)
    if x.shape[-1] > MAX_POSITIONS:
        x = x[..., chosen_positions(x.shape[-1], x.device)]
    return _by_group(x, groups)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """``(N, G * C, positions)`` as ``(G, C, N * positions)``, float32."""
    x = x.float().transpose(0, 1).flatten(1)
    return x.view(groups, -1, x.shape[-1])


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """``sum left right^T`` over positions, in float64.

    The fast product is of centred float32 samples; what the means contribute
    is added in float64. Where means dwarf deviations, a plain product would
    round the covariance away.

    Args:
        left (Tensor): Shape ``(G, M, positions)``.
        right (Tensor): Shape ``(G, N, positions)``.

    Returns:
        Tensor: Shape ``(G, M, N)``.
    """
    count = left.shape[-1]
    shift_l, left, rest_l = _centre(left)
    shift_r, right, rest_r = _centre(right)
    products = (left @ right.mT).double()
    products += shift_l @ rest_r.mT + rest_l @ shift_r.mT
    return products + count * shift_l @ shift_r.mT


def _centre(samples: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """Means in float32 precision, deviations from them, and what these sum up
    to, since rounded means miss the true ones."""
    mean = samples.mean(-1, True)
    samples = samples - mean
    return mean.double(), samples, samples.sum(-1, True).double()


@dataclass
class Moments:
    """Sums over positions of a layer's outputs, or of its inputs where these
    are fewer (an expansion), in float64.

    Args:
        of_input (bool): Whether the moments are those of the input.
        count (Tensor): Number of positions, a scalar.
        total (Tensor): Sum, shape ``(G, N)``.
        second (Tensor): Sum of outer products, shape ``(G, N, N)``.
    """
    of_input: bool
    count: Tensor
    total: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, layer: LayerInfo) -> 'Moments':
        """Moments of nothing, on the device of the layer's weights."""
        of_input = is_expansion(layer)
        groups, rows, in_size = layer.matrix_shape
        size = in_size if of_input else rows
        zeros = layer.module.weight.new_zeros
        kwargs = dict(dtype=torch.float64)
        return cls(of_input, zeros((), **kwargs),
                   zeros((groups, size), **kwargs),
                   zeros((groups, size, size), **kwargs))

    def add(self, samples: Tensor) -> None:
        """Add samples of shape ``(G, N, positions)``."""
        count = samples.shape[-1]
        mean, samples, rest = _centre(samples)
        total = count * mean + rest
        self.count += count
        self.total += total.squeeze(-1)
        self.second += (samples @ samples.mT).double()
        self.second += mean @ total.mT + rest @ mean.mT

    def reduce(self) -> None:
        """Sum over all processes."""
        for tensor in (self.count, self.total, self.second):
            all_reduce(tensor)

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        mean = self.mean.unsqueeze(-1)
        return self.second / self.count - mean @ mean.mT


def is_expansion(layer: LayerInfo) -> bool:
    """Whether a layer maps few inputs to more outputs, so that its inputs are
    the cheaper ones to look at."""
    _, rows, in_size = layer.matrix_shape
    return in_size < rows and layer.kind.sees_patches(layer.module)


def output_samples(layer: LayerInfo, y: Tensor) -> Tensor:
    """Samples of a layer's output, shape ``(G, P / G, positions)``."""
    return sample_positions(y, layer.kind.channel_axis(layer.module),
                            layer.matrix_shape[0])


def input_samples(layer: LayerInfo, x: Tensor, y: Tensor) -> Tensor:
    """Patches of a layer's input at the positions of :func:`output_samples`.

    Args:
        layer (LayerInfo): A layer that sees patches.
        x (Tensor): Its input.
        y (Tensor): Its output; only the shape counts.

    Returns:
        Tensor: Shape ``(G, D, positions)``: ``H`` times it is the output
        without bias.
    """
    module, kind = layer.module, layer.kind
    axis = kind.channel_axis(module) % y.dim()
    if axis == 0:
        x, y, axis = x.unsqueeze(0), y.unsqueeze(0), 1
    shape = [size for i, size in enumerate(y.shape) if i not in (0, axis)]
    positions = chosen_positions(int(np.prod(shape)), x.device)
    return _by_group(
        kind.patches(module, x, shape, positions), layer.matrix_shape[0])


class LayerRecorder:
    """Record, over forward passes, what planning needs of each layer.

    Use it as a context manager around the passes.

    Args:
        layers (Sequence[LayerInfo]): The layers; on leaving, their positions
            are filled in, per image.
        moments (bool): Collect moments of the compressible layers, too.
    """

    def __init__(self, layers: Sequence[LayerInfo], moments: bool) -> None:
        self.layers = layers
        self.moments = {
            layer.name: Moments.zeros(layer)
            for layer in layers if moments and layer.compressible
        }
        self.images = self.passes = 0
        self._positions = {
            layer.name: torch.zeros(3, dtype=torch.float64)
            for layer in layers
        }
        self._handles: List[Any] = []

    def __enter__(self) -> 'LayerRecorder':
        for layer in self.layers:

            def hook(module, args, kwargs, output, layer=layer):
                x = args[0] if args else next(iter(kwargs.values()))
                self._record(layer, x, output)

            self._handles.append(observe(layer.module, hook))
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, layer: LayerInfo, x: Tensor, y: Tensor) -> None:
        module = layer.module
        channels = getattr(module, 'out_channels', None)
        out_positions = y.numel() // (channels or module.out_features)
        weight_positions = out_positions
        if layer.kind is not None:
            weight_positions = layer.kind.weight_positions(module, x, y)
        self._positions[layer.name] += torch.tensor(
            [weight_positions, out_positions, 1], dtype=torch.float64)
        if layer.name in self.moments:
            self._add_moments(layer, x, y)

    def _add_moments(self, layer: LayerInfo, x: Tensor, y: Tensor) -> None:
        moments = self.moments[layer.name]
        moments.add(
            input_samples(layer, x, y) if moments.
            of_input else output_samples(layer, y))

    def finish(self) -> None:
        """Sum over processes and write the results into the layers.

        Raises:
            RuntimeError: If no image was seen.
            ValueError: If a layer put out NaN or infinite values.
        """
        seen = torch.tensor([float(self.images), float(self.passes)]).double()
        if get_world_size() > 1:
            table = torch.stack([p for p in self._positions.values()])
            all_reduce(table)
            all_reduce(seen)
            self._positions = dict(zip(self._positions, table))
            for layer in self.layers:
                if layer.name in self.moments:
                    self.moments[layer.name].reduce()
        images, passes = seen.tolist()
        if images == 0:
            raise RuntimeError('calibration saw no image: the dataloader is '
                               'empty')
        for layer in self.layers:
            *positions, calls = self._positions[layer.name].tolist()
            layer.weight_positions = positions[0] / images
            layer.out_positions = positions[1] / images
            layer.calls = calls / passes
            if layer.compressible and layer.weight_positions == 0:
                layer.reason = 'not used in the forward pass'
            if layer.compressible and layer.name in self.moments:
                self._fill_spectrum(layer)

    def _fill_spectrum(self, layer: LayerInfo) -> None:
        moments = self.moments.pop(layer.name)
        covariance, mean = moments.covariance, moments.mean
        if not torch.isfinite(covariance).all():
            raise ValueError(f'{layer.name} puts out NaN or infinite values '
                             'on the calibration images')
        matrix = layer.kind.to_matrix(layer.module).detach().double()
        if moments.of_input:
            layer.spectrum = spectrum_of_factor(matrix, covariance)
            layer.mean = (matrix @ mean.unsqueeze(-1)).squeeze(-1)
        else:
            layer.spectrum = spectrum_of_moment(covariance, matrix)
            layer.mean = mean
            if layer.module.bias is not None:
                bias = layer.module.bias.detach().double()
                layer.mean = mean - bias.view_as(mean)


def count_images(data: Any) -> int:
    """Number of images in a batch of a dataloader."""
    if isinstance(data, dict):
        data = data.get('inputs', next(iter(data.values())))
    elif isinstance(data, (tuple, list)):
        data = data[0]
    return len(data)


def forward_batch(model: nn.Module, data: Any) -> Any:
    """Run a model on a batch: an MMEngine model through its ``test_step``,
    any other by calling it.

    Args:
        model (nn.Module): The model.
        data (Any): What its dataloader yields; for a plain module a tensor,
            or a tuple whose first entry is the input.
    """
    if hasattr(model, 'test_step'):
        return model.test_step(data)
    if isinstance(data, dict):
        return model(**data)
    return model(data[0] if isinstance(data, (tuple, list)) else data)


def tensor_outputs(model: nn.Module, data: Any) -> Any:
    """What a model puts out before any post-processing: a classifier's
    logits, a detector's maps; predictions where a model has nothing else to
    show, as trackers have not."""
    if not hasattr(model, 'data_preprocessor'):
        return forward_batch(model, data)
    prepared = model.data_preprocessor(data, False)
    try:
        return model(
            prepared['inputs'], prepared.get('data_samples'), mode='tensor')
    except NotImplementedError:
        return forward_batch(model, data)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random states of Python,
    NumPy and PyTorch are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), torch.no_grad():
        model.eval()
        try:
            yield
        finally:
            # for those that do more in train() than to set a flag (LeViT)
            model.train(modes[model])
            for module, mode in modes.items():
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)


def train_deterministically(model: nn.Module) -> None:
    """Put a model in training mode, but what changes with the batch or by
    chance in evaluation mode: normalisations, dropout, stochastic depth.

    A loss, and whatever is compared with what a model puts out in training,
    needs that mode: heads put out other things (VFNet, RepPoints), or the same
    in other units (FCOS), in evaluation mode.

    Args:
        model (nn.Module): The model, changed in place.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, (_NormBase, _DropoutNd, nn.MultiheadAttention
                               )) or type(module).__name__.startswith('Drop'):
            module.eval()


def calibrate(model: nn.Module,
              layers: Sequence[LayerInfo],
              batches: Sequence[Any],
              moments: bool = True) -> None:
    """Fill in positions and, with ``moments``, spectra of layers.

    In a distributed run each process passes its part of the images; all end
    with the same statistics.

    Args:
        model (nn.Module): The dense model.
        layers (Sequence[LayerInfo]): Its layers, changed in place.
        batches (Sequence): Batches, as the model takes them.
        moments (bool): False if only costs are wanted.

    Raises:
        RuntimeError: If there are no batches.
        ValueError: If an output is not finite.
    """
    logger = MMLogger.get_current_instance()
    with evaluation(model), LayerRecorder(layers, moments) as recorder:
        for index, data in enumerate(batches):
            forward_batch(model, data)
            recorder.images += count_images(data)
            recorder.passes += 1
            logger.info('Calibration: batch %d/%d, %d images', index + 1,
                        len(batches), recorder.images)
    recorder.finish()
