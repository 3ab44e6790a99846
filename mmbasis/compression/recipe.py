# Copyright (c) mmbasis authors. All rights reserved.
"""What a user wants: how to compress, and how to fine-tune."""
import math
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Tuple, Union

from ..planning import BasePlanner, CompressionPlan
from ..registry import PLANNERS

PlannerLike = Union[BasePlanner, Mapping[str, Any]]
PlanLike = Union[str, Mapping[str, Any], CompressionPlan]


def as_planner(planner: PlannerLike) -> BasePlanner:
    """A planner from its config, or itself; a TypeError if it is neither."""
    if isinstance(planner, BasePlanner):
        return planner
    if isinstance(planner, Mapping):
        # the default scope, say mmdet, knows no planners
        return PLANNERS.build(dict(planner, _scope_=PLANNERS.scope))
    raise TypeError("planner must be a config such as dict(type='Budget"
                    f"Planner', macs=0.5), but got {planner!r}")


def as_plan(plan: PlanLike) -> CompressionPlan:
    """A plan from its file, its plain data, or itself; else a TypeError."""
    if isinstance(plan, CompressionPlan):
        return plan
    if isinstance(plan, str):
        return CompressionPlan.load(plan)
    if isinstance(plan, Mapping):
        return CompressionPlan.from_dict(dict(plan))
    raise TypeError('plan must be the name of a JSON file, its content or a '
                    f'CompressionPlan, but got {plan!r}')


def _require(condition: bool, key: str, allowed: str, value: Any) -> None:
    if not condition:
        raise ValueError(f'{key} must be {allowed}, but got {value!r}')


def _require_weight(key: str, value: Any) -> None:
    _require(
        isinstance(value, (int, float)) and not isinstance(value, bool)
        and 0 <= value < math.inf, key, 'a number of at least 0', value)


@dataclass(frozen=True)
class Calibration:
    """The images that layers are calibrated with.

    Args:
        num_batches (int): Number of batches, at least 1. Defaults to 8.
        dataloader (dict, optional): Config of a data loader. By default that
            of training, reshuffled and with the transforms of testing.
    """
    num_batches: int = 8
    dataloader: Optional[Mapping[str, Any]] = None

    def __post_init__(self) -> None:
        number = self.num_batches
        _require(type(number) is int and number > 0, 'calibration.num_batches',
                 'a positive integer', number)
        _require(
            self.dataloader is None or isinstance(self.dataloader, Mapping),
            'calibration.dataloader', 'the config of a data loader',
            self.dataloader)


@dataclass(frozen=True)
class Orthogonality:
    """The penalty ``weight * sum ||F F^T - I||_F^2`` over basis layers, with
    a weight of at least 0."""
    weight: float

    def __post_init__(self) -> None:
        _require_weight('orthogonality.weight', self.weight)


@dataclass(frozen=True)
class Term:
    """One comparison of the model with its teacher.

    Args:
        module (str): Name of a module, or a regular expression that matches
            whole names.
        type (str): ``'kl'`` for logits, or ``'mse'`` for features and maps.
        weight (float): At least 0. Defaults to 1.
        temperature (float): Only for ``'kl'``, positive. Defaults to 4.
    """
    module: str
    type: str
    weight: float = 1.
    temperature: float = 4.

    def __post_init__(self) -> None:
        key = 'a term of distillation'
        _require(
            isinstance(self.module, str), f'{key}: module',
            'the name of a module', self.module)
        _require(self.type in ('kl', 'mse'), f'{key}: type', "'kl' or 'mse'",
                 self.type)
        _require_weight(f'{key}: weight', self.weight)
        _require_weight(f'{key}: temperature', self.temperature)
        _require(self.temperature > 0 and self.type == 'kl'
                 or self.temperature == Term.temperature,
                 f'{key}: temperature', "positive, and only for type='kl'",
                 self.temperature)


@dataclass(frozen=True)
class Teaching:
    """How the teacher is compared with the model.

    Args:
        checkpoint (str, optional): The teacher's weights. Defaults to the
            dense model that is compressed.
        terms (tuple[Term], optional): What is compared. Defaults to what
            suits the model, see
            :class:`~mmbasis.models.distillation.Distillation`.
        task_weight (float, optional): Factor of the model's own losses, at
            least 0. Defaults to 0.3 where logits are compared, else to 1.
    """
    checkpoint: Optional[str] = None
    terms: Optional[Tuple[Term, ...]] = None
    task_weight: Optional[float] = None

    def __post_init__(self) -> None:
        _require(self.checkpoint is None or isinstance(self.checkpoint, str),
                 'distillation.checkpoint', 'the name of a file',
                 self.checkpoint)
        if self.task_weight is not None:
            _require_weight('distillation.task_weight', self.task_weight)

    @classmethod
    def of(cls, config: Any) -> Optional['Teaching']:
        """From its config; True is the default, False is no teacher."""
        if isinstance(config, bool):
            return cls() if config else None
        if isinstance(config, Mapping) and config.get('terms') is not None:
            terms = config['terms']
            _require(isinstance(terms, (list, tuple)), 'distillation.terms',
                     'a list of terms', terms)
            config = dict(
                config,
                terms=tuple(
                    _from_config(Term, 'a term of distillation', x)
                    for x in terms))
        return _from_config(cls, 'distillation', config)


