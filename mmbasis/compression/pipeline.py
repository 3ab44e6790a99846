# Copyright (c) mmbasis authors. All rights reserved.
"""The way through: layers -> statistics -> plan -> basis layers -> fit."""
from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import Any, Iterable, Iterator, Sequence

import torch.nn as nn
from mmengine.logging import MMLogger
from torch import Tensor

from .. import planning, running
from ..layers import copy_module
from ..planning import Analysis, CompressionPlan, Layer, Selection
from ..quirks import two_copies
from ..utils.collectives import shared_errors, together
from ..utils.schema import COUNT, NONE, of_type, shown
from .recalibration import output_errors, recalibrate, recalibrate_if_better
from .recipe import PlannerLike, Recipe, as_planner
from .reconstruction import Reconstruction
from .surgery import all_or_nothing, apply_plan, get_plan


def compress(model: nn.Module, planner: PlannerLike | CompressionPlan,
             dataloader: Iterable, num_batches: int | None = None,
             **recipe: Any) -> CompressionPlan:
    """Compress a trained model in place.

    Args:
        model (nn.Module): Any model, see :func:`mmbasis.planning.find_layers`
            and :mod:`mmbasis.running`.
        planner (BasePlanner | CompressionPlan | dict): A planner, its
            config, or a plan to follow.
        dataloader (Iterable): Calibration batches as the model takes them: a
            few hundred training images.
        num_batches (int, optional): See :func:`take_batches`.
        **recipe: ``reconstruction``, ``recalibration`` and ``norm`` of
            :class:`~mmbasis.compression.Recipe`.

    Returns:
        CompressionPlan: What was done; the model carries it, too.

    Raises:
        ValueError: If the request cannot be met. Whatever is raised, the
            model is as before.
    """
    of_type('a torch.nn.Module', nn.Module).check('model', model)
    with _as_a_whole(model):
        if isinstance(planner, CompressionPlan):
            made = Recipe.of(plan=planner, **recipe)
        else:
            made = Recipe.of(planner=as_planner(planner), **recipe)
        batches = take_batches(dataloader, num_batches)
        return _run_recipe(model, made, *batches)[0]


@contextmanager
def _as_a_whole(model: nn.Module) -> Iterator[None]:
    """Compress in all processes or in none: what fails in one, also as they
    meet at the end, leaves the model as before in all."""
    with all_or_nothing(model, values=True), shared_errors('compression'):
        yield


def take_batches(dataloader: Iterable, num_batches: int | None = None,
                 num_held_out: int = 1) -> tuple[list[Any], list[Any]]:
    """Batches of a loader for calibration, and others that are held out for
    choices.

    Args:
        dataloader (Iterable): Batches as the model takes them.
        num_batches (int, optional): How many to calibrate with. Defaults to
            all; none is held out then.
        num_held_out (int): How many to hold out at most. Defaults to 1.
    """
    (COUNT | NONE).check('num_batches', num_batches)
    if not hasattr(dataloader, '__iter__') and not hasattr(
            dataloader, '__getitem__'):
        raise TypeError('dataloader must be an iterable of batches, but got '
                        f'{shown(dataloader)}')
    batches = iter(dataloader)
    if num_batches is None:
        return list(batches), []
    return (list(itertools.islice(batches, num_batches)),
            list(itertools.islice(batches, num_held_out)))


def analyze(model: nn.Module, recipe: Recipe,
            batches: Sequence[Any]) -> Analysis:
    """Measure all layers of a dense model.

    Args:
        model (nn.Module): The dense model; it is not changed.
        recipe (Recipe): Says which layers count, and whether their outputs
            on images and the loss matter.
        batches (Sequence): Batches as the model takes them, at least one.

    Raises:
        RuntimeError: If there are no batches.
        ValueError: If the model is compressed already or trains a teacher
            beside itself, weights or outputs are not finite, or a pattern
            matches no layer.
    """
    problem = two_copies(model)
    if get_plan(model) is not None:
        problem = 'this model is compressed already'
    if problem:
        raise ValueError(problem)
    if not batches:
        raise RuntimeError('calibration saw no image: the dataloader is empty')
    adapter, layers = running.adapter_of(model), planning.find_layers(model)
    planning.check_finite(model)
    selection = _select(adapter, recipe, layers, batches[0])
    analysis = planning.measure(
        adapter, selection, batches, recipe.data_aware, recipe.forms)
    try:
        if recipe.loss_aware is not False:
            analysis = planning.measure_sensitivity(adapter, analysis, batches)
    except running.UnknownLossError as error:
        if recipe.loss_aware:
            raise
        MMLogger.get_current_instance().warning(
            'Ranks are chosen by energy, not by loss: %s', error)
    return planning.with_columns(analysis, recipe.forms)


def _select(adapter: running.Adapter, recipe: Recipe, layers: Sequence[Layer],
            data: Any) -> Selection:
    rules = recipe.planner.rules if recipe.planner else planning.Rules()
    targets = running.Targets(set(), set())
    if rules.need_targets:
        targets = find_targets(adapter, layers, data)
    selection = (recipe.planner or rules).select(layers, targets)
    return _follow(recipe.plan, selection) if recipe.plan else selection


