# Copyright (c) mmbasis authors. All rights reserved.
"""How far truncation moves outputs, and new statistics of batch
normalisations against that."""
from __future__ import annotations

import copy
from typing import Any, Callable, Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.logging import MMLogger
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.benchmark import Timer

from ..layers import BasisLayer, copy_module
from ..planning import Analysis
from ..running import adapter_of, evaluation
from ..utils.collectives import sum_over_processes
from .surgery import all_or_nothing, replace_modules


def recalibrate(model: nn.Module, batches: Sequence[Any]) -> None:
    """Compute the statistics of all batch normalisations of a model again, in
    place: as the average over batches, as the model takes them, and
    processes. If an error is raised, for example because a batch has one
    value per channel only, the model is as before."""
    norms, adapter = _norms(model), adapter_of(model)
    momenta = [norm.momentum for norm in norms]
    with all_or_nothing(nn.ModuleList(norms), values=True):
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
            statistics = [x for x in (norm.running_mean, norm.running_var)
                          if x is not None]
            sum_over_processes('recalibration', *statistics, op='mean')


def recalibrate_if_better(model: nn.Module, batches: Sequence[Any],
                          errors: Callable[[], Tensor]) -> bool:
    """Recalibrate, and take it back unless errors clearly fall by it: new
    statistics help after rough truncation, and add noise after reconstruction.

    Args:
        model (nn.Module): Changed in place, or as before.
        batches (Sequence): Batches for the statistics.
        errors (Callable): Errors of the model as it is, ``(N, )``, one for
            each of the same images (or batches), which are not among
            ``batches``.

    Returns:
        bool: Whether it helped: the mean error fell by more than twice its
        standard error, over all processes.
    """
    norms = _norms(model)
    if not norms:
        return False
    before = errors()
    states = [copy.deepcopy(norm.state_dict()) for norm in norms]
    with all_or_nothing(nn.ModuleList(norms), values=True):
        recalibrate(model, batches)
        change, margin = _change(before, errors())
        kept = change < -margin
        for norm, state in zip(norms, states):
            if not kept:
                norm.load_state_dict(state)
    MMLogger.get_current_instance().info(
        'Recalibration of batch normalisations changes the error on held-out '
        'images by %.4g, with a margin of %.4g: %s', change, margin,
        'kept' if kept else 'taken back')
    return kept


def _change(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Mean of a paired difference over all processes, and twice its standard
    error; this is 0 for a single pair."""
    rise = (after - before).double()
    sums = torch.tensor(
        [len(rise), rise.sum(), rise.square().sum()], dtype=torch.float64)
    sum_over_processes('errors on held-out images', sums)
    count = max(float(sums[0]), 1.)
    mean, square = (sums[1:] / count).tolist()
    variance = max(square - mean**2, 0.) / max(count - 1, 1.)
    return mean, 2 * variance**.5


def output_errors(model: nn.Module, reference: nn.Module,
                  batches: Sequence[Any]) -> Tensor:
    """How far a model's outputs are from the dense model's: the Kullback-
    Leibler divergence of a classifier's predictions, otherwise the normalised
    squared error of the output tensors.

    Args:
        model (nn.Module): The compressed model.
        reference (nn.Module): The dense model.
        batches (Sequence): Batches as both take them; may be empty.

    Returns:
        Tensor: The error of each image of this process, ``(N, )``; of each
        output tensor of each batch where its first axis is not that of images.
    """
    errors = []
    found, wanted = adapter_of(model), adapter_of(reference)
    with evaluation(model), evaluation(reference):
        for data in batches:
            images = found.count_images(data)
            # only the errors leave the device, not the outputs
            rows = [_rows(x.float(), y.float()).cpu() for x, y in zip(
                found.outputs(data), wanted.outputs(data))
                    if x.shape == y.shape]
            if rows and all(len(x) == images for x in rows):
                errors.append(torch.stack(rows).mean(0))
            else:
                errors.extend(x.mean().view(1) for x in rows)
    return torch.cat(errors) if errors else torch.zeros(0)


def output_error(model: nn.Module, reference: nn.Module,
                 batches: Sequence[Any]) -> float:
    """The mean of :func:`output_errors` over all processes."""
    errors = output_errors(model, reference, batches)
    total = torch.tensor([float(errors.sum()), len(errors)])
    sum_over_processes('errors on held-out images', total)
    return float(total[0] / total[1].clamp_min(1))


def single_truncations(model: nn.Module, analysis: Analysis,
                       batches: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Truncate one layer at a time of a copy of a dense model to half its full
    rank, on the subspace of its spectrum, and look at held-out batches.

    Yields:
        dict: ``name``, ``rank``, ``predicted`` (increase of the loss; energy
        lost where no sensitivity is known) and ``measured`` (see
        :func:`output_error`).
    """
    truncated = copy_module(model)
    for layer in analysis.selection.chosen:
        rank, known = layer.full_rank // 2, analysis.statistics[layer.name]
        if rank == 0 or known.spectrum is None:
            continue
        dense = truncated.get_submodule(layer.name)
        basis = BasisLayer(dense, rank, bias=True)
        basis.project(dense, known.spectrum.vectors, known.mean)
        replace_modules(truncated, {dense: basis})
        measured = output_error(truncated, model, batches)
        replace_modules(truncated, {basis: dense})
        lost = (known.spectrum.energy if known.sensitivity is None else
                known.sensitivity / 2)
        yield dict(name=layer.name, rank=rank, measured=measured,
                   predicted=float(lost[rank:].sum()))


def forward_latency(model: nn.Module, data: Any) -> float:
    """Median time of a forward pass of a batch on this machine, in
    milliseconds."""
    timer = Timer('adapter.outputs(data)', num_threads=torch.get_num_threads(),
                  globals=dict(adapter=adapter_of(model), data=data))
    with evaluation(model):
        return 1e3 * timer.blocked_autorange(min_run_time=1).median


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """The normalisations that keep statistics."""
    return [x for x in model.modules() if isinstance(x, _BatchNorm)
            and x.running_mean is not None
            and x.num_batches_tracked is not None]


def kl_divergence(student: Tensor, teacher: Tensor,
                  temperature: float = 1.) -> Tensor:
    """``T^2 KL(teacher || student)`` of predictions softened by a temperature
    ``T``, averaged over images (Hinton et al., 2015); logits have shape
    ``(N, ..., classes)``."""
    student = F.log_softmax(student.flatten(0, -2) / temperature, -1)
    teacher = F.log_softmax(teacher.flatten(0, -2) / temperature, -1)
    return temperature**2 * F.kl_div(
        student, teacher, reduction='batchmean', log_target=True)


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of features, each channel (axis 1) in units of the
    teacher's variance of it, so that layers and levels count alike."""
    return _normalized(student, teacher).mean()


def _normalized(student: Tensor, teacher: Tensor) -> Tensor:
    axes = [axis for axis in range(teacher.dim()) if axis != 1]
    # a single number, such as a loss, varies in no axis
    variance = (teacher.var(axes, unbiased=False, keepdim=True)
                if axes else teacher.square())
    return (student - teacher).square() / (variance + 1e-6)


def _rows(student: Tensor, teacher: Tensor) -> Tensor:
    """The error of an output, for each index of its first axis."""
    if student.dim() == 2:
        return torch.stack([kl_divergence(x[None], y[None])
                            for x, y in zip(student, teacher)])
    errors = _normalized(student, teacher)
    return errors.flatten(1).mean(1) if errors.dim() > 1 else errors.view(-1)
