# Copyright (c) mmbasis authors. All rights reserved.
"""The layers of a model that a plan speaks of: what they cost, what they can
lose."""
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Type

import torch
import torch.nn as nn
from mmengine.model import BaseAveragedModel
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..factorization import Spectrum
from ..layers import BasisLayer, basis_layer_type, why_not
from ..running.graph import Targets

#: why a layer stays dense unless somebody asks for it
PREDICTION = 'prediction layer'
OFFSETS = 'offset branch'
#: why a layer becomes what another one becomes, see :func:`apply_plan`
AVERAGE = 'moving average of other layers'
#: what is not saved could not be loaded in its compressed form
UNSAVED = 'the model leaves its weights out of checkpoints (LoRA)'
NO_TARGETS = Targets(frozenset(), frozenset())


@dataclass
class LayerInfo:
    """A convolution or linear layer and all that planning needs of it.

    Args:
        name (str): Its first name in ``model.named_modules()``.
        module (nn.Module): The dense layer.
        kind (type, optional): The basis layer class for it, if there is one.
        reason (str): Why it must stay dense; empty where it need not.
        weight_positions (float): How often the weights are applied for one
            image, so that ``weight.numel() * weight_positions`` is its MACs.
        out_positions (float): Output positions for one image.
        calls (float): Calls in one forward pass; more than one where the
            layer is shared.
        spectrum (Spectrum, optional): Directions of its output.
        mean (Tensor, optional): Mean output without bias, ``(G, P / G)``.
        gradient (Tensor, optional): Second moment of the loss' gradient at
            its output, shape ``(G, P / G, P / G)``; ``(G, R, R)``, in
            coordinates of the spectrum's vectors, where that takes too much.
        sensitivity (Tensor, optional): Increase of the loss by dropping each
            direction of the spectrum, shape ``(R, )``.
    """
    name: str
    module: nn.Module
    kind: Optional[Type[BasisLayer]]
    reason: str = ''
    weight_positions: float = 0
    out_positions: float = 0
    calls: float = 0
    spectrum: Optional[Spectrum] = None
    mean: Optional[Tensor] = None
    gradient: Optional[Tensor] = None
    sensitivity: Optional[Tensor] = None

    @property
    def compressible(self) -> bool:
        return not self.reason

    @property
    def matrix_shape(self):
        """``(G, P / G, D)``."""
        return self.kind.matrix_shape(self.module)

    @property
    def full_rank(self) -> int:
        return min(self.matrix_shape[1:])

    def macs(self, rank: Optional[int] = None) -> float:
        """Multiply-accumulate operations for one image.

        Args:
            rank (int, optional): Basis filters per group; None for the dense
                layer. A bias costs nothing, as in MMEngine's analysis.
        """
        if rank is None:
            return self.module.weight.numel() * self.weight_positions
        groups, rows, in_size = self.matrix_shape
        return groups * rank * (
            in_size * self.weight_positions + rows * self.out_positions)

    def params(self,
               rank: Optional[int] = None,
               bias: bool = False,
               norm: bool = False) -> int:
        """Number of parameters; the arguments are those of the basis layer."""
        has_bias = self.module.bias is not None
        if rank is None:
            return self.module.weight.numel() + (
                self.module.bias.numel() if has_bias else 0)
        groups, rows, in_size = self.matrix_shape
        params = groups * rank * (in_size + rows)
        if bias or has_bias:
            params += groups * rows
        return params + (2 * groups * rank if norm else 0)

    def break_even(self, bias: bool = False, norm: bool = False) -> int:
        """The largest rank at which the layer costs less than it does dense,
        in MACs and in parameters; 0 where there is none.

        The arguments are those of the basis layer.
        """
        dense, one = self.macs(), self.macs(1)
        rank = self.full_rank
        if one > 0:
            rank = min(rank, int(-(-dense // one)) - 1)
        fixed = self.params(0, bias, norm)
        per_rank = self.params(1, bias, norm) - fixed
        return max(0, min(rank, (self.params() - fixed - 1) // per_rank))


def find_layers(model: nn.Module) -> List[LayerInfo]:
    """All convolution and linear layers of a model, in order of definition.

    A layer that several modules share is listed once, under its first name.
    Those that cannot be represented by a basis carry the reason. A layer
    inside another one, which computes the offsets of a deformable
    convolution, goes wherever that one goes and stays dense. Those of a
    moving average inside the model become what the averaged ones become.

    Args:
        model (nn.Module): Any model; modules that are already basis layers
            are not looked into.

    Returns:
        list[LayerInfo]: Without costs and spectra.
    """
    layers, owners = [], defaultdict(list)
    inside = branches = averages = ()
    saved = model.state_dict().keys()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BasisLayer):
            inside += (f'{name}.', )
            continue
        if isinstance(module, BaseAveragedModel):
            averages += (f'{name}.', )
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
        reason = why_not(module)
        if reason == '':
            continue
        if name.startswith(branches):
            reason = OFFSETS
        if name.startswith(averages):
            reason = AVERAGE
        if reason is None and f'{name}.weight'.lstrip('.') not in saved:
            reason = UNSAVED
        branches += (f'{name}.', )
        layers.append(
            LayerInfo(name, module, basis_layer_type(module), reason or ''))

    for layer in layers:
        for parameter in layer.module.parameters(recurse=False):
            others = [n for n in owners[id(parameter)] if n != layer.name]
            if others and layer.compressible:
                layer.reason = f'shares its parameters with {others[0]}'
    return layers


def _type_names(model: nn.Module, name: str) -> List[str]:
    """Class names of a module and of all modules that enclose it."""
    names, module = [type(model).__name__], model
    for part in name.split('.'):
        module = getattr(module, part)
        names.append(type(module).__name__)
    return names


class LayerMatcher:
    """Which of a model's layers patterns speak of.

    A pattern is a regular expression that must match the whole name of a
    layer, or the name of a class: that of the layer or of any module around
    it (``'Linear'``, ``'FPN'``).

    Args:
        model (nn.Module): The model.
        layers (Sequence[LayerInfo]): Its layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerInfo]) -> None:
        self.types = {
            layer.name: _type_names(model, layer.name)
            for layer in layers
        }

    def match(self, pattern: str, name: str) -> bool:
        """Whether a pattern speaks of the layer of that name."""
        return bool(re.fullmatch(pattern, name)) or pattern in self.types[name]

    def check(self, patterns: Sequence[str], key: str) -> None:
        """Require that each pattern matches some layer.

        Raises:
            ValueError: Naming the key, the pattern and what there is.
        """
        for pattern in patterns:
            try:
                if any(self.match(pattern, name) for name in self.types):
                    continue
            except re.error as error:
                raise ValueError(f'{key}: {pattern!r} is not a regular '
                                 f'expression: {error}') from None
            known = list(self.types)
            shown = ', '.join(known[:5] + ['…'] * (len(known) > 5))
            raise ValueError(
                f'{key}: the pattern {pattern!r} matches none of the '
                f'{len(known)} layers. A pattern must match a whole layer '
                f'name or be a class name. Layers: {shown}')


def check_finite(layers: Sequence[LayerInfo]) -> None:
    """Require finite weights.

    Raises:
        ValueError: Naming the layers that hold NaN or infinite weights.
    """
    broken = [
        layer.name for layer in layers if not is_lazy(layer.module.weight)
        and not torch.isfinite(layer.module.weight).all()
    ]
    if broken:
        raise ValueError('weights are NaN or infinite in '
                         f'{", ".join(broken[:5])} ({len(broken)} layers); '
                         'compress a checkpoint whose training converged')


def choose_layers(model: nn.Module,
                  layers: Sequence[LayerInfo],
                  include: Sequence[str] = (),
                  exclude: Sequence[str] = (),
                  prediction_layers: bool = False,
                  targets: Targets = NO_TARGETS) -> LayerMatcher:
    """Mark the layers that patterns leave out with the reason.

    Args:
        model (nn.Module): The model.
        layers (Sequence[LayerInfo]): Its layers; their ``reason`` is set.
        include (Sequence[str]): Patterns; where given, all else is left out.
        exclude (Sequence[str]): Patterns of layers to leave out.
        prediction_layers (bool): Whether to compress the layers that put out
            predictions or sampling offsets as well, which otherwise only
            ``include`` does. Defaults to False.
        targets (Targets): Which layers these are.

    Returns:
        LayerMatcher: For further patterns.

    Raises:
        ValueError: If a pattern matches no layer.
    """
    matcher = LayerMatcher(model, layers)
    matcher.check(include, 'include')
    matcher.check(exclude, 'exclude')
    for layer in layers:
        if not layer.compressible:
            continue
        hits: Dict[str, List[str]] = {
            key: [p for p in patterns if matcher.match(p, layer.name)]
            for key, patterns in (('include', include), ('exclude', exclude))
        }
        if include and not hits['include']:
            layer.reason = 'not included'
        elif hits['exclude']:
            layer.reason = f'excluded by {hits["exclude"][0]!r}'
        elif prediction_layers or include:
            continue
        elif layer.name in targets.predictions:
            layer.reason = PREDICTION
        elif layer.name in targets.offsets:
            layer.reason = OFFSETS
    return matcher
