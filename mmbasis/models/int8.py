# Copyright (c) mmbasis authors. All rights reserved.
"""Int8 while a model is trained: what the device will round is rounded.

Krishnamoorthi, "Quantizing deep convolutional networks for efficient
inference", 2018: symmetric, per tensor for what a layer reads, per output
channel for its weights. A batch normalisation that the export folds into the
weights scales each channel and its step alike, so it needs no care here.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Iterable, Mapping

import torch
import torch.nn as nn
from torch import Tensor

from ..compression.start import meta_of
from ..running import adapter_of, evaluation
from ..utils.collectives import sum_over_processes

#: where :class:`InputScales` stand in ``checkpoint['meta']``
INT8_KEY = 'mmbasis_int8'
#: layers whose inputs and weights are int8
LAYERS = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear
_VERSION = 1


@dataclass(frozen=True)
class InputScales:
    """All that int8 has to know beside the weights, and all the state of a
    training in int8: what one step of int8 is worth.

    Args:
        layers (Mapping[str, float]): By name of a layer in the bare model
            (parts of basis layers have their own, ``'conv1.basis'``), the
            step of its input; 127 steps are the largest magnitude.
    """
    layers: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """In plain types, for ``checkpoint['meta'][INT8_KEY]``."""
        return dict(version=_VERSION, layers=dict(self.layers))

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> InputScales | None:
        """Of a checkpoint that was read; None if it was not trained in int8.

        Raises:
            ValueError: If they are malformed or of a newer version.
        """
        data = meta_of(checkpoint).get(INT8_KEY)
        if data is None:
            return None
        layers = data.get('layers') if isinstance(data, dict) else None
        if (not isinstance(layers, dict) or data.get('version') != _VERSION
                or not all(isinstance(k, str) and isinstance(v, float)
                           and 0 < v < math.inf for k, v in layers.items())):
            raise ValueError(
                f'meta[{INT8_KEY!r}] of the checkpoint must be version '
                f'{_VERSION} with a positive number for each layer, but got '
                f'{str(data)[:200]}: it is damaged, or of a newer mmbasis')
        return cls(layers)


def measure_scales(model: nn.Module, batches: Iterable[Any]) -> InputScales:
    """Calibrate: the largest magnitude that each layer reads, over batches as
    the model takes them and over the processes of a distributed run. Layers
    that are not called in prediction, or read zeros alone, are left out."""
    layers = {name: x for name, x in model.named_modules()
              if isinstance(x, LAYERS)}
    weight = next(model.parameters()).float()
    largest = {name: weight.new_zeros(()) for name in layers}

    def watch(name: str) -> Any:

        def hook(_: nn.Module, args: tuple) -> None:
            if args[0].numel():  # two-stage detectors may find nothing
                seen = args[0].detach().abs().max().to(largest[name])
                largest[name] = torch.maximum(largest[name], seen)

        return hook

    handles = [x.register_forward_pre_hook(watch(name))
               for name, x in layers.items()]
    adapter = adapter_of(model)
    try:
        with evaluation(model):
            for data in batches:
                adapter.predict(data)
    finally:
        for handle in handles:
            handle.remove()
    found = torch.stack([*largest.values(), weight.new_zeros(())])
    sum_over_processes('calibration of int8', found, op='max')
    return InputScales({name: float(x) / 127
                        for name, x in zip(largest, found.tolist()) if x > 0})


class FakeQuantization:
    """Layers of a model compute with values that int8 can hold, in training
    and in evaluation; gradients pass through the rounding (straight-through
    estimator), and not where values are clipped.

    The parameters stay what and where they are: names in checkpoints, the
    optimizer and averages of the model know nothing of this.

    Args:
        model (nn.Module): The bare model.
        scales (InputScales): Says which layers, and their steps.

    Raises:
        ValueError: If the model lacks one of the layers.
    """

    def __init__(self, model: nn.Module, scales: InputScales) -> None:
        modules = dict(model.named_modules())
        missing = [x for x in scales.layers
                   if not isinstance(modules.get(x), LAYERS)]
        if missing:
            raise ValueError(
                f'the scales of int8 are of another model: it has no layers '
                f'{missing[:3]} ({len(missing)} of {len(scales.layers)}). '
                'Give the checkpoint that belongs to the config')
        self._handles = []
        for name, step in scales.layers.items():
            rounding = _Rounding(step)
            self._handles += [
                modules[name].register_forward_pre_hook(rounding.begin),
                modules[name].register_forward_hook(
                    rounding.end, always_call=True)]

    def remove(self) -> None:
        """Compute with all digits again."""
        for handle in self._handles:
            handle.remove()


class _Rounding:
    """What happens before and after the call of a layer."""

    def __init__(self, step: float) -> None:
        self.step = step

    def begin(self, layer: nn.Module, args: tuple) -> tuple:
        # hides the parameter, which is found in a dict that is asked later
        vars(layer)['weight'] = _round_weight(
            layer.get_parameter('weight'))
        x = args[0]
        rounded = torch.fake_quantize_per_tensor_affine(
            x.float(), self.step, 0, -128, 127)
        return (rounded.to(x.dtype), *args[1:])

    def end(self, layer: nn.Module, *_: Any) -> None:
        vars(layer).pop('weight', None)


def _round_weight(weight: Tensor) -> Tensor:
    largest = weight.detach().flatten(1).abs().amax(1).float()
    step = largest.clamp(min=torch.finfo(torch.float32).tiny * 128) / 127
    return torch.fake_quantize_per_channel_affine(
        weight.float(), step, torch.zeros_like(step, dtype=torch.int32), 0,
        -127, 127).to(weight.dtype)
