# Copyright (c) mmbasis authors. All rights reserved.
"""The layers of a model: what they are, and which are to be compressed."""
from __future__ import annotations

import enum
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Iterator, Mapping, Sequence

import torch
import torch.nn as nn
from mmengine.model import BaseAveragedModel
from torch.nn.parameter import is_lazy

from ..layers import BasisLayer, DenseKind, kind_of, why_not
from ..running import Targets
from ..utils.schema import matching

#: what must be finite in a module
CHECKED = ('weight', 'bias', 'running_mean', 'running_var')
#: what a layer may become
FORMS = ('output', 'input', 'both', 'spatial')


class Reason(enum.Enum):
    """Why a layer stays dense."""
    UNSUPPORTED = 'unsupported'
    TIED = 'tied'
    UNSAVED = 'unsaved'
    AVERAGE = 'average'
    OFFSETS = 'offsets'
    PREDICTION = 'prediction'
    NOT_INCLUDED = 'not included'
    EXCLUDED = 'excluded'
    NO_RANK_GIVEN = 'no rank given'
    NOT_IN_PLAN = 'not in the plan'
    UNUSED = 'unused'


@dataclass(frozen=True)
class Exclusion:
    """Why a layer stays dense, for programs and in words for people."""
    reason: Reason
    words: str


