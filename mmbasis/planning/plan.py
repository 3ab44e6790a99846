# Copyright (c) mmbasis authors. All rights reserved.
"""What becomes of each layer of a model."""
import json
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Dict, List, Optional

from ..utils.io import write_atomically
from ..utils.schema import (
    BOOL,
    COUNT,
    NONE,
    POSITIVE,
    SHAPE,
    SHARE,
    TEXT,
    WEIGHT,
    WHOLE,
    Checked,
    Rule,
    check_all,
    checked,
    dict_of,
    is_integer,
    list_of,
    read_json,
    shown,
)
from ..version import __version__
from .costs import Costs, Ranks

#: Raised when a reader of an older version could misread a plan.
PLAN_VERSION = 2
_PAIR = list_of('a list of two numbers of at least 0', WEIGHT, 2)
#: what stands beside the layers
_HEAD: Dict[str, Rule] = dict(
    norm=BOOL,
    planner=dict_of('a dict', Rule('', lambda x: True)),
    predicted_ms=dict_of(
        'by device, positive numbers "before" and "after"', Rule(
            '', lambda x: isinstance(x, dict) and all(
                POSITIVE.allows(x.get(k)) for k in ('before', 'after')))))
#: what is used of the planner's record
_RECORD = dict(data_aware=BOOL, loss_aware=BOOL | NONE)


