# Copyright (c) mmbasis authors. All rights reserved.
"""What a run starts from: checkpoints, and who decides on the structure."""
from __future__ import annotations

import enum
import io
import os.path as osp
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from mmengine.runner import checkpoint as mmengine_checkpoint

from ..planning import BasePlanner, CompressionPlan
from ..utils import NotDataError, find_weights
from ..utils.io import sha256_of, write_atomically
from ..utils.schema import of_type
from .recipe import Recipe

#: where the plan stands in ``checkpoint['meta']``
META_KEY = 'mmbasis'
#: where the file of the dense weights is named
TEACHER_KEY = 'mmbasis_teacher'
#: the SHA-256 of that file when the run began
TEACHER_HASH_KEY = 'mmbasis_teacher_sha256'


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint: a local file, or a URL; see
    :func:`mmbasis.utils.find_weights`.

    Returns:
        dict: The checkpoint, tensors on the CPU. A file that holds a bare
        state dict is returned as ``dict(state_dict=…)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, holds more than data, or no
            weights.
    """
    file = find_weights(path)
    try:
        found = mmengine_checkpoint._load_checkpoint(file, map_location='cpu')
    except NotDataError:
        raise
    except Exception as error:
        raise ValueError(f'checkpoint {file} cannot be read, it may be '
                         f'truncated: {error}') from error
    if not isinstance(found, dict):
        raise ValueError(f'checkpoint {path} holds a {type(found).__name__}, '
                         'not weights')
    return found if 'state_dict' in found else dict(state_dict=found)


def meta_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of itself; a ValueError if that is no dict."""
    meta = checkpoint.get('meta') or {}
    of_type('a dict', dict).check('meta of the checkpoint', meta)
    return meta


def plan_of(checkpoint: dict[str, Any]) -> CompressionPlan | None:
    """The plan in a checkpoint, None if it is of a dense model.

    Raises:
        ValueError: If the plan is malformed or of a newer version.
    """
    data = meta_of(checkpoint).get(META_KEY)
    return None if data is None else CompressionPlan.from_dict(data)


def save_checkpoint(model: nn.Module, plan: CompressionPlan, path: str,
                    meta: dict[str, Any]) -> None:
    """Write the weights of a compressed model with its plan and further
    entries of ``meta``, in plain types; the whole file or none."""
    weights = mmengine_checkpoint.get_state_dict(model)
    content = dict(meta={**meta, META_KEY: plan.to_dict()},
                   state_dict=mmengine_checkpoint.weights_to_cpu(weights))
    buffer = io.BytesIO()
    torch.save(content, buffer)  # by itself it says nothing of a full disk
    write_atomically(path, buffer.getbuffer())


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
class TeacherFile:
    """The file of the dense weights, and its SHA-256 when the run began; None
    if it was no local file."""
    path: str
    sha256: str | None = None

    @classmethod
    def of(cls, path: str) -> TeacherFile:
        """Of what the user named: a file, or a URL."""
        if not osp.isfile(path):
            return cls(path)
        return cls(osp.abspath(path), sha256_of(path))

    @property
    def problem(self) -> str | None:
        """Why it is not read because a checkpoint names it, None if it is: a
        checkpoint must not have anything fetched, nor another file read than
        that of its run."""
        if not isinstance(self.path, str) or '://' in self.path:
            return (f'the checkpoint names {self.path!r}, which is not '
                    'fetched because a file says so')
        if not osp.isfile(self.path):
            return f'{self.path} of the checkpoint does not exist'
        if self.sha256 is None:
            return (f'the checkpoint names {self.path} without its SHA-256, '
                    'as earlier versions of mmbasis did')
        if sha256_of(self.path) != self.sha256:
            return (f'{self.path} is not the file that it was when the run of '
                    'the checkpoint began (its SHA-256 differs)')
        return None

    def to_meta(self) -> dict[str, Any]:
        """How a checkpoint names it in ``meta``."""
        return {TEACHER_KEY: self.path, TEACHER_HASH_KEY: self.sha256}


@dataclass(frozen=True)
class Source:
    """What a checkpoint is: its plan, None if it is dense, and the file of the
    dense weights, if it names one."""
    plan: CompressionPlan | None = None
    teacher: TeacherFile | None = None

    @classmethod
    def of(cls, checkpoint: dict[str, Any]) -> Source:
        """Of a checkpoint that was read; see :func:`plan_of` for errors."""
        meta = meta_of(checkpoint)
        path = meta.get(TEACHER_KEY)
        teacher = None if path is None else TeacherFile(
            path, meta.get(TEACHER_HASH_KEY))
        return cls(plan_of(checkpoint), teacher)


