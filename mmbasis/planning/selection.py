# Copyright (c) mmbasis authors. All rights reserved.
"""Which layers are to be compressed, and why not the others."""
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, List, Mapping, Optional, Sequence, Tuple

from ..running import Targets
from .layers import (
    OFFSETS,
    PREDICTION,
    Exclusion,
    Layer,
    Reason,
    check_patterns,
)


def freeze(instance: Any, name: str) -> None:
    """Make a mapping in a frozen dataclass a read-only copy."""
    value = MappingProxyType(dict(getattr(instance, name)))
    object.__setattr__(instance, name, value)


@dataclass(frozen=True)
class Selection:
    """The layers of a model, and which of them stay dense for what reason.

    Args:
        layers (tuple[Layer]): All layers of the model.
        excluded (Mapping[str, Exclusion]): By name; all others are chosen.
    """
    layers: Tuple[Layer, ...]
    excluded: Mapping[str, Exclusion] = field(default_factory=dict)

    def __post_init__(self) -> None:
        freeze(self, 'excluded')

    @property
    def chosen(self) -> List[Layer]:
        """The layers that a planner may compress."""
        return [x for x in self.layers if x.name not in self.excluded]

    def without(self, excluded: Mapping[str, Exclusion]) -> 'Selection':
        """The same with more layers excluded; earlier reasons stay."""
        return replace(self, excluded={**excluded, **self.excluded})


@dataclass(frozen=True)
class Rules:
    """What a user wants to have compressed.

    Args:
        include (tuple[str]): Patterns; where given, all else stays dense.
        exclude (tuple[str]): Patterns of layers that stay dense.
        prediction_layers (bool): Whether to compress the layers in
            :class:`~mmbasis.running.Targets` as well, which otherwise only
            ``include`` does. Defaults to False.
    """
    include: Tuple[str, ...] = ()
    exclude: Tuple[str, ...] = ()
    prediction_layers: bool = False

    @property
    def need_targets(self) -> bool:
        """Whether :meth:`select` looks at the targets."""
        return not (self.prediction_layers or self.include)

    def select(self, layers: Sequence[Layer], targets: Targets) -> Selection:
        """Choose layers; ValueError if a pattern matches none."""
        check_patterns(layers, self.include, 'include')
        check_patterns(layers, self.exclude, 'exclude')
        judged = {x.name: self._judge(x, targets) for x in layers}
        excluded = {k: v for k, v in judged.items() if v is not None}
        return Selection(tuple(layers), excluded)

    def _judge(self, layer: Layer, targets: Targets) -> Optional[Exclusion]:
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
