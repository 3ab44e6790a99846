# Copyright (c) mmbasis authors. All rights reserved.
"""What a run starts from."""
import enum
from dataclasses import dataclass
from typing import Any, Dict, Optional

from ..planning import BasePlanner, CompressionPlan
from .checkpoint import TEACHER_KEY, plan_of
from .recipe import Recipe


class Run(enum.Enum):
    """What kind of run it is."""
    TRAIN = 'training'
    RESUME = 'resuming'
    #: also under test-time augmentation: the plan is that of the model inside
    TEST = 'testing'


class Action(enum.Enum):
    """What is done with the model."""
    KEEP = 'its structure is right'
    FOLLOW = 'it takes the structure of a plan, then the weights'
    COMPRESS = 'its dense weights are compressed'


@dataclass(frozen=True)
class Source:
    """What a checkpoint is: its plan, None if it is dense, and the file of the
    dense weights, if it names one."""
    plan: Optional[CompressionPlan] = None
    teacher: Optional[str] = None

    @classmethod
    def of(cls, checkpoint: Dict[str, Any]) -> 'Source':
        """Of a checkpoint that was read; see :func:`plan_of` for errors."""
        meta = checkpoint.get('meta') or {}
        return cls(plan_of(checkpoint), meta.get(TEACHER_KEY))


@dataclass(frozen=True)
class Start:
    """What :func:`resolve` decided."""
    action: Action
    #: the structure that weights are loaded into; None of a dense model
    plan: Optional[CompressionPlan] = None
    #: what to log of a choice
    note: str = ''


def resolve(recipe: Recipe,
            checkpoint: Optional[Source],
            run: Run = Run.TRAIN,
            model: Optional[CompressionPlan] = None) -> Start:
    """Decide what a run starts from, between config and checkpoint.

    ======  ==========  ================  =================================
    run     checkpoint  recipe / model    start
    ======  ==========  ================  =================================
    train   dense/none  planner or plan   COMPRESS
    train   dense/none  nothing           error: nothing to do
    train   none        compressed model  KEEP
    train   dense       compressed model  error
    train   any         both of these     error, unless they agree
    train   plan B      nothing           FOLLOW B
    train   plan B      B or its planner  FOLLOW B, logged
    train   plan B      another one       error
    train   plan B      model of plan B   KEEP
    train   plan B      model of another  error
    resume  plan B      anything          FOLLOW B, or KEEP if the model has
                                          it; logged if it is not asked for
    resume  dense/none  anything          error
    test    plan B      anything          like resume
    test    dense       anything          error
    test    none        compressed model  KEEP
    test    none        dense model       error
    ======  ==========  ================  =================================

    Args:
        recipe (Recipe): What the config asks for.
        checkpoint (Source, optional): What is about to be loaded.
        run (Run): What kind of run it is. Defaults to training.
        model (CompressionPlan, optional): What the model was built with.

    Raises:
        RuntimeError, ValueError: In the cases of an error.
    """
    if run is Run.TRAIN:
        return _begin(recipe, checkpoint, model)
    return _go_on(run, recipe, checkpoint, model)


def _begin(recipe: Recipe, checkpoint: Optional[Source],
           model: Optional[CompressionPlan]) -> Start:
    if checkpoint is not None and checkpoint.plan is not None:
        return _from_compressed(recipe, checkpoint.plan, model)
    if model is not None:
        if checkpoint is not None:
            raise RuntimeError(
                'the checkpoint is dense, but the model is compressed: give '
                'a checkpoint that mmbasis wrote, or train the config of the '
                'dense model with a planner')
        _check_agreement(recipe, model, 'the model of the config')
        return Start(Action.KEEP, model)
    if recipe.planner is None and recipe.plan is None:
        raise RuntimeError(
            'BasisCompressionHook has nothing to do: give it a planner or a '
            'plan, or start from a compressed checkpoint')
    return Start(Action.COMPRESS)


def _go_on(run: Run, recipe: Recipe, checkpoint: Optional[Source],
           model: Optional[CompressionPlan]) -> Start:
    found = checkpoint.plan if checkpoint else None
    if found is None:
        if run is Run.RESUME:
            raise RuntimeError(
                'this run cannot be resumed from a dense checkpoint: it '
                'carries no compression plan. To start from dense weights '
                'use load_from without resume; to resume the latest '
                'checkpoint of work_dir, resume without load_from')
        if checkpoint is not None or model is None:
            raise RuntimeError(
                'the checkpoint under test is dense, but this config is of a '
                'compressed model: give a checkpoint that mmbasis wrote, or '
                'test the dense one with its own config')
        return Start(Action.KEEP, model)
    asked, agrees = model or recipe.plan, True
    if asked is not None:
        agrees = same_structure(asked, found)
    elif recipe.planner is not None:
        agrees = made_by(recipe.planner, found)
    note = '' if agrees else (
        f'{run.value.capitalize()} follows the plan of the checkpoint, not '
        'the one that the config asks for')
    keep = model is not None and agrees
    return Start(Action.KEEP if keep else Action.FOLLOW, found, note)


def _from_compressed(recipe: Recipe, found: CompressionPlan,
                     model: Optional[CompressionPlan]) -> Start:
    _check_agreement(recipe, found, 'the checkpoint')
    if model is not None:
        if not same_structure(model, found):
            raise ValueError(
                'the checkpoint is compressed by another plan than the model '
                'of the config: give the config that was written beside it '
                '(compressed.py), or a dense one')
        return Start(Action.KEEP, found)
    note = ('The checkpoint is compressed as the config asks for: it is not '
            'compressed again') if recipe.planner or recipe.plan else ''
    return Start(Action.FOLLOW, found, note)


def _check_agreement(recipe: Recipe, found: CompressionPlan,
                     owner: str) -> None:
    """Require that a recipe asks for the plan that is there."""
    if recipe.plan is not None and not same_structure(recipe.plan, found):
        raise ValueError(
            f'the config has a plan, but {owner} is compressed by another: '
            'to fine-tune it as it is, drop the plan; to follow the plan, '
            'start from dense weights')
    if recipe.planner is not None and not made_by(recipe.planner, found):
        raise ValueError(
            f'the config asks for {recipe.planner.config}, but {owner} is '
            f'compressed already, by {found.planner}: to fine-tune it as it '
            'is, drop the planner; to compress it further, start from dense '
            'weights or use ProgressiveTruncationHook')
    if recipe.norm and not found.norm:
        raise ValueError(f'norm=True is asked for, but {owner} has no '
                         'normalisation between basis and coefficients')


def same_structure(first: CompressionPlan, second: CompressionPlan) -> bool:
    """Whether two plans give a model the same parameters."""

    def structure(plan: CompressionPlan) -> tuple:
        layers = {k: (x.rank, x.bias) for k, x in plan.layers.items()}
        return layers, plan.norm, {k for k, x in plan.dense.items() if x.bias}

    return structure(first) == structure(second)


def made_by(planner: BasePlanner, plan: CompressionPlan) -> bool:
    """Whether a plan's record is that of a planner. Of one that mmbasis 0.1
    wrote, only what the planner was constructed with is compared."""
    record = dict(plan.planner)
    if 'metric' not in record and 'overrides' not in record:
        return planner.describe() == record
    if 'metric' in record:
        record[record['metric']] = record.get('budget')
    return all(record.get(k) == v for k, v in planner.config.items())
