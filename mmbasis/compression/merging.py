# Copyright (c) mmbasis authors. All rights reserved.
"""Merging for deployment, in models that hold basis layers.

Re-parameterised networks (RepVGG, MobileOne, LeViT, …) have methods that
merge convolutions with what surrounds them, which would turn basis layers into
dense ones again. So a block that holds basis layers is not merged: its middle
normalizations are folded. All other blocks are merged.
"""
from __future__ import annotations

import inspect
import sys
from functools import partial, wraps
from typing import Any

import mmcv.cnn
import torch
import torch.nn as nn

from ..layers import BasisLayer

#: methods without arguments that merge the module they belong to
MERGING_METHODS = ('switch_to_deploy', 'fuse', 'merge_kernel', 'local_inject',
                   'reparameterize')


def keep_structure(model: nn.Module) -> list[str]:
    """Have basis layers survive the merging methods of the modules around
    them, in this model and its copies.

    Returns:
        list[str]: The blocks that are not merged because of basis layers.
    """
    kept = []
    for name, module in model.named_modules():
        methods = _merging_methods(module)
        if methods and _basis_layers(module):
            for method in methods:
                override_merging(module, method)
            if not _is_merged_by_parts(module):
                kept.append(name)
    return kept


def override_merging(module: nn.Module, method: str) -> None:
    """Override a merging method of one instance, see :func:`_merge`."""
    vars(module)[method] = partial(_merge, module, method)


def _merge(module: nn.Module, method: str, *args, **kwargs) -> Any:
    """What a merging method does instead of its class's. It returns a module
    that is kept: ``fuse`` returns what takes the module's place."""
    layers = _basis_layers(module)
    for layer in layers:
        layer.fold_norm()
    if layers and not _is_merged_by_parts(module):
        return module
    own = getattr(type(module), method, None)
    result = None if own is None else own(module, *args, **kwargs)
    left = _basis_layers(result if isinstance(result, nn.Module) else module)
    if set(left) != set(layers):
        raise RuntimeError(
            f'{type(module).__name__}.{method}() merged basis layers, which '
            'loses their biases: load the model again and deploy it without '
            'that, or compress its deployed form')
    return result


def _merging_methods(module: nn.Module) -> list[str]:
    methods = [x for x in MERGING_METHODS if _takes_no_arguments(module, x)]
    # beside others, ``reparameterize`` only computes the merged weights
    if len(methods) > 1 and methods[-1] == 'reparameterize':
        methods.pop()
    return methods


def _takes_no_arguments(module: nn.Module, method: str) -> bool:
    """False of the ``fuse`` of mmdet's FPG, which fuses its arguments."""
    try:
        inspect.signature(getattr(type(module), method)).bind(module)
    except (AttributeError, TypeError):
        return False
    return True


def _is_merged_by_parts(module: nn.Module) -> bool:
    """Whether a module leaves merging to modules inside it."""
    return any(
        _merging_methods(x) for x in module.modules() if x is not module)


def _basis_layers(module: nn.Module) -> list[BasisLayer]:
    return [x for x in module.modules() if isinstance(x, BasisLayer)]


def _stand_in(layer: BasisLayer) -> nn.Conv2d:
    """What MMCV takes for a convolution with the outputs of a basis layer:
    whatever kind its last part is, a normalization behind fuses into this."""
    conv = nn.Conv2d(1, 1, 1, device='meta')
    conv.out_channels = layer.out_channels
    conv.weight = nn.Parameter(
        layer.last.weight.new_ones((layer.out_channels, 1, 1, 1)))
    conv.bias = layer.last.bias
    return conv


@torch.no_grad()
def _take_fused(layer: BasisLayer, conv: nn.Conv2d) -> None:
    """Scale a basis layer's output and set its bias as in its stand-in."""
    scale = conv.weight.reshape(layer.groups, -1, 1)
    layer.set_factors(*layer.factors[:-1], layer.factors[-1] * scale)
    layer.last.bias = conv.bias  # type: ignore[assignment]


def _repair_fuse_conv_bn() -> None:
    """Let MMCV fuse normalizations into basis layers: it would take the
    layer in front of a basis layer for the one to fuse into."""
    original = mmcv.cnn.fuse_conv_bn

    @wraps(original)
    def fuse_conv_bn(module: nn.Module) -> nn.Module:
        places = [(parent, name, child) for parent in module.modules()
                  for name, child in parent._modules.items()
                  if isinstance(child, BasisLayer)]
        layers = {layer for _, _, layer in places}
        stand_ins = {x: _stand_in(x.fold_norm()) for x in layers}
        for parent, name, layer in places:
            parent._modules[name] = stand_ins[layer]
        try:
            return original(module)
        finally:
            for parent, name, layer in places:
                parent._modules[name] = layer
            for layer, conv in stand_ins.items():
                _take_fused(layer, conv)

    for module in list(sys.modules.values()):
        if vars(module).get('fuse_conv_bn') is original:
            vars(module)['fuse_conv_bn'] = fuse_conv_bn


_repair_fuse_conv_bn()
