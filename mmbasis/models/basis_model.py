# Copyright (c) mmbasis authors. All rights reserved.
"""The model of a run while it is compressed and fine-tuned."""
from __future__ import annotations

import inspect
from collections import defaultdict
from functools import partialmethod
from typing import Any, Iterable

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS

from .. import compression
from ..compression import Action, Recipe, Source
from ..factorization import orthogonality_penalty
from ..planning import CompressionPlan
from ..quirks import repair
from ..registry import MODELS
from ..utils.collectives import shared_errors
from ..utils.schema import NONE, TEXT, shown
from .builder import pretrained_configs
from .distillation import Distillation


@MODELS.register_module()
class BasisModel(BaseModel):
    """Any MMEngine model while it is compressed and fine-tuned spectrally.

    It adds to the losses of the model what fine-tuning needs. Parameters,
    buffers, children and whatever else is read, written or called *are* the
    model's, so that names in checkpoints, ``paramwise_cfg`` and hooks are the
    bare model's.

    Args:
        architecture (dict | nn.Module): The model, or its config.
        checkpoint (str, optional): Weights to start from: of the dense model,
            or compressed ones, whose plan is then used.
        data_preprocessor (dict, optional): Used for an architecture whose
            config has none (mmpretrain keeps it beside the model).
        **recipe: Fields of :class:`mmbasis.compression.Recipe`. A ``plan`` is
            applied at once; a ``planner`` makes the plan when
            :class:`~mmbasis.hooks.BasisCompressionHook` says so, before the
            first iteration.

    Raises:
        ValueError: If a field of the recipe is wrong, the plan does not fit,
            or the checkpoint is compressed by another one.
        TypeError: If the architecture cannot be trained by a runner.
    """

    def __init__(self,
                 architecture: dict | nn.Module,
                 checkpoint: str | None = None,
                 data_preprocessor: dict | None = None,
                 **recipe: Any) -> None:
        super().__init__()
        (TEXT | NONE).check('checkpoint', checkpoint)
        self.recipe = Recipe.of(**recipe)
        if isinstance(architecture, dict):
            kind = architecture.get('type')
            if not isinstance(kind, str) and not callable(kind):
                raise TypeError('architecture must be an MMEngine model, or '
                                f'its config with a type, but got '
                                f'{shown(architecture)}')
            if data_preprocessor is not None:
                architecture = dict(architecture)
                architecture.setdefault('data_preprocessor', data_preprocessor)
            architecture = MMENGINE_MODELS.build(architecture)
        if not isinstance(architecture, nn.Module) or not hasattr(
                architecture, 'train_step'):
            raise TypeError('architecture must be an MMEngine model, but got '
                            f'{type(architecture).__name__}')
        self.has_weights = False  # True: they are not initialised again
        #: the file that the dense weights came from
        self.source: str | None = None
        self._trains_itself = _trains_itself(architecture)
        self.distillation = self._teach(architecture)
        with compression.surgery.all_or_nothing(architecture):
            self._adopt(repair(architecture))
            compression.surgery.guard(architecture)
            self._start_from(checkpoint)

    def _adopt(self, architecture: nn.Module) -> None:
        """Share what the architecture holds, and its state dict's hooks."""
        for name in ('_parameters', '_buffers', '_modules',
                     '_non_persistent_buffers_set', '_state_dict_hooks',
                     '_state_dict_pre_hooks', '_load_state_dict_post_hooks'):
            self.__dict__[name] = architecture.__dict__[name]
        # past nn.Module.__setattr__, which would make it a child
        self.__dict__['architecture'] = architecture
        for name in ('init_cfg', '_is_init'):  # the model has its own
            self.__dict__.pop(name, None)

    def _teach(self, architecture: nn.Module) -> Distillation | None:
        teaching = self.recipe.distillation
        if self._trains_itself:
            if self.recipe.asks_for_teacher or self.recipe.orthogonality:
                raise ValueError(
                    f'{type(architecture).__name__} has a train_step of its '
                    'own, so no losses can be added: drop distillation and '
                    'orthogonality from the recipe')
            return None
        try:
            return Distillation(architecture, teaching) if teaching else None
        except ValueError as error:
            if self.recipe.asks_for_teacher:
                raise
            MMLogger.get_current_instance().info('No teacher: %s', error)
            return None

    def _start_from(self, path: str | None) -> None:
        """Load a checkpoint, if there is one, and follow its plan or ours."""
        content = {} if path is None else compression.read_checkpoint(path)
        source = Source.of(content)
        if self.plan or source.plan:
            start = compression.resolve(
                self.recipe, source if path else None, model=self.plan)
            if start.action is Action.FOLLOW and start.plan is not None:
                compression.surgery.restructure(self.architecture,
                                                start.plan)
        if path is not None:
            compression.load_weights(self, content, path)
            self.has_weights, self.source = True, path
            if self.distillation is not None:
                self.distillation.source = (
                    self.distillation.source or source.teacher)
        if self.recipe.plan is not None and self.plan is None:
            if not self.has_weights and pretrained_configs(self.architecture):
                self.init_weights()  # a compressed model could not take them
            self._take_teacher()
            compression.apply_plan(
                self.architecture, self.recipe.plan, project=self.has_weights)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if 'architecture' not in self.__dict__:
                raise
            return getattr(self.__dict__['architecture'], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if ('architecture' not in self.__dict__ or name in self.__dict__
                or hasattr(type(self), name)):
            super().__setattr__(name, value)
        else:
            setattr(self.__dict__['architecture'], name, value)

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__:
            super().__delattr__(name)
        else:
            delattr(self.__dict__['architecture'], name)

    @property
    def plan(self) -> CompressionPlan | None:
        """The plan that this model follows; None while it is dense."""
        return compression.get_plan(self.architecture)

    def compress(self, dataloader: Iterable,
                 recipe: Recipe | None = None) -> CompressionPlan:
        """Compress the dense model, which becomes the teacher, by calibration
        batches and a recipe, by default its own."""
        teaching = self.distillation
        before = {} if teaching is None else dict(vars(teaching))
        self._take_teacher()
        try:
            return _compress(self.architecture, recipe or self.recipe,
                             dataloader)
        except BaseException:
            if teaching is not None:  # the next try may be of other weights
                vars(teaching).update(before)
            raise

    def truncate(self, dataloader: Iterable,
                 recipe: Recipe) -> CompressionPlan:
        """Compress the compressed model further, like the dense model of the
        same function; budgets are fractions of the dense model."""
        before = self.plan
        assert before is not None
        model = compression.surgery.densified(self.architecture)
        plan = _compress(model, recipe, dataloader).with_dense_costs(before)
        compression.surgery.attach_plan(model, plan)
        self._adopt(model)
        return plan

    def _take_teacher(self) -> None:
        if (self.distillation is not None and self.distillation.teacher is None
                and self.plan is None and self.has_weights):
            self.distillation.take(self.architecture, self.source)

    def init_weights(self) -> None:
        """Initialise the architecture, unless it holds trained weights."""
        if self.has_weights:
            MMLogger.get_current_instance().info(
                'The weights are loaded: initialisation is skipped')
            return
        if hasattr(self.architecture, 'init_weights'):
            self.architecture.init_weights()
        self.note_pretrained()

    def note_pretrained(self) -> None:
        """Take what initialised the architecture for trained weights, if its
        config names a file."""
        for config in pretrained_configs(self.architecture):
            self.has_weights, self.source = True, config['checkpoint']

    def train(self, mode: bool = True) -> BasisModel:
        self.architecture.train(mode)
        self.training = mode
        return self

    def to(self, *args: Any, **kwargs: Any) -> BasisModel:
        self.architecture.to(*args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Forward the architecture; in mode ``'loss'`` add the losses of
        fine-tuning, and raise a RuntimeError if the planner was never run."""
        if _mode(self.architecture, args, kwargs) != 'loss':
            return self.architecture(*args, **kwargs)
        self._check_compressed()
        teaching = self.distillation
        if teaching is not None and (teaching.teacher is not None
                                     or self.recipe.asks_for_teacher):
            losses = teaching.losses(self.architecture, args, kwargs)
        else:
            losses = dict(self.architecture(*args, **kwargs))
        wanted = self.recipe.orthogonality
        if wanted is not None and wanted.weight:
            losses['loss_orthogonality'] = (
                wanted.weight * self._orthogonality())
        return losses

    def _check_compressed(self) -> None:
        if self.plan is None and self.recipe.planner is not None:
            raise RuntimeError(
                'BasisModel has a planner, but the model is dense: add '
                "custom_hooks=[dict(type='mmbasis.BasisCompressionHook')], "
                'which compresses before the first iteration, or give a plan')

    def _orthogonality(self) -> torch.Tensor:
        """``sum_layers ||F F^T - I||_F^2``, a scalar."""
        total = next(self.parameters()).new_zeros(())
        # where a compiled graph breaks inside of autocast, torch 2.1 never
        # leaves it: its cache goes on to hold old weights
        stacked = _stacked_bases(self)
        # in full precision: it is a small difference of products
        with torch.autocast(total.device.type, enabled=False):
            for bases in stacked:
                total = total + orthogonality_penalty(bases)
        return total

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Any]:
        if self._trains_itself:
            self._check_compressed()
            return self.architecture.train_step(data, optim_wrapper)
        return super().train_step(data, optim_wrapper)

    def _hand_on(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.architecture, name)(*args, **kwargs)

    parse_losses = partialmethod(_hand_on, 'parse_losses')
    val_step = partialmethod(_hand_on, 'val_step')
    test_step = partialmethod(_hand_on, 'test_step')
    _load_from_state_dict = partialmethod(_hand_on, '_load_from_state_dict')
    _save_to_state_dict = partialmethod(_hand_on, '_save_to_state_dict')


@torch.compiler.disable  # hardly any arithmetic
def _stacked_bases(model: nn.Module) -> list[torch.Tensor]:
    """What is to be orthonormal in a model, of shape ``(G, Q, D)``: bases of
    one shape in one, as alone they are too small to keep a GPU busy."""
    shapes = defaultdict(list)
    for _, layer in compression.basis_layers(model):
        for basis in layer.bases:
            shapes[basis.shape[1:], basis.dtype, basis.device].append(basis)
    return [torch.cat(same) for same in shapes.values()]


def _trains_itself(model: nn.Module) -> bool:
    """Whether a model has a way to train that is not MMEngine's."""
    return any(
        name in vars(model)
        or getattr(type(model), name, None) is not getattr(BaseModel, name)
        for name in ('train_step', '_run_forward'))


def _mode(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The mode that a model is called in, by keyword or not."""
    if 'mode' in kwargs:
        return kwargs['mode']
    call = inspect.signature(model.forward).bind_partial(*args, **kwargs)
    call.apply_defaults()
    return call.arguments.get('mode')


@shared_errors('compression')
def _compress(model: nn.Module, recipe: Recipe,
              dataloader: Iterable) -> CompressionPlan:
    count = recipe.calibration.num_batches
    batches = compression.take_batches(dataloader, count)
    return compression.run_recipe(model, recipe, *batches)[0]


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside a :class:`BasisModel`; any other is returned."""
    return model.architecture if isinstance(model, BasisModel) else model
