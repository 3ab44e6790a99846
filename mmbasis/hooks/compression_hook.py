# Copyright (c) mmbasis authors. All rights reserved.
from typing import Any, Dict, Mapping, Optional, Sequence

from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, Runner

from .. import compression
from ..compression import Action, Recipe, Run, get_plan, resolve
from ..datasets import calibration_dataloader
from ..models import BasisModel, unwrap
from ..models.builder import pretrained_configs
from ..optim import (
    bare_model,
    replaced_parameters,
    set_model,
    strategy_of,
)
from ..registry import HOOKS
from ..utils import find_resumable
from ..utils.collectives import shared_errors, together
from ..utils.io import to_plain
from ..utils.schema import is_integer, is_number, list_of, of_type, shown
from ..utils.strategy import check_strategy
from .integrity_hook import IntegrityHook

#: what says how far a planner goes
BUDGETS = ('macs', 'params', 'latency', 'ratio', 'threshold')


@HOOKS.register_module()
class BasisCompressionHook(IntegrityHook):
    """Compress the model of a run before its first iteration, and keep it
    compressed through saving, loading and resuming.

    The hook wraps the model in :class:`~mmbasis.models.BasisModel` for
    training (unless the config does). The dense weights (``load_from``) are
    compressed at the start of training. Every checkpoint carries the plan in
    its ``meta``, without pickle, and whoever loads it takes the structure of
    that plan: :func:`mmbasis.compression.resolve` has the table.

    Args:
        **recipe: Fields of :class:`mmbasis.compression.Recipe`, except those
            that the config's ``BasisModel`` has. A ValueError is raised if
            one is unknown or out of range.
    """

    # before EMAHook copies the model, and before anything is saved or loaded
    priority = 'VERY_HIGH'

    def __init__(self, **recipe: Any) -> None:
        #: what is asked for; that of the model is added before the run
        self.recipe = Recipe.of(**recipe)
        self._run = Run.TEST
        #: what was loaded
        self._source: Optional[compression.Source] = None

    def before_run(self, runner: Runner) -> None:
        """Wrap the model, before EMA copies it and weights are loaded."""
        if strategy_of(runner) is not None:
            _check_flexible(runner)
            if runner._has_loaded:
                return  # it loads before it runs this
        self._begin(runner)

    def _begin(self, runner: Runner) -> None:
        self._run, self._source = Run.TEST, None
        model = bare_model(runner)
        # after training, the model under test is the one that was trained
        if isinstance(model, BasisModel) and model.recipe is not self.recipe:
            theirs, ours = model.recipe.config, self.recipe.config
            allowed = {'calibration', 'reconstruction', 'recalibration'}
            for key in ours:
                if key not in allowed.difference(theirs):
                    raise ValueError(
                        f'{key} is given to BasisCompressionHook, but the '
                        'model is a BasisModel, which takes the same fields: '
                        'give them there')
            model.recipe = self.recipe = Recipe.of(**theirs, **ours)
        # MMEngine builds the loop of what it is about to do
        if not isinstance(runner._train_loop, BaseLoop):
            return
        if runner._resume and runner._load_from is None:
            runner._load_from = find_resumable(runner.work_dir)
        resumes = runner._resume and runner._load_from is not None
        self._run = Run.RESUME if resumes else Run.TRAIN
        if not isinstance(model, BasisModel):
            model = BasisModel(model, **self.recipe.config)
            self.recipe = model.recipe
            set_model(runner, model)
            if strategy_of(runner) is not None:  # it initialises before
                model.note_pretrained()
        if runner._load_from is not None:
            model.has_weights = True
            model.source = runner._load_from

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the structure of a compressed checkpoint, before its weights
        are copied into the model; an error if they do not go together."""
        if strategy_of(runner) is not None:
            _check_flexible(runner)
            self._begin(runner)
        model = unwrap(bare_model(runner))
        self._source = compression.Source.of(checkpoint)
        start = resolve(self.recipe, self._source, self._run, get_plan(model))
        if start.note:
            runner.logger.warning(start.note)
        if start.action is Action.FOLLOW:
            assert start.plan is not None
            with replaced_parameters(runner):
                compression.surgery.restructure(model, start.plan)
        super().after_load_checkpoint(runner, checkpoint)

    def _wants_all(self, runner: Runner) -> bool:
        return True

    def before_train(self, runner: Runner) -> None:
        """Compress the dense weights, unless the model is compressed."""
        model = bare_model(runner)
        start = resolve(self.recipe, self._source, self._run, model.plan)
        if start.action is Action.COMPRESS:
            if not model.has_weights:
                runner.logger.warning(
                    'The model to be compressed has random weights: give the '
                    'trained ones as load_from')
            # the wrapper is built when all have compressed
            with replaced_parameters(runner), shared_errors('compression'):
                model.compress(
                    _calibration_batches(runner, self.recipe), self.recipe)
            if is_model_wrapper(runner.model) and not strategy_of(runner):
                runner._maybe_compile('train_step')
        else:
            compression.pipeline.log_plan(model.plan)
            with shared_errors('search for the teacher'):
                self._find_teacher(runner, model)
                _check_teachers(model)
        # whatever is loaded from now on was written by this run
        self._run = Run.RESUME

    def before_test(self, runner: Runner) -> None:
        """Refuse to test a dense model under a compression config."""
        if get_plan(unwrap(bare_model(runner))) is None:
            resolve(self.recipe, None, Run.TEST)

    before_val = before_test

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the plan into ``meta``, and where the teacher is."""
        model = bare_model(runner)
        if strategy_of(runner) and is_model_wrapper(runner.model):
            # it saves the wrapper's names, which only it can load
            checkpoint['state_dict'] = {
                key[len('module.'):]: value
                for key, value in checkpoint['state_dict'].items()}
        super().before_save_checkpoint(runner, checkpoint)
        plan = get_plan(unwrap(model))
        if plan is not None:
            checkpoint['meta'][compression.META_KEY] = plan.to_dict()
        distillation = getattr(model, 'distillation', None)
        if distillation is not None and distillation.source:
            checkpoint['meta'].update(distillation.source.to_meta())

    def _find_teacher(self, runner: Runner, model: BasisModel) -> None:
        """Load the teacher of a model that was compressed earlier from the
        file that its checkpoint names, if it still is that file. Runs that
        asked for a teacher, now or when they began, do not go on without."""
        distillation = model.distillation
        if distillation is None or distillation.teacher is not None:
            return
        source = self._source.teacher if self._source else distillation.source
        found: Optional[str] = 'the checkpoint names none'
        if source is not None:
            # what the config names, too, is not read on a file's word
            named = [x['checkpoint']
                     for x in pretrained_configs(model.architecture)]
            found = None if source.path in named else source.problem
        if source is not None and found is None:
            try:
                distillation.load(model.architecture, source.path)
                runner.logger.info('The teacher is %s', source.path)
                return
            except RuntimeError as error:
                found = f'it is of another model: {error}'
        resumed = self._run is Run.RESUME and source is not None
        if self.recipe.asks_for_teacher or resumed:
            raise RuntimeError(
                f'distillation needs the dense weights, but {found}: give '
                'them as distillation=dict(checkpoint=…), or set '
                'distillation=False')
        runner.logger.warning('Training without a teacher: %s', found)
        model.distillation = None


