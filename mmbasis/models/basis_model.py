# Copyright (c) mmbasis authors. All rights reserved.
from typing import Any, Dict, Iterable, Optional, Union

import torch
import torch.nn as nn
from mmengine.logging import MMLogger
from mmengine.model import BaseModel
from mmengine.registry import MODELS as MMENGINE_MODELS

from ..compression import (apply_plan, attach_plan, basis_layers, compress,
                           densified, get_plan, guard, load_weights, plan_of,
                           read_checkpoint)
from ..factorization import orthogonality_penalty
from ..planning import BasePlanner, CompressionPlan
from ..registry import MODELS
from .distillation import Distillation
from .quirks import repair

PlanLike = Union[str, dict, CompressionPlan]


def as_plan(plan: PlanLike) -> CompressionPlan:
    """A plan from its file, its plain data, or itself."""
    if isinstance(plan, str):
        return CompressionPlan.load(plan)
    if isinstance(plan, dict):
        return CompressionPlan.from_dict(plan)
    return plan


@MODELS.register_module()
class BasisModel(BaseModel):
    """Any MMEngine model while it is compressed and fine-tuned spectrally.

    The wrapper adds to the losses of the model what fine-tuning needs. Its
    parameters, buffers and children *are* those of the model (it shares the
    dictionaries), so that names in checkpoints, ``paramwise_cfg`` and hooks
    are the bare model's: no prefix comes or goes.

    Args:
        architecture (dict | BaseModel): The model, or its config.
        checkpoint (str, optional): Weights to start from: of the dense model,
            or compressed ones, whose plan is then used.
        plan (str | dict | CompressionPlan, optional): What becomes of each
            layer, applied at once.
        planner (dict, optional): Config of a planner that makes the plan when
            :class:`~mmbasis.hooks.BasisCompressionHook` says so, before the
            first iteration.
        norm (bool): Put a batch normalisation between basis and coefficients
            while fine-tuning; it can be folded afterwards. Defaults to False.
        orthogonality (dict, optional): ``dict(weight=…)`` adds
            ``weight * sum ||F F^T - I||_F^2`` over the basis layers to the
            losses, as ``loss_orthogonality``.
        distillation (bool | dict, optional): Arguments of
            :class:`~mmbasis.models.distillation.Distillation`. Where they
            name no checkpoint, the dense model that is compressed is the
            teacher; True is the same with all defaults, if there are any for
            the model.
        data_preprocessor (dict, optional): Used for an architecture whose
            config has none (mmpretrain keeps it beside the model).

    Raises:
        ValueError: If both a plan and a planner are given, or the plan does
            not fit.
        TypeError: If the architecture is no MMEngine model.
    """

    def __init__(self,
                 architecture: Union[dict, BaseModel],
                 checkpoint: Optional[str] = None,
                 plan: Optional[PlanLike] = None,
                 planner: Optional[dict] = None,
                 norm: bool = False,
                 orthogonality: Optional[dict] = None,
                 distillation: Union[None, bool, dict] = None,
                 data_preprocessor: Optional[dict] = None) -> None:
        super().__init__()
        if plan is not None and planner is not None:
            raise ValueError('BasisModel takes a plan or a planner, not both')
        if isinstance(architecture, dict):
            if data_preprocessor is not None:
                architecture = dict(architecture)
                architecture.setdefault('data_preprocessor', data_preprocessor)
            architecture = MMENGINE_MODELS.build(architecture)
        if not isinstance(architecture, BaseModel):
            raise TypeError('architecture must be an MMEngine model, but got '
                            f'{type(architecture).__name__}')
        self._adopt(repair(architecture))
        self.planner = planner
        self.use_norm = norm
        self.orthogonality_weight = _orthogonality_weight(orthogonality)
        self.distillation = _build_distillation(architecture, distillation)
        #: set where the weights must not be initialised again
        self.has_weights = False
        #: the file that the dense weights came from
        self.source: Optional[str] = None
        guard(self)
        if get_plan(architecture) is not None:
            attach_plan(self, get_plan(architecture))
        if checkpoint is not None:
            self._start_from(checkpoint)
        if plan is not None and self.plan is None:
            self.apply_plan(as_plan(plan), project=self.has_weights)

    def _adopt(self, architecture: BaseModel) -> None:
        """Share the parameters, buffers and children of the architecture."""
        for name in ('_parameters', '_buffers', '_modules',
                     '_non_persistent_buffers_set'):
            self.__dict__[name] = architecture.__dict__[name]
        # past nn.Module.__setattr__, which would make it a child
        self.__dict__['architecture'] = architecture

    def _start_from(self, path: str) -> None:
        checkpoint = read_checkpoint(path)
        plan = plan_of(checkpoint)
        if plan is not None and self.plan is None:
            self.apply_plan(plan, project=False)
        load_weights(self, checkpoint, path)
        self.has_weights, self.source = True, path

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if 'architecture' not in self.__dict__:
                raise
            return getattr(self.__dict__['architecture'], name)

    # ------------------------------------------------------- compression
    @property
    def plan(self) -> Optional[CompressionPlan]:
        """The plan that this model follows; None while it is dense."""
        return get_plan(self)

    def apply_plan(self, plan: CompressionPlan, project: bool = True) -> None:
        """Replace layers as a plan says.

        Args:
            plan (CompressionPlan): The plan.
            project (bool): Start from the dense weights (truncated SVD)
                instead of leaving the factors to a checkpoint.
        """
        if project:
            self._take_teacher()
        apply_plan(self, plan, project=project)

    def compress(self,
                 planner: Union[BasePlanner, CompressionPlan, dict],
                 dataloader: Iterable,
                 num_batches: Optional[int] = None,
                 **kwargs) -> CompressionPlan:
        """See :func:`mmbasis.compress`."""
        self._take_teacher()
        return compress(
            self,
            planner,
            dataloader,
            num_batches,
            norm=self.use_norm,
            **kwargs)

    def truncate(self,
                 planner: Union[BasePlanner, CompressionPlan, dict],
                 dataloader: Iterable,
                 num_batches: Optional[int] = None,
                 **kwargs) -> CompressionPlan:
        """Compress the compressed model further.

        It is planned and truncated like the dense model of the same function;
        the arguments are those of :func:`mmbasis.compress`, and budgets are
        fractions of the dense model.
        """
        before = self.plan
        model = densified(self.architecture)
        plan = compress(
            model,
            planner,
            dataloader,
            num_batches,
            norm=self.use_norm,
            **kwargs)
        for name, entry in before.layers.items():
            if name in plan.layers:  # costs of the dense model that was
                plan.layers[name].params[0] = entry.params[0]
            else:
                plan.dense[name].bias = entry.bias
        self._adopt(model)
        attach_plan(self, plan)
        return plan

    def _take_teacher(self) -> None:
        """Keep the dense model as teacher, before it is compressed."""
        if (self.distillation is not None and self.distillation.teacher is None
                and self.plan is None and self.has_weights):
            self.distillation.take(self.architecture, self.source)

    # ---------------------------------------------------------- training
    def init_weights(self) -> None:
        """Initialise the architecture, unless it holds trained weights."""
        if self.has_weights:
            MMLogger.get_current_instance().info(
                'The weights are loaded: initialisation is skipped')
        else:
            self.architecture.init_weights()

    def train(self, mode: bool = True) -> 'BasisModel':
        self.architecture.train(mode)
        self.training = mode
        return self

    def forward(self,
                inputs: torch.Tensor,
                data_samples: Optional[list] = None,
                mode: str = 'tensor') -> Union[Dict[str, torch.Tensor], list]:
        """Forward the architecture; in mode ``'loss'`` add the losses of
        spectral fine-tuning.

        Raises:
            RuntimeError: If training starts while the planner was never run.
        """
        if mode != 'loss':
            return self.architecture(inputs, data_samples, mode=mode)
        if self.plan is None and self.planner is not None:
            raise RuntimeError(
                'BasisModel has a planner, but the model is dense: add '
                "custom_hooks=[dict(type='mmbasis.BasisCompressionHook')], "
                'which compresses before the first iteration, or give a plan')

        def forward() -> Dict[str, torch.Tensor]:
            return dict(self.architecture(inputs, data_samples, mode='loss'))

        if self.distillation is None:
            losses = forward()
        else:
            losses = self.distillation.losses(self, inputs, forward,
                                              data_samples)
        if self.orthogonality_weight:
            losses['loss_orthogonality'] = self.orthogonality_loss()
        return losses

    def orthogonality_loss(self) -> torch.Tensor:
        """``weight * sum_layers ||F F^T - I||_F^2``, a scalar."""
        total = next(self.parameters()).new_zeros(())
        # in full precision: it is a small difference of products
        with torch.autocast(total.device.type, enabled=False):
            for _, layer in basis_layers(self):
                total = total + orthogonality_penalty(layer.factors[0])
        return self.orthogonality_weight * total

    def val_step(self, data: Union[tuple, dict, list]) -> list:
        return self.architecture.val_step(data)

    def test_step(self, data: Union[dict, tuple, list]) -> list:
        return self.architecture.test_step(data)


def _build_distillation(
        architecture: BaseModel,
        config: Union[None, bool, dict]) -> Optional[Distillation]:
    if config is True:
        try:
            return Distillation(architecture)
        except ValueError as error:
            MMLogger.get_current_instance().info('No teacher: %s', error)
            return None
    if config is None or config is False:
        return None
    return Distillation(architecture, **config)


def _orthogonality_weight(config: Optional[dict]) -> float:
    if config is None:
        return 0.
    unknown = set(config) - {'weight'}
    weight = config.get('weight')
    if unknown or not isinstance(weight, (int, float)) or weight < 0:
        raise ValueError('orthogonality must be dict(weight=…) with a weight '
                         f'of at least 0, but got {dict(config)}')
    return float(weight)


def unwrap(model: nn.Module) -> nn.Module:
    """The bare model inside a :class:`BasisModel`; any other is returned."""
    return model.architecture if isinstance(model, BasisModel) else model
