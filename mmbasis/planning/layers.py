# Copyright (c) mmbasis authors. All rights reserved.
"""The layers of a model that a plan speaks of: what they are."""
import enum
import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Dict, Iterator, List, Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
from mmengine.model import BaseAveragedModel
from torch.nn.parameter import is_lazy

from ..layers import BasisLayer, DenseKind, kind_of, why_not


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
    """That a layer stays dense, and why.

    Args:
        reason (Reason): For programs.
        words (str): For people.
    """
    reason: Reason
    words: str


#: what is said of layers without a name of their own in the message
OFFSETS = Exclusion(Reason.OFFSETS, 'offset branch')
PREDICTION = Exclusion(Reason.PREDICTION, 'prediction layer')
AVERAGE = Exclusion(Reason.AVERAGE, 'moving average of other layers')
UNSAVED = Exclusion(Reason.UNSAVED,
                    'the model leaves its weights out of checkpoints')
UNUSED = Exclusion(Reason.UNUSED, 'not used in the forward pass')


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or linear layer of a model.

    Args:
        name (str): Its first name in ``model.named_modules()``.
        module (nn.Module): The dense layer.
        kind (type, optional): What is known of such layers, see
            :class:`mmbasis.layers.DenseKind`; None if nothing is.
        types (tuple[str]): Names of its class and of the classes of all
            modules around it.
        obstacle (Exclusion, optional): Why it cannot be compressed, whatever
            the user asks for.
    """
    name: str
    module: nn.Module
    kind: Optional[Type[DenseKind]]
    types: Tuple[str, ...] = ()
    obstacle: Optional[Exclusion] = None

    @property
    def known_kind(self) -> Type[DenseKind]:
        """Its kind; TypeError if none is known."""
        if self.kind is None:
            raise TypeError(f'{self.name}, a {type(self.module).__name__}, '
                            'is of no known kind of layer')
        return self.kind

    @property
    def matrix_shape(self) -> Tuple[int, int, int]:
        """``(G, P / G, D)``: groups, outputs per group, weights per output."""
        return self.known_kind.matrix_shape(self.module)

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


def find_layers(model: nn.Module) -> List[Layer]:
    """All convolution and linear layers of a model, in order of definition.

    A layer that several modules share is listed once, under its first name.
    Layers inside another one (offsets of a deformable convolution) and inside
    a moving average of the model carry obstacles.

    Args:
        model (nn.Module): Any model; basis layers are not looked into.

    Returns:
        list[Layer]: Those that can never be compressed carry the obstacle.
    """
    saved = model.state_dict().keys()
    branches: Tuple[str, ...] = ()
    averages: Tuple[str, ...] = ()
    owners: Dict[int, List[str]] = defaultdict(list)
    layers = []
    for name, module in _walk(model):
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
        if isinstance(module, BaseAveragedModel):
            averages += (f'{name}.', )
        words = why_not(module)
        if words == '':
            continue
        obstacle = None
        if name.startswith(averages):
            obstacle = AVERAGE
        elif name.startswith(branches):
            obstacle = OFFSETS
        elif words is not None:
            obstacle = Exclusion(Reason.UNSUPPORTED, words)
        elif f'{name}.weight'.lstrip('.') not in saved:
            obstacle = UNSAVED
        branches += (f'{name}.', )
        layers.append(
            Layer(name, module, kind_of(module), _types(model, name),
                  obstacle))
    return [_unless_tied(layer, owners) for layer in layers]


def _walk(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    """All modules outside of basis layers."""
    inside: Tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, BasisLayer):
            inside += (f'{name}.', )
        elif not name.startswith(inside):
            yield name, module


def _unless_tied(layer: Layer, owners: Dict[int, List[str]]) -> Layer:
    """The layer, with an obstacle if it shares parameters with others."""
    for parameter in layer.module.parameters(recurse=False):
        for other in owners[id(parameter)]:
            if other != layer.name and layer.obstacle is None:
                words = f'shares its parameters with {other}'
                return replace(layer, obstacle=Exclusion(Reason.TIED, words))
    return layer


def _types(model: nn.Module, name: str) -> Tuple[str, ...]:
    names, module = [type(model).__name__], model
    for part in name.split('.') if name else ():
        module = getattr(module, part)
        names.append(type(module).__name__)
    return tuple(names)


def check_patterns(layers: Sequence[Layer], patterns: Sequence[str],
                   key: str) -> None:
    """Require that each pattern matches some layer, see
    :meth:`Layer.matches`; the ValueError names ``key``, where they were given,
    the pattern and what there is."""
    for pattern in patterns:
        try:
            if any(layer.matches(pattern) for layer in layers):
                continue
        except re.error as error:
            raise ValueError(f'{key}: {pattern!r} is not a regular '
                             f'expression: {error}') from None
        shown = ', '.join([x.name for x in layers[:5]] +
                          ['…'] * (len(layers) > 5))
        raise ValueError(
            f'{key}: the pattern {pattern!r} matches none of the '
            f'{len(layers)} layers. A pattern must match a whole layer '
            f'name or be a class name. Layers: {shown}')


def check_finite(layers: Sequence[Layer]) -> None:
    """Require finite weights and biases; the ValueError names layers."""
    broken = [
        layer.name for layer in layers
        if not all(is_lazy(x) or bool(torch.isfinite(x).all())
                   for x in layer.module.parameters(recurse=False))
    ]
    if broken:
        raise ValueError('weights are NaN or infinite in '
                         f'{", ".join(broken[:5])} ({len(broken)} layers); '
                         'compress a checkpoint whose training converged')
