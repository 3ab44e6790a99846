# Copyright (c) mmbasis authors. All rights reserved.
import os.path as osp
from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, Runner, find_latest_checkpoint

from ..compression import (
    META_KEY,
    TEACHER_KEY,
    Action,
    Recipe,
    Run,
    Source,
    Start,
    get_plan,
    log_plan,
    resolve,
    restructure,
)
from ..datasets import calibration_dataloader
from ..models import BasisModel, unwrap
from ..registry import HOOKS
from ..utils.io import from_plain, to_plain
from .rebuild import Managed, bare_model


@HOOKS.register_module()
class BasisCompressionHook(Hook):
    """Compress the model of a run before its first iteration, and keep it
    compressed through saving, loading and resuming.

    The hook wraps the model in :class:`~mmbasis.models.BasisModel` for
    training (unless the config does). The dense weights (``load_from``) are
    compressed at the start of training; optimizer, schedulers, the
    distributed wrapper and EMA's average then hold the new parameters. Every
    checkpoint carries the plan in its ``meta``, without pickle, and whoever
    loads it takes the structure of that plan:
    :func:`mmbasis.compression.resolve` has the table of what happens when.

    Examples:
        >>> custom_hooks = [
        >>>     dict(type='mmbasis.BasisCompressionHook',
        >>>          planner=dict(type='BudgetPlanner', macs=0.5))
        >>> ]

    Args:
        **recipe: Fields of :class:`mmbasis.compression.Recipe`, except those
            that the config's ``BasisModel`` has.

    Raises:
        ValueError: If a field is unknown or out of range.
    """

    # before EMAHook copies the model, and before anything is saved or loaded
    priority = 'VERY_HIGH'

    def __init__(self, **recipe: Any) -> None:
        #: what is asked for; that of the model is added before the run
        self.recipe = Recipe.of(**recipe)
        self._run = Run.TEST
        #: what was loaded, and what was decided then
        self._source: Optional[Source] = None
        self._start: Optional[Start] = None

    def before_run(self, runner: Runner) -> None:
        """Wrap the model, before EMA copies it and weights are loaded."""
        self._source = self._start = None
        model = bare_model(runner)
        # after training, the model under test is the one that was trained
        if isinstance(model, BasisModel) and model.recipe is not self.recipe:
            model.recipe = _merged(model.recipe, self.recipe)
            self.recipe = model.recipe
        self._run = Run.TEST
        # MMEngine builds the loop of what it is about to do
        if not isinstance(runner._train_loop, BaseLoop):
            return
        resumes = runner._resume and (
            runner._load_from or find_latest_checkpoint(runner.work_dir))
        self._run = Run.RESUME if resumes else Run.TRAIN
        if not isinstance(model, BasisModel):
            model = BasisModel(model, **self.recipe.config)
            self.recipe = model.recipe
            Managed(runner).set_model(model)
        if runner._load_from is not None or resumes:
            model.has_weights = True
            model.source = runner._load_from

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the structure of a compressed checkpoint, before its weights
        are copied into the model; an error if they do not go together."""
        if 'message_hub' in checkpoint:
            checkpoint['message_hub'] = from_plain(checkpoint['message_hub'])
        model = bare_model(runner)
        self._source = Source.of(checkpoint)
        self._start = resolve(self.recipe, self._source, self._run,
                              get_plan(unwrap(model)))
        if self._start.note:
            runner.logger.warning(self._start.note)
        if self._start.action is Action.FOLLOW:
            assert self._start.plan is not None
            managed = Managed(runner)
            restructure(unwrap(model), self._start.plan)
            managed.rebuild(model)

    def before_train(self, runner: Runner) -> None:
        """Compress the dense weights, unless the model is compressed."""
        model = bare_model(runner)
        start = self._start or resolve(self.recipe, None, self._run,
                                       model.plan)
        resumed = self._run is Run.RESUME
        # whatever is loaded from now on was written by this run
        self._run = Run.RESUME
        if start.action is not Action.COMPRESS:
            log_plan(model.plan)
            self._find_teacher(runner, model, resumed)
            return
        if not model.has_weights:
            runner.logger.warning(
                'The model to be compressed has random weights: give the '
                'trained ones as load_from')
        managed = Managed(runner)
        model.compress(self._dataloader(runner), self.recipe)
        managed.rebuild(model)
        if is_model_wrapper(runner.model):
            runner._maybe_compile('train_step')

    def truncate(self, runner: Runner, planner: dict) -> None:
        """Compress the compressed model further in the middle of training, by
        the config of a planner whose budgets are fractions of the dense model;
        the optimizer's state and the schedules go on."""
        model, managed = bare_model(runner), Managed(runner)
        before = model.architecture
        config = {k: v for k, v in self.recipe.config.items() if k != 'plan'}
        recipe = Recipe.of(**{**config, 'planner': planner})
        model.truncate(self._dataloader(runner), recipe)
        managed.rebuild(model, carry_over_from=before)

    def before_test(self, runner: Runner) -> None:
        """Refuse to test a dense model under a compression config."""
        if get_plan(unwrap(bare_model(runner))) is None:
            resolve(self.recipe, None, Run.TEST)

    before_val = before_test

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the plan into ``meta`` and everything into plain types."""
        model = bare_model(runner)
        plan = get_plan(unwrap(model))
        if plan is not None:
            checkpoint['meta'][META_KEY] = plan.to_dict()
        distillation = getattr(model, 'distillation', None)
        if distillation is not None and distillation.source:
            checkpoint['meta'][TEACHER_KEY] = distillation.source
        for key in ('meta', 'message_hub', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = to_plain(checkpoint[key])

    def _find_teacher(self, runner: Runner, model: BasisModel,
                      resumed: bool) -> None:
        """Load the teacher of a model that was compressed earlier from the
        file that its checkpoint names. Runs that asked for a teacher, now or
        when they began, do not go on without."""
        distillation = model.distillation
        if distillation is None or distillation.teacher is not None:
            return
        path = self._source.teacher if self._source else distillation.source
        must = self.recipe.asks_for_teacher or resumed and path is not None
        found = ('the checkpoint names none' if path is None else
                 f'{path} of the checkpoint does not exist')
        if path is not None and ('://' in path or osp.isfile(path)):
            try:
                distillation.load(model.architecture, path)
                runner.logger.info('The teacher is %s', path)
                return
            except RuntimeError as error:
                found = f'it is of another model: {error}'
        if must:
            raise RuntimeError(
                f'distillation needs the dense weights, but {found}: give '
                'them as distillation=dict(checkpoint=…), or set '
                'distillation=False')
        runner.logger.warning('Training without a teacher: %s', found)
        model.distillation = None

    def _dataloader(self, runner: Runner) -> Any:
        """Calibration batches."""
        config = self.recipe.calibration.dataloader
        if config is None:
            return calibration_dataloader(runner, runner.seed)
        return Runner.build_dataloader(to_plain(config), seed=runner.seed)


def _merged(of_model: Recipe, of_hook: Recipe) -> Recipe:
    """The recipe of a ``BasisModel`` with what the hook says of how it is
    compressed; an error if it says more, or what the model says, too."""
    for key in of_hook.config:
        if key not in ('calibration', 'reconstruction',
                       'recalibration') or key in of_model.config:
            raise ValueError(
                f'{key} is given to BasisCompressionHook, but the model is a '
                'BasisModel, which takes the same fields: give them there')
    return Recipe.of(**of_model.config, **of_hook.config)