OFFSETS = Exclusion(Reason.OFFSETS, 'offset branch')
PREDICTION = Exclusion(Reason.PREDICTION, 'prediction layer')
UNUSED = Exclusion(Reason.UNUSED, 'not used in the forward pass')


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer of a model: its first name there, the
    module, what is known of such layers (None if nothing is), the names of the
    classes of all modules around it and of its own, and why it cannot be
    compressed, whatever the user asks for."""
    name: str
    module: nn.Module
    kind: type[DenseKind] | None
    types: tuple[str, ...] = ()
    obstacle: Exclusion | None = None

    @property
    def known_kind(self) -> type[DenseKind]:
        """Its kind, of a layer whose kind is known."""
        assert self.kind is not None, f'{self.name} is of no known kind'
        return self.kind

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """``(G, P / G, D)``: groups, outputs per group, weights per output."""
        return self.known_kind.matrix_shape(self.module)

    @property
    def in_channels(self) -> int:
        """Input channels of a group."""
        return self.known_kind.in_channels(self.module)

    @property
    def window(self) -> int:
        """Places in the kernel."""
        return self.matrix_shape[2] // self.in_channels

    @property
    def why_one_sided(self) -> str:
        """Why an input basis is impossible or saves nothing, or empty."""
        if self.in_channels == 1:
            return 'one input channel'
        if self.window == 1:
            return 'a pointwise layer has one side'
        return self.known_kind.why_one_sided(self.module)

    def why_not(self, form: str) -> str:
        """Why a layer cannot have one of the ``FORMS``, or why that saves
        nothing; empty where it may."""
        if form == 'output':
            return ''
        if form == 'spatial':
            why = self.known_kind.why_not_spatial(self.module)
            return why and f'no spatial form: {why}'
        return self.why_one_sided and f'no input basis: {self.why_one_sided}'

    @property
    def full_spatial_rank(self) -> int:
        """The rank at which the spatial form loses nothing, per group."""
        height, width = self.module.weight.shape[2:]
        return min(height * self.in_channels, width * self.matrix_shape[1])

    @property
    def narrowable(self) -> bool:
        """Whether an input basis can save anything."""
        return not self.why_one_sided

    @property
    def full_rank(self) -> int:
        """The rank at which nothing is lost, per group."""
        return min(self.matrix_shape[1:])

    @property
    def has_bias(self) -> bool:
        return self.module.bias is not None

    def matches(self, pattern: str) -> bool:
        """Whether a pattern speaks of this layer: a regular expression that
        matches its whole name, or the name of a class in ``types``."""
        return bool(re.fullmatch(pattern, self.name)) or pattern in self.types

    def look_up(self, table: Mapping[str, Any]) -> Any:
        """The value of the first pattern that matches, or None."""
        return next((v for k, v in table.items() if self.matches(k)), None)


def find_layers(model: nn.Module) -> list[Layer]:
    """All convolution and linear layers of a model, in order of definition,
    with an obstacle where they can never be compressed.

    A layer that several modules share is listed once, under its first name.
    Layers inside another one (offsets of a deformable convolution) and inside
    a moving average of the model carry obstacles. Basis layers are not looked
    into.
    """
    saved = model.state_dict().keys()
    paths = dict(_paths(model))
    owners: dict[int, list[str]] = defaultdict(list)
    for name, path in paths.items():
        for parameter in path[-1].parameters(recurse=False):
            owners[id(parameter)].append(name)
    layers = []
    for name, path in paths.items():
        module, types = path[-1], tuple(type(x).__name__ for x in path)
        if why_not(module) == '':
            continue
        obstacle = _obstacle(path)
        if obstacle is None and f'{name}.weight'.lstrip('.') not in saved:
            obstacle = Exclusion(
                Reason.UNSAVED,
                'the model leaves its weights out of checkpoints')
        for parameter in module.parameters(recurse=False):
            for other in (x for x in owners[id(parameter)] if x != name):
                obstacle = obstacle or Exclusion(
                    Reason.TIED, f'shares its parameters with {other}')
        layers.append(Layer(name, module, kind_of(module), types, obstacle))
    return layers


def _paths(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """By name, modules outside of basis layers behind those around them."""
    paths: dict[str, tuple[nn.Module, ...]] = {}
    for name, module in model.named_modules():
        path = (*paths.get(name.rpartition('.')[0], ()), module)
        paths[name] = path
        if not any(isinstance(x, BasisLayer) for x in path):
            yield name, path


def _obstacle(path: Sequence[nn.Module]) -> Exclusion | None:
    """Why a layer cannot be compressed, by where it is and what it is."""
    *around, module = path
    if any(isinstance(x, BaseAveragedModel) for x in around[1:]):
        return Exclusion(Reason.AVERAGE, 'moving average of other layers')
    if any(why_not(x) != '' for x in around):
        return OFFSETS
    words = why_not(module)
    return Exclusion(Reason.UNSUPPORTED, words) if words else None


def check_patterns(layers: Sequence[Layer], patterns: Sequence[str],
                   key: str) -> None:
    """Require that each pattern matches some layer; the ValueError names
    ``key``, where they were given, the pattern and what there is."""
    for pattern in patterns:
        found = matching(pattern, [x.name for x in layers], key)
        if found or any(pattern in x.types for x in layers):
            continue
        shown = ', '.join([x.name for x in layers[:5]] +
                          ['…'] * (len(layers) > 5))
        raise ValueError(
            f'{key}: the pattern {pattern!r} matches none of the '
            f'{len(layers)} layers. A pattern must match a whole layer '
            f'name or be a class name. Layers: {shown}')


def check_finite(model: nn.Module) -> None:
    """Require finite weights and biases of all modules, and statistics of
    normalisations; the ValueError names them."""
    broken = []
    for name, module in model.named_modules():
        tensors = {**module._parameters, **module._buffers}
        broken += [
            f'{name}.{key}'.lstrip('.') for key in CHECKED
            if tensors.get(key) is not None and not is_lazy(tensors[key])
            and not bool(torch.isfinite(tensors[key]).all())]
    if broken:
        raise ValueError('weights are NaN or infinite in '
                         f'{", ".join(broken[:5])} ({len(broken)} tensors); '
                         'compress a checkpoint whose training converged')


def freeze(instance: Any, name: str) -> None:
    """Make a mapping in a frozen dataclass a read-only copy."""
    value = MappingProxyType(dict(getattr(instance, name)))
    object.__setattr__(instance, name, value)


@dataclass(frozen=True)
class Selection:
    """All layers of a model, and by name why some stay dense; the others are
    chosen."""
    layers: tuple[Layer, ...]
    excluded: Mapping[str, Exclusion] = field(default_factory=dict)

    def __post_init__(self) -> None:
        freeze(self, 'excluded')

    @property
    def chosen(self) -> list[Layer]:
        """The layers that a planner may compress."""
        return [x for x in self.layers if x.name not in self.excluded]

    @property
    def fitted(self) -> list[Layer]:
        """The layers that reconstruction fits: those chosen, whatever the
        planner makes of them, and prediction layers."""
        return [x for x in self.layers if x.kind is not None and (
            x.name not in self.excluded
            or self.excluded[x.name].reason is Reason.PREDICTION)]

    def without(self, excluded: Mapping[str, Exclusion]) -> Selection:
        """The same with more layers excluded; earlier reasons stay."""
        return replace(self, excluded={**excluded, **self.excluded})


@dataclass(frozen=True)
class Rules:
    """What a user wants to have compressed, see :class:`BasePlanner`."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    prediction_layers: bool = False

    @property
    def need_targets(self) -> bool:
        """Whether :meth:`select` looks at the targets."""
        return not (self.prediction_layers or self.include)

    def select(self, layers: Sequence[Layer], targets: Targets) -> Selection:
        """Choose layers; ValueError if a pattern matches none."""
        check_patterns(layers, self.include, 'include')
        check_patterns(layers, self.exclude, 'exclude')
        judged = ((x.name, self._judge(x, targets)) for x in layers)
        return Selection(tuple(layers), {k: v for k, v in judged if v})

    def _judge(self, layer: Layer, targets: Targets) -> Exclusion | None:
        if layer.obstacle is not None:
            return layer.obstacle
        hits = [p for p in self.exclude if layer.matches(p)]
        if self.include and not any(layer.matches(p) for p in self.include):
            return Exclusion(Reason.NOT_INCLUDED, 'not included')
        if hits:
            return Exclusion(Reason.EXCLUDED, f'excluded by {hits[0]!r}')
        if not self.need_targets:
            return None
        if layer.name in targets.offsets:
            return OFFSETS
        return PREDICTION if layer.name in targets.predictions else None
