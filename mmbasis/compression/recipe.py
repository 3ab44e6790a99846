# Copyright (c) mmbasis authors. All rights reserved.
"""What a user wants: how to compress, and how to fine-tune."""
import re
from dataclasses import dataclass, field, fields
from typing import (
    Any,
    Callable,
    Dict,
    Mapping,
    Optional,
    Tuple,
    Type,
    Union,
)

from ..planning import BasePlanner, CompressionPlan
from ..registry import PLANNERS
from ..utils.schema import (
    BOOL,
    COUNT,
    WEIGHT,
    Checked,
    Rule,
    checked,
    of_type,
    one_of,
    shown,
)

PlannerLike = Union[BasePlanner, Mapping[str, Any]]
PlanLike = Union[str, Mapping[str, Any], CompressionPlan]


def as_planner(planner: PlannerLike) -> BasePlanner:
    """A planner from its config, or itself; a TypeError or a KeyError if it is
    neither."""
    if isinstance(planner, BasePlanner):
        return planner
    kind: Type[Exception] = TypeError
    made, problem = None, ''
    name = planner.get('type') if isinstance(planner, Mapping) else ''
    # MMEngine takes any other text for a module, and fails with it
    if not isinstance(name, str) or re.fullmatch(r'\w+(\.\w+)*', name):
        try:
            # the default scope, say mmdet, knows no planners
            made = PLANNERS.build(dict(planner, _scope_=PLANNERS.scope))
        except (KeyError, TypeError) as error:
            kind, problem = type(error), f': {(*error.args, "")[0]}'
    if isinstance(made, BasePlanner):
        return made
    raise kind("planner must be a config such as dict(type='BudgetPlanner', "
               f'macs=0.5), but got {shown(planner)}{problem}')


def as_plan(plan: PlanLike) -> CompressionPlan:
    """A plan from its file, its plain data, or itself; else a TypeError."""
    if isinstance(plan, CompressionPlan):
        return plan
    if isinstance(plan, str):
        return CompressionPlan.load(plan)
    if isinstance(plan, Mapping):
        return CompressionPlan.from_dict(dict(plan))
    raise TypeError('plan must be the name of a JSON file, its content or a '
                    f'CompressionPlan, but got {shown(plan)}')


@dataclass(frozen=True)
class Calibration(Checked):
    """The images that layers are calibrated with.

    Args:
        num_batches (int): Number of batches, at least 1. Defaults to 8.
        dataloader (dict, optional): Config of a data loader. By default that
            of training, reshuffled and with the transforms of testing.
    """
    prefix = 'calibration.'
    num_batches: int = checked(COUNT, 8)
    dataloader: Optional[Mapping[str, Any]] = checked(
        of_type('the config of a data loader', Mapping), None)


@dataclass(frozen=True)
class Orthogonality(Checked):
    """The penalty ``weight * sum ||F F^T - I||_F^2`` over basis layers, with
    a weight of at least 0."""
    prefix = 'orthogonality.'
    weight: float = checked(WEIGHT)


@dataclass(frozen=True)
class Term(Checked):
    """One comparison of the model with its teacher.

    Args:
        module (str): Name of a module, or a regular expression that matches
            whole names.
        type (str): ``'kl'`` for logits, or ``'mse'`` for features and maps.
        weight (float): At least 0. Defaults to 1.
        temperature (float): Only for ``'kl'``, positive. Defaults to 4.
    """
    prefix = 'a term of distillation: '
    module: str = checked(of_type('the name of a module', str))
    type: str = checked(one_of('kl', 'mse'))
    weight: float = checked(WEIGHT, 1.)
    temperature: float = checked(WEIGHT, 4.)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature != Term.temperature and (self.type != 'kl'
                                                     or not self.temperature):
            raise ValueError(f'{self.prefix}temperature must be positive, and '
                             "only for type='kl', but got "
                             f'{self.temperature!r}')


@dataclass(frozen=True)
class Teaching(Checked):
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
    prefix = 'distillation.'
    checkpoint: Optional[str] = checked(of_type('the name of a file', str),
                                        None)
    terms: Optional[Tuple[Term, ...]] = checked(
        Rule('a list of at least one term',
             lambda x: isinstance(x, tuple) and bool(x)), None)
    task_weight: Optional[float] = checked(WEIGHT, None)

    @classmethod
    def parse(cls, config: Any) -> Optional['Teaching']:
        """True is a teacher with all defaults, False is none."""
        if isinstance(config, bool):
            return cls() if config else None
        terms = isinstance(config, Mapping) and config.get('terms')
        if isinstance(terms, (list, tuple)):
            config = dict(config, terms=tuple(map(Term.parse, terms)))
        return super().parse(config)


@dataclass(frozen=True)
class Recipe(Checked):
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
    reconstruction: Optional[str] = checked(
        one_of('local', 'sequential'), None)
    recalibration: Union[bool, str] = checked(BOOL | one_of('auto'), 'auto')
    norm: bool = checked(BOOL, False)
    orthogonality: Optional[Orthogonality] = None
    distillation: Optional[Teaching] = Teaching()
    config: Mapping[str, Any] = field(
        default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        if 'config' in config:
            raise ValueError('config is no field of a recipe')
        names = {x.name for x in fields(cls)}
        given = {k: v for k, v in config.items()
                 if v is not None or k not in names}
        if 'planner' in given and 'plan' in given:
            raise ValueError('give a planner or a plan, not both')
        parsers: Dict[str, Callable] = dict(
            planner=as_planner,
            plan=as_plan,
            calibration=Calibration.parse,
            orthogonality=Orthogonality.parse,
            distillation=Teaching.parse)
        made = {k: parsers[k](v) if k in parsers else v
                for k, v in given.items()}
        return cls.parse(dict(made, config=given))

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
    def forms(self) -> Tuple[str, ...]:
        """What layers may become."""
        if self.planner is not None:
            return self.planner.forms
        layers = self.plan.layers if self.plan is not None else {}
        return tuple(dict.fromkeys(x.form for x in layers.values()))

    @property
    def is_sequential(self) -> bool:
        """Whether layers are fitted one after the other."""
        if self.reconstruction is None:
            return self.data_aware
        return self.reconstruction == 'sequential'
