# Copyright (c) mmbasis authors. All rights reserved.
"""Statistics of batch normalisations after truncation."""
import copy
from typing import Any, Callable, List, Sequence

import torch
import torch.nn as nn
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MMLogger
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from ..running import adapter_of, evaluation
from ..utils.divergence import kl_divergence, normalized_mse


def norm_layers(model: nn.Module) -> List[_BatchNorm]:
    """The normalisations of a model that keep statistics."""
    return [
        module for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
        and module.num_batches_tracked is not None
    ]


def recalibrate(model: nn.Module, batches: Sequence[Any]) -> None:
    """Compute the statistics of all batch normalisations again, as the average
    over batches (and processes).

    Args:
        model (nn.Module): Changed in place.
        batches (Sequence): Batches as the model takes them.
    """
    norms, adapter = norm_layers(model), adapter_of(model)
    momenta = [norm.momentum for norm in norms]
    with evaluation(model):
        for norm in norms:
            norm.reset_running_stats()
            # average instead of moving average
            norm.momentum = None  # type: ignore[assignment]
            norm.training = True
        for data in batches:
            adapter.predict(data)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
        if get_world_size() > 1:
            for statistic in (norm.running_mean, norm.running_var):
                all_reduce(statistic, 'mean')


def recalibrate_if_better(model: nn.Module, batches: Sequence[Any],
                          error: Callable[[], float]) -> bool:
    """Recalibrate, and take it back unless an error falls by it: new
    statistics help after rough truncation, less after reconstruction.

    Args:
        model (nn.Module): Changed in place, or as before.
        batches (Sequence): Batches for the statistics.
        error (Callable): The error of the model as it is, on images that are
            not among them.

    Returns:
        bool: Whether it helped.
    """
    norms = norm_layers(model)
    if not norms:
        return False
    before = error()
    states = [copy.deepcopy(norm.state_dict()) for norm in norms]
    recalibrate(model, batches)
    after = error()
    kept = after < before
    if not kept:
        for norm, state in zip(norms, states):
            norm.load_state_dict(state)
    MMLogger.get_current_instance().info(
        'Recalibration of batch normalisations: error %.4g -> %.4g on '
        'held-out images, %s', before, after, 'kept' if kept else 'taken back')
    return kept


def output_error(model: nn.Module, reference: nn.Module,
                 batches: Sequence[Any]) -> float:
    """How far a model's outputs are from the dense model's: the Kullback-
    Leibler divergence of a classifier's predictions, otherwise the normalised
    squared error of the output tensors.

    Args:
        model (nn.Module): The compressed model.
        reference (nn.Module): The dense model.
        batches (Sequence): Batches as both take them; the error is the mean
            over these and over processes.
    """
    total = torch.zeros(2)  # of errors, and how many they are
    found, wanted = adapter_of(model), adapter_of(reference)
    with evaluation(model), evaluation(reference):
        for data in batches:
            for x, y in zip(found.outputs(data), wanted.outputs(data)):
                if x.shape == y.shape:
                    total += torch.stack([_distance(x, y), torch.tensor(1.)])
    if get_world_size() > 1:
        all_reduce(total)
    return float(total[0] / total[1].clamp_min(1))


def _distance(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.float().cpu(), y.float().cpu()
    return kl_divergence(x, y) if x.dim() == 2 else normalized_mse(x, y)
