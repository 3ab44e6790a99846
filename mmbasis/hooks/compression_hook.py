# Copyright (c) mmbasis authors. All rights reserved.
import copy
import os.path as osp
from typing import Any, Dict, Iterable, Optional, Union

from mmengine.hooks import EMAHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner, find_latest_checkpoint

from ..compression import (META_KEY, TEACHER_KEY, from_plain, log_plan,
                           plan_of, to_plain)
from ..datasets import calibration_dataloader
from ..models.basis_model import BasisModel, PlanLike, as_plan
from ..optim import carry_over
from ..registry import HOOKS

DATA_BATCH = Optional[Any]


@HOOKS.register_module()
class BasisCompressionHook(Hook):
    """Compress the model of a run before its first iteration, and keep it
    compressed through saving, loading and resuming.

    The hook wraps the model in :class:`~mmbasis.models.BasisModel` (unless
    the config does), so the rest of the config stays as it is:

    - at the start of training the dense weights (``load_from``) are
      compressed, then optimizer, schedulers, the distributed wrapper and
      EMA's average are built anew from the config for the new parameters;
    - every checkpoint carries the plan in its ``meta`` and can be read by
      ``torch.load(weights_only=True)``;
    - on ``resume``, in testing and when training starts from a compressed
      checkpoint, the model takes the structure that the checkpoint's plan
      describes.

    Examples:
        >>> custom_hooks = [
        >>>     dict(type='mmbasis.BasisCompressionHook',
        >>>          planner=dict(type='BudgetPlanner', macs=0.5))
        >>> ]

    Args:
        planner (dict, optional): Config of the planner. Not with ``plan``, or
            where the config's model is a ``BasisModel`` that says it.
        plan (str | dict, optional): A plan to follow instead.
        calibration (dict, optional): ``num_batches`` (default 8) and
            ``dataloader``, the config of a data loader; by default that of
            training is used, reshuffled and with the transforms of testing.
        reconstruction (str, optional): ``'local'`` or ``'sequential'``, see
            :class:`mmbasis.compression.Compressor`.
        recalibration (bool | str): See there, too. Defaults to ``'auto'``.
        norm (bool): See :class:`~mmbasis.models.BasisModel`.
        orthogonality (dict, optional): See there, too.
        distillation (bool | dict, optional): See there, too. Defaults to
            True: the dense model teaches the compressed one.

    Raises:
        ValueError: If the arguments contradict each other.
    """

    # before EMAHook copies the model, and before anything is saved or loaded
    priority = 'VERY_HIGH'

    def __init__(self,
                 planner: Optional[dict] = None,
                 plan: Optional[PlanLike] = None,
                 calibration: Optional[dict] = None,
                 reconstruction: Optional[str] = None,
                 recalibration: Union[bool, str] = 'auto',
                 norm: bool = False,
                 orthogonality: Optional[dict] = None,
                 distillation: Union[None, bool, dict] = None) -> None:
        if planner is not None and plan is not None:
            raise ValueError('BasisCompressionHook takes a planner or a plan, '
                             'not both')
        calibration = dict(calibration or {})
        self.num_batches = calibration.pop('num_batches', 8)
        self.dataloader_cfg = calibration.pop('dataloader', None)
        if calibration:
            raise ValueError('calibration takes num_batches and dataloader, '
                             f'but got {sorted(calibration)}')
        self.compressor_cfg = dict(
            reconstruction=reconstruction, recalibration=recalibration)
        self.planner = planner
        self.plan = None if plan is None else as_plan(plan)
        self._teacher_path: Optional[str] = None
        self.wrapper_cfg: Dict[str, Any] = dict(
            norm=norm, orthogonality=orthogonality, distillation=distillation)

    # ------------------------------------------------------------ the model
    def before_run(self, runner: Runner) -> None:
        """Wrap the model, before EMA copies it and weights are loaded."""
        model = _bare(runner)
        if isinstance(model, BasisModel):
            if self.planner is not None or self.plan is not None or any(
                    self.wrapper_cfg.values()):
                raise ValueError(
                    'planner, plan, norm, orthogonality or distillation is '
                    'given to BasisCompressionHook, but the model is a '
                    'BasisModel: give them there')
            self.planner = model.planner
        else:
            config = dict(self.wrapper_cfg)
            if config['distillation'] is None:
                config['distillation'] = True
            model = BasisModel(model, **config)
            self._set_model(runner, model)
        if runner._load_from is not None or (
                runner._resume and find_latest_checkpoint(runner.work_dir)):
            model.has_weights = True
            model.source = runner._load_from

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the structure of a compressed checkpoint, before its weights
        are copied into the model.

        Raises:
            RuntimeError: If a run is to be resumed from a dense checkpoint,
                or the plan differs from that of the model.
        """
        checkpoint.update({
            k: from_plain(checkpoint[k])
            for k in ('message_hub', ) if k in checkpoint
        })
        model = _bare(runner)
        plan = plan_of(checkpoint)
        self._teacher_path = checkpoint.get('meta', {}).get(TEACHER_KEY)
        if plan is None:
            if runner._resume:
                raise RuntimeError(
                    'this run cannot be resumed from a dense checkpoint: it '
                    'carries no compression plan. To start from dense '
                    'weights use load_from without resume; to resume the '
                    'latest checkpoint of work_dir, resume without load_from')
            return
        if model.plan is None:
            model.apply_plan(plan, project=False)
            self._rebuild(runner, model)

    def before_train(self, runner: Runner) -> None:
        """Compress the dense weights, unless the model is compressed.

        Raises:
            RuntimeError: If there is neither a plan nor a planner.
        """
        model = _bare(runner)
        if model.plan is not None:
            log_plan(model.plan)
            self._find_teacher(runner, model)
            return
        if not model.has_weights:
            runner.logger.warning(
                'The model to be compressed has random weights: give the '
                'trained ones as load_from')
        planner = self.plan or copy.deepcopy(self.planner)
        if planner is None:
            raise RuntimeError(
                'BasisCompressionHook has nothing to do: give it a planner or '
                'a plan, or start from a compressed checkpoint')
        model.compress(planner, self._dataloader(runner), self.num_batches,
                       **self.compressor_cfg)
        if model.distillation is not None and not model.has_weights:
            model.distillation = None
        self._rebuild(runner, model)
        if is_model_wrapper(runner.model):
            runner._maybe_compile('train_step')

    def truncate(self, runner: Runner, planner: dict) -> None:
        """Compress the compressed model further in the middle of training; the
        optimizer's state and the schedules go on.

        Args:
            runner (Runner): The runner of the training process.
            planner (dict): Config of the planner, budgets being fractions of
                the dense model.
        """
        model = _bare(runner)
        before = model.architecture
        wrapper, schedulers = runner.optim_wrapper, runner.param_schedulers
        model.truncate(planner, self._dataloader(runner), self.num_batches,
                       **self.compressor_cfg)
        self._rebuild(runner, model)
        carry_over(before, wrapper, model.architecture, runner.optim_wrapper)
        for old, new in zip(schedulers or [], runner.param_schedulers or []):
            new.load_state_dict(old.state_dict())
        runner.optim_wrapper.initialize_count_status(
            runner.model, runner.iter, runner.train_loop.max_iters)

    def before_test(self, runner: Runner) -> None:
        """Refuse to test a dense model under a compression config."""
        if _bare(runner).plan is None:
            raise RuntimeError(
                'the checkpoint under test is dense, but this config '
                'compresses: give a checkpoint that mmbasis wrote, or test '
                'the dense one with its own config')

    before_val = before_test

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the plan into ``meta`` and everything into plain types."""
        model = _bare(runner)
        if model.plan is not None:
            checkpoint['meta'][META_KEY] = model.plan.to_dict()
        if model.distillation is not None and model.distillation.source:
            checkpoint['meta'][TEACHER_KEY] = model.distillation.source
        for key in ('meta', 'message_hub', 'param_schedulers'):
            if key in checkpoint:
                checkpoint[key] = to_plain(checkpoint[key])

    # ------------------------------------------------------------- helpers
    def _find_teacher(self, runner: Runner, model: BasisModel) -> None:
        """Load the teacher of a model that was compressed earlier from the
        file that its checkpoint names.

        Raises:
            RuntimeError: If it is not there, and the run is resumed or asks
                for a teacher.
        """
        distillation, path = model.distillation, self._teacher_path
        if distillation is None or distillation.teacher is not None:
            return
        if path is not None and ('://' in path or osp.isfile(path)):
            distillation.load(model.architecture, path)
            runner.logger.info('The teacher is %s', path)
            return
        found = ('the checkpoint names none' if path is None else
                 f'{path} of the checkpoint does not exist')
        if isinstance(self.wrapper_cfg['distillation'],
                      dict) or (runner._resume and path is not None):
            raise RuntimeError(
                f'distillation needs the dense weights, but {found}: give '
                'them as distillation=dict(checkpoint=…), or set '
                'distillation=False')
        runner.logger.warning('Training without a teacher: %s', found)
        model.distillation = None

    def _dataloader(self, runner: Runner) -> Iterable:
        """Calibration batches."""
        if self.dataloader_cfg is not None:
            return Runner.build_dataloader(
                copy.deepcopy(self.dataloader_cfg), seed=runner.seed)
        return calibration_dataloader(runner, runner.seed)

    @staticmethod
    def _set_model(runner: Runner, model: BasisModel) -> None:
        """Give the runner a model, wrapped as its config says."""
        runner.model = runner.wrap_model(
            copy.deepcopy(runner.cfg.get('model_wrapper_cfg')), model)

    def _rebuild(self, runner: Runner, model: BasisModel) -> None:
        """Build anew what holds the parameters of the dense layers."""
        self._set_model(runner, model)
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.before_run(runner)
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            return  # testing
        if runner.cfg.get('optim_wrapper') is None:
            raise RuntimeError('the optimizer must be built anew for the '
                               'compressed model, but the runner was not '
                               'built from a config')
        runner.optim_wrapper = runner.build_optim_wrapper(
            copy.deepcopy(runner.cfg.optim_wrapper))
        # the runner refuses to scale under schedulers, which are stale anyway
        runner.param_schedulers = None
        runner.scale_lr(runner.optim_wrapper, runner.auto_scale_lr)
        if runner.cfg.get('param_scheduler') is not None:
            runner.param_schedulers = runner.build_param_scheduler(
                copy.deepcopy(runner.cfg.param_scheduler))
        runner.optim_wrapper.initialize_count_status(
            runner.model, runner.train_loop.iter, runner.train_loop.max_iters)
        print_log(
            'Optimizer and parameter schedulers are built anew for the '
            'compressed model', 'current')


def _bare(runner: Runner) -> Any:
    """The model without the distributed wrapper."""
    model = runner.model
    return model.module if is_model_wrapper(model) else model