@dataclass(frozen=True)
class Recipe:
    """The one description of a compression and of the fine-tuning after it.
    :meth:`of` makes it from the values that stand in configs.

    Args:
        planner (BasePlanner, optional): Makes the plan.
        plan (CompressionPlan, optional): A plan to follow instead.
        calibration (Calibration): The images that are looked at.
        reconstruction (str, optional): ``'local'`` takes each basis from the
            spectrum of its layer; ``'sequential'``, the default for planners
            that look at data, then fits the layers one after the other to the
            dense model's outputs.
        recalibration (bool | str): Whether to compute the statistics of batch
            normalisations again at the end; ``'auto'``, the default, keeps
            them if they bring the outputs on held-out images nearer to the
            dense model's, and does nothing for planners without data.
        norm (bool): Put a batch normalisation between basis and coefficients,
            as in the paper. Defaults to False.
        orthogonality (Orthogonality, optional): A penalty in fine-tuning.
        distillation (Teaching, optional): The teacher; None is no teacher.
        config (Mapping): The values that :meth:`of` was given.

    Raises:
        TypeError, ValueError: Naming the field and what it may be.
    """
    planner: Optional[BasePlanner] = None
    plan: Optional[CompressionPlan] = None
    calibration: Calibration = Calibration()
    reconstruction: Optional[str] = None
    recalibration: Union[bool, str] = 'auto'
    norm: bool = False
    orthogonality: Optional[Orthogonality] = None
    distillation: Optional[Teaching] = Teaching()
    config: Mapping[str, Any] = field(
        default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _require(self.reconstruction in (None, 'local', 'sequential'),
                 'reconstruction', "'local' or 'sequential'",
                 self.reconstruction)
        _require(
            isinstance(self.recalibration, bool)
            or self.recalibration == 'auto', 'recalibration',
            "True, False or 'auto'", self.recalibration)
        _require(isinstance(self.norm, bool), 'norm', 'True or False',
                 self.norm)
        if self.norm and self.plan is not None and not self.plan.norm:
            raise ValueError('norm=True is asked for, but the plan to follow '
                             'has no normalisation')

    @classmethod
    def of(cls, **config: Any) -> 'Recipe':
        """A recipe from the values that configs hold; None stands for the
        default.

        Args:
            **config: The fields above but ``config``: a planner by its
                config, a plan by its file or content, the other objects by
                their fields. ``distillation``: True is a teacher with all
                defaults, False none.
        """
        given = {k: v for k, v in config.items() if v is not None}
        if 'planner' in given and 'plan' in given:
            raise ValueError('give a planner or a plan, not both')
        convert: Dict[str, Callable] = dict(
            planner=as_planner,
            plan=as_plan,
            calibration=partial(_from_config, Calibration, 'calibration'),
            orthogonality=partial(_from_config, Orthogonality,
                                  'orthogonality'),
            distillation=Teaching.of)
        made = {
            k: convert[k](v) if k in convert else v
            for k, v in given.items()
        }
        return _from_config(cls, 'a recipe', dict(made, config=given))

    @property
    def asks_for_teacher(self) -> bool:
        """Whether the teacher is spelt out, so that doing without is an
        error."""
        return not isinstance(self.config.get('distillation', True), bool)

    @property
    def data_aware(self) -> bool:
        """Whether bases come from outputs on data."""
        if self.planner is not None:
            return self.planner.data_aware
        return bool(self.plan and self.plan.planner.get('data_aware'))

    @property
    def loss_aware(self) -> Optional[bool]:
        """Whether sensitivities are wanted; None: where they can be had."""
        if self.planner is not None:
            return self.planner.loss_aware
        return self.plan is not None and self.plan.planner.get(
            'loss_aware', False)

    @property
    def is_sequential(self) -> bool:
        """Whether layers are fitted one after the other."""
        if self.reconstruction is None:
            return self.data_aware
        return self.reconstruction == 'sequential'


def _from_config(cls: Any, key: str, config: Any) -> Any:
    """A dataclass from its config; an instance is returned as it is."""
    if isinstance(config, cls):
        return config
    names = [x.name for x in fields(cls)]
    if not isinstance(config, Mapping) or set(config) - set(names):
        raise ValueError(f'{key} must be dict(…) with some of '
                         f'{", ".join(names)}, but got {config!r}')
    try:
        return cls(**config)
    except TypeError as error:
        raise ValueError(f'{key} is not complete: {error}') from None