@dataclass(frozen=True)
class Start:
    """What :func:`resolve` decided."""
    action: Action
    #: the structure that weights are loaded into; None of a dense model
    plan: CompressionPlan | None = None
    #: what to log of a choice
    note: str = ''


def resolve(recipe: Recipe, checkpoint: Source | None, run: Run = Run.TRAIN,
            model: CompressionPlan | None = None) -> Start:
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
    if checkpoint is None or checkpoint.plan is None:
        return _without_plan(recipe, checkpoint, run, model)
    return _with_plan(recipe, checkpoint.plan, run, model)


def _without_plan(recipe: Recipe, checkpoint: Source | None, run: Run,
                  model: CompressionPlan | None) -> Start:
    if run is Run.RESUME:
        raise RuntimeError(
            'this run cannot be resumed from a dense checkpoint: to start '
            'from dense weights, use load_from without resume; to resume the '
            'latest checkpoint of work_dir, resume without load_from')
    if run is Run.TEST and (checkpoint is not None or model is None):
        raise RuntimeError(
            'the checkpoint under test is dense, but this config is of a '
            'compressed model: give a checkpoint that mmbasis wrote, or test '
            'the dense one with its own config')
    if model is None:
        if recipe.planner is None and recipe.plan is None:
            raise RuntimeError(
                'BasisCompressionHook has nothing to do: give it a planner or '
                'a plan, or start from a compressed checkpoint')
        return Start(Action.COMPRESS)
    if checkpoint is not None:
        raise RuntimeError(
            'the checkpoint is dense, but the model is compressed: give a '
            'checkpoint that mmbasis wrote, or train the config of the dense '
            'model with a planner')
    if run is Run.TRAIN:
        _check_agreement(recipe, model, 'the model of the config')
    return Start(Action.KEEP, model)


def _with_plan(recipe: Recipe, found: CompressionPlan, run: Run,
               model: CompressionPlan | None) -> Start:
    fits, note = model is not None and model.structure == found.structure, ''
    if run is Run.TRAIN:
        _check_agreement(recipe, found, 'the checkpoint')
        if model is not None and not fits:
            raise ValueError(
                'the checkpoint is compressed by another plan than the model '
                'of the config: give the config that was written beside it '
                '(compressed.py), or a dense one')
        if model is None and (recipe.planner or recipe.plan):
            note = ('The checkpoint is compressed as the config asks for: it '
                    'is not compressed again')
    elif not (fits or model is None and _asks_for(recipe, found)):
        note = (f'{run.value.capitalize()} follows the plan of the '
                'checkpoint, not the one that the config asks for')
    return Start(Action.KEEP if fits else Action.FOLLOW, found, note)


def _asks_for(recipe: Recipe, found: CompressionPlan) -> bool:
    """Whether a recipe asks for a plan, or for nothing else."""
    if recipe.plan is not None:
        return recipe.plan.structure == found.structure
    return recipe.planner is None or made_by(recipe.planner, found)


def _check_agreement(recipe: Recipe, found: CompressionPlan,
                     owner: str) -> None:
    """Require that a recipe asks for the plan that is there."""
    if not _asks_for(recipe, found):
        if recipe.planner is None:
            raise ValueError(
                f'the config has a plan, but {owner} is compressed by '
                'another: to fine-tune it as it is, drop the plan; to follow '
                'the plan, start from dense weights')
        raise ValueError(
            f'the config asks for {recipe.planner.config}, but {owner} is '
            f'compressed already, by {found.planner}: to fine-tune it as it '
            'is, drop the planner; to compress it further, start from dense '
            'weights or use ProgressiveTruncationHook')
    if recipe.norm and not found.norm:
        raise ValueError(f'norm=True is asked for, but {owner} has no '
                         'normalisation between basis and coefficients')


def made_by(planner: BasePlanner, plan: CompressionPlan) -> bool:
    """Whether a plan's record is that of a planner. Of one that mmbasis 0.1
    wrote, only what the planner was constructed with is compared."""
    record = dict(plan.planner)
    if 'metric' not in record and 'overrides' not in record:
        return planner.describe() == record
    if 'metric' in record:
        record[record['metric']] = record.get('budget')
    return all(record.get(k) == v for k, v in planner.config.items())