def _check_teachers(model: BasisModel) -> None:
    """Refuse a teacher that only some of the processes have."""
    found = together('search for the teacher', getattr(
        model.distillation, 'teacher', None) is not None)
    if len({*found}) > 1:
        without = [rank for rank, has in enumerate(found) if not has]
        raise RuntimeError(
            f'the processes of rank {without} do not find the teacher that '
            'others have: put its file where all of them can read it')


def _check_flexible(runner: Any) -> None:
    """Refuse what MMEngine's ``FlexibleRunner`` cannot do with a model that is
    compressed."""
    check_strategy(strategy_of(runner))
    if runner._compile:
        raise RuntimeError(
            'FlexibleRunner compiles the dense model before it can be '
            "compressed: use runner_type='Runner' with compile, or "
            'compile=False')
    loads = runner._load_from is not None or runner._resume
    if loads and any(isinstance(x, EMAHook) for x in runner.hooks):
        raise RuntimeError(
            'FlexibleRunner loads weights before EMAHook has a model to load '
            "them into: use runner_type='Runner', or drop EMAHook")


def _calibration_batches(runner: Runner, recipe: Recipe) -> Any:
    config = recipe.calibration.dataloader
    if config is None:
        return calibration_dataloader(runner, runner.seed)
    return Runner.build_dataloader(to_plain(config), seed=runner.seed)