def find_targets(adapter: running.Adapter, layers: Sequence[Layer],
                 data: Any) -> running.Targets:
    """Find the layers that make predictions, and those that say where others
    sample: from the training loss, which all predictions reach, or from the
    outputs where there is no loss. All processes return the same."""
    model, logger = adapter.model, MMLogger.get_current_instance()
    modules = {x.name: x.module for x in layers}

    with running.undisturbed(model), running.evaluation(model):
        try:
            running.train_deterministically(model)
            found = running.trace_targets(model, modules,
                                          lambda: adapter.loss(data))
        except Exception as error:  # of missing annotations, for example
            logger.info('No loss shows the prediction layers: %s', error)
            model.eval()
            found = running.trace_targets(model, modules,
                                          lambda: _outputs(adapter, data))
    if layers and not found.predictions:
        logger.warning(
            'No layer could be traced to the outputs of %s, so none stays '
            'dense as a prediction layer: does it run without gradients? '
            'Name its prediction layers in exclude',
            type(model).__name__)
    return together('search for prediction layers', found)[0]


def _outputs(adapter: running.Adapter, data: Any) -> Sequence[Tensor]:
    """The outputs of a model; none of one that runs without gradients."""
    try:
        return adapter.outputs(data)
    except RuntimeError as error:
        if 'requires grad' not in str(error):
            raise
        return []


def _follow(plan: CompressionPlan, selection: Selection) -> Selection:
    """The selection of a plan that is there already. Layers that its planner
    kept dense stay chosen: they are fitted as they were."""
    chosen = {*plan.layers, *(k for k, x in plan.dense.items()
                              if x.compressible)}
    reasons = {k: x.reason for k, x in plan.dense.items()}
    return Selection(selection.layers, {
        x.name: selection.excluded.get(x.name, planning.Exclusion(
            planning.Reason.NOT_IN_PLAN,
            reasons.get(x.name, 'not in the plan')))
        for x in selection.layers if x.name not in chosen})


def run_recipe(model: nn.Module, recipe: Recipe, batches: Sequence[Any],
               held_out: Sequence[Any]) -> tuple[CompressionPlan, Analysis]:
    """Compress a model in place, as a recipe says.

    Args:
        model (nn.Module): The dense model; as before if an error is raised.
        recipe (Recipe): With a planner or a plan.
        batches (Sequence): Calibration batches as the model takes them.
        held_out (Sequence): Others, for choices; may be empty, and in a
            distributed run on some of the processes alone.

    Returns:
        tuple[CompressionPlan, Analysis]: The plan that the model follows now,
        and what was known of the dense model.
    """
    with _as_a_whole(model):
        return _run_recipe(model, recipe, batches, held_out)


def _run_recipe(
        model: nn.Module, recipe: Recipe, batches: Sequence[Any],
        held_out: Sequence[Any]) -> tuple[CompressionPlan, Analysis]:
    analysis = analyze(model, recipe, batches)
    plan = make_plan(recipe, analysis)
    choose = recipe.recalibration == 'auto' and recipe.data_aware and any(
        together('choice of held-out images', bool(held_out)))
    reference = model
    if recipe.is_sequential or choose:
        reference = copy_module(model)
    apply_plan(model, plan, bases_of(analysis))
    if recipe.is_sequential:
        Reconstruction(model, reference, analysis).run(batches)
    if choose:
        recalibrate_if_better(
            model, batches,
            lambda: output_errors(model, reference, held_out))
    if recipe.recalibration is True:
        recalibrate(model, batches)
    log_plan(plan)
    return plan, analysis


def make_plan(recipe: Recipe, analysis: Analysis) -> CompressionPlan:
    """The plan of a recipe, or of its planner; coefficients get a bias where
    data say what it should be."""
    if recipe.planner is None:
        assert recipe.plan is not None, 'a recipe without planner and plan'
        return recipe.plan
    form = planning.Form(bias=recipe.data_aware, norm=recipe.norm)
    return recipe.planner.plan(analysis, form)


def bases_of(analysis: Analysis) -> dict:
    """Directions and mean of each layer's output, and directions of its input
    and of its windows' columns, for :func:`apply_plan`."""
    return {name: (known.spectrum.vectors, known.mean, known.inputs,
                   known.columns)
            for name, known in analysis.statistics.items()
            if known.spectrum is not None}


def log_plan(plan: CompressionPlan) -> None:
    """Log what a plan saves, in MACs and in predicted time, and why layers
    stay dense."""
    logger = MMLogger.get_current_instance()
    for name, entry in plan.dense.items():
        logger.info('Layer %s stays dense: %s', name, entry.reason)
    saved = [f'{key} {x["before"] / 1e6:.4g} M -> {x["after"] / 1e6:.4g} M '
             f'({x["after"] / max(x["before"], 1):.1%})'
             for key, x in plan.totals().items()]
    logger.info('Compressed %d of %d layers: %s', len(plan.layers),
                len(plan.layers) + len(plan.dense), ', '.join(saved))
    times = [f'{name} {x["after"] / x["before"]:.2f}x'
             for name, x in plan.predicted_ms.items()]
    if times:
        logger.info('Predicted time, of dense: %s',
                    ', '.join(times))