@dataclass(frozen=True)
class LayerPlan(Checked):
    """How one layer is represented: basis filters per group (None for no
    coefficients), as many of them as lose nothing, name of the kind of layer,
    shape of the dense weights, whether it has a bias, fraction of its energy
    that is kept, multiply-accumulates of one image and parameters, each before
    and after, and input channels of the basis per group (None for no input
    basis); and whether the basis is k x 1 and the coefficients 1 x k."""
    rank: Optional[int] = checked(COUNT | NONE)
    full_rank: int = checked(COUNT)
    kind: str = checked(TEXT)
    shape: List[int] = checked(SHAPE)
    bias: bool = checked(BOOL)
    energy: float = checked(SHARE)
    macs: List[float] = checked(_PAIR)
    params: List[int] = checked(_PAIR)
    input_rank: Optional[int] = checked(COUNT, None)
    spatial: bool = checked(BOOL, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank is None and (self.input_rank is None or self.spatial):
            raise ValueError('rank must be a positive integer, but got None')

    @property
    def ranks(self) -> Ranks:
        return Ranks(self.rank, self.input_rank, self.spatial)

    @property
    def form(self) -> str:
        """See :class:`Ranks`."""
        return self.ranks.form

    @classmethod
    def of(cls, costs: Costs, ranks: Ranks) -> 'LayerPlan':
        """The entry of a layer that gets some ranks."""
        layer = costs.layer
        full = layer.full_spatial_rank if ranks.spatial else layer.full_rank
        return cls(ranks.output, full, layer.known_kind.name,
                   list(layer.module.weight.shape), costs.form.bias
                   or layer.has_bias, costs.energy_kept(ranks),
                   [costs.macs(), costs.macs(ranks)],
                   [costs.params(), costs.params(ranks)], ranks.input,
                   ranks.spatial)


@dataclass(frozen=True)
class DensePlan(Checked):
    """A layer that stays as it is: why, whether it was the planner's choice
    (such layers count towards the budget), shape of the weights,
    multiply-accumulates of one image, parameters, and whether it got a bias
    that the architecture does not give it (it was merged from a basis layer
    that had one)."""
    reason: str = checked(TEXT)
    compressible: bool = checked(BOOL)
    shape: List[int] = checked(SHAPE)
    macs: float = checked(WEIGHT)
    params: int = checked(WHOLE)
    bias: bool = checked(BOOL, False)

    @classmethod
    def of(cls, costs: Costs, reason: str, compressible: bool) -> 'DensePlan':
        """The entry of a layer that stays dense for a reason."""
        return cls(reason, compressible,
                   list(costs.layer.module.weight.shape), costs.macs(),
                   costs.params())


@dataclass
class CompressionPlan:
    """What becomes of each layer of one model: plain data, JSON on disk. By
    name, in order of definition, the layers that get a basis and those that
    stay dense; whether a batch normalisation stands between basis and
    coefficients; the record of the planner; and, where it was predicted, the
    time of the layers for one image by device: see :func:`predicted_ms`."""
    layers: Dict[str, LayerPlan]
    dense: Dict[str, DensePlan] = field(default_factory=dict)
    norm: bool = False
    planner: Dict[str, Any] = field(default_factory=dict)
    predicted_ms: Dict[str, Dict[str, float]] = field(default_factory=dict)

    @property
    def structure(self) -> tuple:
        """All that the parameters of a model depend on."""
        layers = {k: (x.ranks, x.bias) for k, x in self.layers.items()}
        return layers, self.norm, {k for k, x in self.dense.items() if x.bias}

    def with_dense_costs(self, dense: 'CompressionPlan') -> 'CompressionPlan':
        """The same for a model that was compressed before: what the dense
        model costs, and which layers got a bias, is in that plan."""
        layers, kept = dict(self.layers), dict(self.dense)
        for name, entry in dense.layers.items():
            if name in layers:
                params = [entry.params[0], layers[name].params[1]]
                layers[name] = replace(layers[name], params=params)
            else:
                kept[name] = replace(kept[name], bias=entry.bias)
        return replace(self, layers=layers, dense=kept)

    def totals(self, convs_only: bool = False) -> Dict[str, Dict[str, float]]:
        """MACs and parameters of the layers that the budget counts.

        Args:
            convs_only (bool): Count all convolutions, also those that had to
                stay dense, and nothing else. Defaults to False.

        Returns:
            dict: ``{'macs': {'before', 'after'}, 'params': {…}}``.
        """
        rows = [(p.shape, p.macs, p.params) for p in self.layers.values()]
        rows += [(p.shape, [p.macs] * 2, [p.params] * 2)
                 for p in self.dense.values() if convs_only or p.compressible]
        pairs = [row[1:] for row in rows if not convs_only or len(row[0]) > 2]
        macs, params = zip(*pairs) if pairs else ([], [])
        return {
            key: dict(before=sum(v[0] for v in x), after=sum(v[1] for v in x))
            for key, x in (('macs', macs), ('params', params))
        }

    def to_dict(self) -> Dict[str, Any]:
        """The plan as plain types, as it stands in checkpoints and JSON."""
        own = asdict(self)
        head = dict(version=PLAN_VERSION, mmbasis=__version__)
        head.update({
            key: own.pop(key) for key in ('planner', 'norm', 'predicted_ms')})
        return dict(head, totals=self.totals(), **own)

    @classmethod
    def from_dict(cls, data: Dict[str, Any]) -> 'CompressionPlan':
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: If the data are no plan, or of a newer version.
        """
        if not isinstance(data, dict) or 'layers' not in data:
            raise ValueError('this is not a compression plan: a mapping with '
                             '"version" and "layers" is expected')
        version: Any = data.get('version')
        if not is_integer(version) or not 1 <= version <= PLAN_VERSION:
            raise ValueError(
                f'the plan has version {version!r}, this mmbasis '
                f'({__version__}) reads up to {PLAN_VERSION}: upgrade mmbasis')
        check_all('the plan: ', _HEAD, data)
        layers = _entries(data['layers'], 'layers', LayerPlan)
        dense = _entries(data.get('dense', {}), 'dense', DensePlan)
        both = sorted(layers.keys() & dense.keys())
        if both:
            raise ValueError(f'the plan has {both[0]!r} in layers and in '
                             f'dense ({len(both)} in all)')
        try:
            planner = deepcopy(dict(data.get('planner', {})))
        except RecursionError:
            raise ValueError(
                'the plan: planner is nested too deeply') from None
        check_all('the plan: planner.', _RECORD, planner)
        times = data.get('predicted_ms', {})
        return cls(layers, dense, data.get('norm', False), planner, {
            name: {k: float(row[k]) for k in ('before', 'after')}
            for name, row in times.items()})

    def dumps(self) -> str:
        """JSON with one line per layer, so that plans can be read and compared
        line by line."""
        blocks = []
        for key, value in self.to_dict().items():
            text = json.dumps(value)
            if key in ('layers', 'dense', 'predicted_ms'):
                rows = ',\n'.join(f'    {json.dumps(k)}: {json.dumps(v)}'
                                  for k, v in value.items())
                text = f'{{\n{rows}\n  }}'
            blocks.append(f'  {json.dumps(key)}: {text}')
        return '{\n' + ',\n'.join(blocks) + '\n}\n'

    def save(self, path: str) -> None:
        """Write the plan as JSON, whole or not at all."""
        write_atomically(path, self.dumps())

    @classmethod
    def load(cls, path: str) -> 'CompressionPlan':
        """Read a plan that :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no plan, or one of a newer version.
        """
        data = read_json(path)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f'{path}: {error}') from None


def _entries(data: Any, key: str, cls: Any) -> Dict[str, Any]:
    """The entries of layers by name; the error says which one is wrong."""
    if not isinstance(data, dict):
        raise ValueError(f'the plan: {key} must be a dict by layer, but got '
                         f'{shown(data)}')
    entries = {}
    for name, row in data.items():
        where = f'the plan has a malformed layer, {key}[{shown(name)}]'
        if not isinstance(name, str) or not isinstance(row, dict):
            raise ValueError(f'{where}: {shown(row)}')
        try:
            entry = entries[name] = cls(**row)
        except (TypeError, ValueError) as error:
            raise ValueError(f'{where}: {error}') from None
        rank = getattr(entry, 'rank', None) or 1
        if rank > getattr(entry, 'full_rank', rank):
            raise ValueError(f'{where}: rank {rank} is above full_rank')
    return entries