def _check_budget(before: Mapping[str, Any], epoch: int,
                  planner: Mapping[str, Any]) -> None:
    """Require that a stage does not ask for more than what came before it, as
    far as the same kind of budget says so."""
    for key in BUDGETS:
        old: Any = before.get(key)
        new: Any = planner.get(key)
        if is_number(old) and is_number(new) and new > old:
            raise ValueError(
                f'ProgressiveTruncationHook: the stage of epoch {epoch} has '
                f'{key}={new}, more than {key}={old} before it: ranks are '
                'lowered, so budgets must not rise')


@HOOKS.register_module()
class ProgressiveTruncationHook(Hook):
    """Lower the ranks in stages while the model is fine-tuned.

    Before the named epochs the model is planned and truncated again, as
    :class:`BasisCompressionHook` does at the start of the run. The optimizer's
    state is carried over to the new factors and the schedules go on; EMA's
    average starts afresh. Resuming is exact.

    Args:
        stages (Sequence[dict]): Each with ``epoch``, before which it is
            reached, counted from 0 and rising, and ``planner``, whose budget
            is that of the dense model and does not rise; or a ValueError is
            raised.
    """

    # when the other hooks are done with the epoch before
    priority = 'VERY_LOW'

    def __init__(self, stages: Sequence[dict]) -> None:
        list_of('a list of dict(epoch=N, planner=dict(…))', of_type(
            '', Mapping)).check('ProgressiveTruncationHook: stages', stages)
        self.planners: Dict[int, dict] = {}
        for stage in stages:
            epoch: Any = stage.get('epoch')
            last = max(self.planners, default=0)
            if (set(stage) != {'epoch', 'planner'}
                    or not is_integer(epoch) or epoch <= last
                    or not isinstance(stage['planner'], Mapping)):
                raise ValueError(
                    'a stage of ProgressiveTruncationHook is dict(epoch=N, '
                    'planner=dict(…)); epochs are at least 1 (the first plan '
                    'is that of BasisCompressionHook) and must rise, but got '
                    f'{shown(dict(stage))} after epoch {last}')
            Recipe.of(planner=stage['planner'])  # complains at once
            _check_budget(self.planners.get(last, {}), epoch,
                          stage['planner'])
            self.planners[epoch] = dict(stage['planner'])

    def before_run(self, runner: Runner) -> None:
        """Check that all stages are reached, and that the first one takes
        something away."""
        loop = runner._train_loop
        if not isinstance(loop, EpochBasedTrainLoop) or not self.planners:
            return
        first, late = min(self.planners), max(self.planners)
        if late >= loop.max_epochs:
            raise ValueError(
                f'ProgressiveTruncationHook: the stage of epoch {late} is '
                f'never reached, training ends after {loop.max_epochs} epochs')
        for hook in runner.hooks:
            if isinstance(hook, BasisCompressionHook):
                recipe = hook.recipe
                before = (recipe.planner.config if recipe.planner else
                          recipe.plan.planner if recipe.plan else {})
                _check_budget(before, first, self.planners[first])

    def before_train(self, runner: Runner) -> None:
        """Check that the run compresses and counts epochs."""
        if (not any(isinstance(x, BasisCompressionHook) for x in runner.hooks)
                or not isinstance(runner.train_loop, EpochBasedTrainLoop)):
            raise RuntimeError(
                'ProgressiveTruncationHook lowers the ranks of a compressed '
                'model before epochs: add BasisCompressionHook to a run that '
                'is by epoch')

    def before_train_epoch(self, runner: Runner) -> None:
        """Truncate where a stage begins."""
        planner = self.planners.get(runner.epoch)
        if planner is not None:
            model = bare_model(runner)
            recipe = Recipe.of(
                **dict(model.recipe.config, plan=None, planner=planner))
            with replaced_parameters(
                    runner, before=model.architecture), shared_errors(
                        'progressive truncation'):
                model.truncate(_calibration_batches(runner, recipe), recipe)
