# Copyright (c) mmbasis authors. All rights reserved.
"""The way through: layers -> statistics -> spectra -> plan -> basis layers."""
import copy
import itertools
from typing import Any, Iterable, List, Optional, Sequence, Tuple, Union

import torch.nn as nn
from mmengine.logging import MMLogger

from ..factorization import spectrum_of_factor
from ..planning import (BasePlanner, CompressionPlan, LayerInfo, PlanFollower,
                        UnknownLossError, calibrate, check_finite, find_layers,
                        find_targets, record_gradients, tensor_outputs)
from ..planning.layers import NO_TARGETS
from ..registry import PLANNERS
from .recalibration import output_error, recalibrate, recalibrate_if_better
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
        ValueError: If the model is compressed already or trains a teacher
            beside itself, weights or outputs are not finite, or a pattern
            matches no layer.
    """
    if get_plan(model) is not None:
        raise ValueError('this model is compressed already')
    _refuse_two_copies(model)
    layers = find_layers(model)
    check_finite(layers)
    modules = {x.name: x.module for x in layers}
    targets = NO_TARGETS
    if batches and not (planner.prediction_layers or planner.include):
        targets = find_targets(model, modules,
                               lambda: tensor_outputs(model, batches[0]))
    planner.select(model, layers, targets)
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


def _refuse_two_copies(model: nn.Module) -> None:
    """Refuse a teacher that follows another part parameter by parameter (Soft
    Teacher, CAE): with ranks of its own, from another pass, it could not."""
    teacher = getattr(model, 'teacher', None)
    for name, child in model.named_children():
        if type(child) is type(teacher) and child is not teacher:
            raise ValueError(
                f'{type(model).__name__} holds two copies of a '
                f'{type(child).__name__}, {name} and teacher, which must stay '
                'alike in training: train it dense, then compress what comes '
                'out of it, with the config that uses that')


def compress(model: nn.Module,
             planner: Union[BasePlanner, CompressionPlan, dict],
             dataloader: Iterable,
             num_batches: Optional[int] = None,
             **kwargs) -> CompressionPlan:
    """Compress a trained model in place.

    Args:
        model (nn.Module): Any model; see :func:`mmbasis.planning.find_layers`
            for what is compressed.
        planner (BasePlanner | CompressionPlan | dict): A planner, its
            config, or a plan to follow.
        dataloader (Iterable): Calibration batches as the model takes them: a
            few hundred training images.
        num_batches (int, optional): How many batches to use; one more, if
            there is one, is held out for choices. Defaults to all, and none
            is held out.
        **kwargs: See :class:`Compressor`.

    Returns:
        CompressionPlan: What was done; the model carries it, too.

    Raises:
        ValueError: If the request cannot be met; the model is as before.
    """
    compressor = Compressor(planner, **kwargs)
    batches, held_out = take_batches(dataloader, num_batches)
    return compressor.run(model, batches, held_out)


def take_batches(dataloader: Iterable,
                 num_batches: Optional[int] = None,
                 num_held_out: int = 1) -> Tuple[List[Any], List[Any]]:
    """Batches for calibration, and others that are held out for choices.

    Args:
        dataloader (Iterable): Batches as the model takes them.
        num_batches (int, optional): How many to calibrate with. Defaults to
            all; none is held out then.
        num_held_out (int): How many to hold out, if there are so many.
            Defaults to 1.

    Returns:
        tuple[list, list]: The batches.
    """
    stop = None if num_batches is None else num_batches + num_held_out
    batches = list(itertools.islice(dataloader, stop))
    return batches[:num_batches], batches[len(batches[:num_batches]):]


class Compressor:
    """The steps of compression, and how they are to be done.

    Args:
        planner (BasePlanner | CompressionPlan | dict): See :func:`compress`.
        norm (bool): Put a batch normalisation between basis and coefficients,
            as in the paper. Defaults to False.
        reconstruction (str, optional): ``'local'`` takes each basis from the
            spectrum of its layer; ``'sequential'`` then fits the layers one
            after the other to the dense model's outputs. Defaults to
            ``'sequential'`` for planners that look at data, otherwise to
            ``'local'``.
        recalibration (bool | str): Whether to compute the statistics of the
            model's batch normalisations anew at the end; ``'auto'`` keeps
            them if they bring the outputs on held-out images nearer to the
            dense model's, and does nothing for planners that do not look at
            data. Defaults to ``'auto'``.

    Raises:
        ValueError: If a value is out of range.
    """

    def __init__(self,
                 planner: Union[BasePlanner, CompressionPlan, dict],
                 norm: bool = False,
                 reconstruction: Optional[str] = None,
                 recalibration: Union[bool, str] = 'auto') -> None:
        self.planner = as_planner(planner)
        self.norm = norm
        if reconstruction is None:
            reconstruction = ('sequential'
                              if self.planner.data_aware else 'local')
        if reconstruction not in ('local', 'sequential'):
            raise ValueError("reconstruction must be 'local' or 'sequential', "
                             f'but got {reconstruction!r}')
        self.reconstruction = reconstruction
        if recalibration not in (True, False, 'auto'):
            raise ValueError("recalibration must be True, False or 'auto', "
                             f'but got {recalibration!r}')
        self.recalibration = recalibration
        #: layers of the dense model with spectra, after :meth:`run`
        self.layers: List[LayerInfo] = []

    def run(self, model: nn.Module, batches: Sequence[Any],
            held_out: Sequence[Any]) -> CompressionPlan:
        """Compress a model in place.

        Args:
            model (nn.Module): The dense model.
            batches (Sequence): Calibration batches as the model takes them.
            held_out (Sequence): Others, for choices; may be empty.

        Returns:
            CompressionPlan: What was done.
        """
        planner = self.planner
        self.layers = analyze(model, planner, batches)
        plan = planner.plan(
            self.layers, norm=self.norm, bias=planner.data_aware)
        sequential = self.reconstruction == 'sequential'
        choose = (
            self.recalibration == 'auto' and planner.data_aware
            and bool(held_out))
        reference = copy.deepcopy(model) if sequential or choose else None
        apply_plan(model, plan, self.layers)
        if sequential:
            Reconstruction(model, reference, self.layers, plan).run(batches)
        if choose:
            recalibrate_if_better(
                model, batches,
                lambda: output_error(model, reference, held_out))
        elif self.recalibration is True:
            recalibrate(model, batches)
        log_plan(plan)
        return plan


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
