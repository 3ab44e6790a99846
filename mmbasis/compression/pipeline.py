# Copyright (c) mmbasis authors. All rights reserved.
"""The way through: layers -> statistics -> spectra -> plan -> basis layers."""
import copy
import itertools
from typing import Any, Iterable, List, Optional, Sequence, Union

import torch.nn as nn
from mmengine.logging import MMLogger

from ..factorization import spectrum_of_factor
from ..planning import (BasePlanner, CompressionPlan, LayerInfo, PlanFollower,
                        UnknownLossError, calibrate, check_finite, find_layers,
                        record_gradients)
from ..registry import PLANNERS
from .reconstruction import Reconstruction
from .surgery import apply_plan, get_plan


def analyze(model: nn.Module, planner: BasePlanner,
            batches: Sequence[Any]) -> List[LayerInfo]:
    """Costs, spectra and sensitivities of all layers of a dense model.

    Args:
        model (nn.Module): The dense model; it is not changed.
        planner (BasePlanner): Says which layers it wants to know of, and
            whether their outputs on images and the loss matter.
        batches (Sequence): Batches as the model takes them. One is looked at
            where the weights alone decide.

    Returns:
        list[LayerInfo]: All convolution and linear layers.

    Raises:
        ValueError: If the model is compressed already, weights or outputs
            are not finite, or a pattern matches no layer.
    """
    if get_plan(model) is not None:
        raise ValueError('this model is compressed already')
    layers = find_layers(model)
    check_finite(layers)
    planner.select(model, layers)
    aware = planner.data_aware
    calibrate(model, layers, batches if aware else batches[:1], aware)
    for layer in layers:
        if layer.compressible and layer.spectrum is None:
            layer.spectrum = spectrum_of_factor(
                layer.kind.to_matrix(layer.module).detach())
    if planner.loss_aware is not False:
        try:
            record_gradients(model, layers, batches)
        except UnknownLossError as error:
            if planner.loss_aware:
                raise
            MMLogger.get_current_instance().warning(
                'Ranks are chosen by energy, not by loss: %s', error)
    return layers


def apply_with_data(model: nn.Module, plan: CompressionPlan,
                    layers: Sequence[LayerInfo], batches: Sequence[Any],
                    reconstruction: str) -> None:
    """Put a plan into a dense model.

    Args:
        model (nn.Module): The dense model, changed in place.
        plan (CompressionPlan): The plan.
        layers (Sequence[LayerInfo]): What :func:`analyze` returned.
        batches (Sequence): The batches it was given.
        reconstruction (str): ``'local'`` takes each basis from the spectrum
            of its layer; ``'sequential'`` then fits the layers one after the
            other to the dense model's outputs.
    """
    sequential = reconstruction == 'sequential'
    reference = copy.deepcopy(model) if sequential else None
    apply_plan(model, plan, layers)
    if sequential:
        Reconstruction(model, reference, layers, plan).run(batches)


def compress(model: nn.Module,
             planner: Union[BasePlanner, CompressionPlan, dict],
             dataloader: Iterable,
             num_batches: Optional[int] = None,
             norm: bool = False,
             reconstruction: Optional[str] = None) -> CompressionPlan:
    """Compress a trained model in place.

    Args:
        model (nn.Module): Any model; see :func:`mmbasis.planning.find_layers`
            for what is compressed.
        planner (BasePlanner | CompressionPlan | dict): A planner, its
            config, or a plan to follow.
        dataloader (Iterable): Calibration batches as the model takes them: a
            few hundred training images.
        num_batches (int, optional): How many batches to use. Defaults to all.
        norm (bool): Put a batch normalisation between basis and coefficients,
            as in the paper. Defaults to False.
        reconstruction (str, optional): ``'local'`` or ``'sequential'``, see
            :func:`apply_with_data`. Defaults to ``'sequential'`` for planners
            that look at data, otherwise to ``'local'``.

    Returns:
        CompressionPlan: What was done; the model carries it, too.

    Raises:
        ValueError: If the request cannot be met; the model is as before.
    """
    planner = as_planner(planner)
    reconstruction = check_reconstruction(reconstruction, planner)
    batches = list(itertools.islice(dataloader, num_batches))
    layers = analyze(model, planner, batches)
    plan = planner.plan(layers, norm=norm, bias=planner.data_aware)
    apply_with_data(model, plan, layers, batches, reconstruction)
    log_plan(plan)
    return plan


def check_reconstruction(value: Optional[str], planner: BasePlanner) -> str:
    """The way of reconstruction that is meant.

    Raises:
        ValueError: If there is no such way, or it needs data that the planner
            does not look at.
    """
    if value is None:
        return 'sequential' if planner.data_aware else 'local'
    if value not in ('local', 'sequential'):
        raise ValueError("reconstruction must be 'local' or 'sequential', but "
                         f'got {value!r}')
    return value


def as_planner(
        planner: Union[BasePlanner, CompressionPlan, dict]) -> BasePlanner:
    """A planner from its config, from a plan to follow, or itself."""
    if isinstance(planner, dict):
        # the default scope, say mmdet, knows no planners
        return PLANNERS.build(dict(planner, _scope_=PLANNERS.scope))
    if isinstance(planner, CompressionPlan):
        return PlanFollower(planner)
    return planner


def log_plan(plan: CompressionPlan) -> None:
    """Log what a plan saves and which layers stay dense for what reason."""
    logger = MMLogger.get_current_instance()
    for name, entry in plan.dense.items():
        logger.info('Layer %s stays dense: %s', name, entry.reason)
    totals = plan.totals()
    macs, params = totals['macs'], totals['params']
    logger.info(
        'Compressed %d of %d layers: MACs %.2f M -> %.2f M (%.1f %%), '
        'parameters %.3f M -> %.3f M (%.1f %%)', len(plan.layers),
        len(plan.layers) + len(plan.dense), macs['before'] / 1e6,
        macs['after'] / 1e6, 100 * macs['after'] / max(macs['before'], 1),
        params['before'] / 1e6, params['after'] / 1e6,
        100 * params['after'] / max(params['before'], 1))
