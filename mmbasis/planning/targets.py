# Copyright (c) mmbasis authors. All rights reserved.
"""Layers that stay dense unless somebody asks for them."""
from typing import Any, Callable, Mapping, Set

import torch.nn as nn
from mmengine.logging import MMLogger

from ..running.graph import Targets, trace_targets
from .calibration import evaluation
from .sensitivity import remembering

#: Offset layers that no graph shows: type of the module around them, their
#: name in it, and the reason.
OFFSETS_BY_NAME = (
    ('MultiScaleDeformableAttention', 'attention_weights',
     'on a CPU, mmcv weights the samples outside of the operator'),
    ('ModulatedDeformRoIPoolPack', 'mask_fc.2',
     'mmcv weights the samples outside of the operator'),
)


def find_targets(model: nn.Module, layers: Mapping[str, nn.Module],
                 run: Callable[[], Any]) -> Targets:
    """Find the layers of a model that stay dense by default.

    Args:
        model (nn.Module): The dense model. Afterwards it is as before.
        layers (Mapping[str, nn.Module]): Its layers by name.
        run (Callable): Runs the model, and returns what it outputs before
            any post-processing, or its losses.

    Returns:
        Targets: Some of the names, see :func:`trace_targets`.
    """
    # the graph may hold what the model remembers of its outputs
    with remembering(model), evaluation(model):
        found = trace_targets(model, layers, run)
    if layers and not found.predictions:
        MMLogger.get_current_instance().warning(
            'No layer could be traced to what %s outputs, so none stays dense '
            'as a prediction layer: does it run without gradients? Name its '
            'prediction layers in exclude',
            type(model).__name__)
    return Targets(found.predictions, found.offsets | _named(model, layers))


def _named(model: nn.Module, layers: Mapping[str, nn.Module]) -> Set[str]:
    """Names of the layers in :data:`OFFSETS_BY_NAME`."""
    return {
        f'{name}.{child}'.lstrip('.')
        for name, module in model.named_modules()
        for type_name, child, _ in OFFSETS_BY_NAME
        if type(module).__name__ == type_name
    } & layers.keys()
