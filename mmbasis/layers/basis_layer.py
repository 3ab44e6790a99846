# Copyright (c) mmbasis authors. All rights reserved.
import copy
from typing import Iterator, Optional, Tuple, Type

import torch
import torch.nn as nn
from torch import Tensor

from .. import factorization
from . import inheritance
from .kinds import DenseKind, kind_of


class BasisLayer(nn.Module):
    """A dense layer as basis filters and 1x1 coefficients.

    ``basis`` is the same kind of layer as the dense one, with ``rank`` output
    channels per group and no bias; ``coefficients`` is a pointwise layer that
    rebuilds the output channels: the weights ``H`` of :class:`DenseKind` are
    ``H ~ w F`` (Tayyab et al., ICIP 2021).

    A new layer has the structure and the plain attributes of the dense one
    (``kernel_size``, …), but its basis is zero, and it has no hooks.

    Args:
        dense (nn.Module): The layer to represent. It is not changed.
        rank (int): Basis filters per group, in ``[1, min(P / G, D)]``.
        bias (bool): Give the coefficients a bias even where the dense layer
            has none. Defaults to False.
        norm (bool): Put a batch normalization between basis and coefficients.
            Defaults to False.

    TypeError if the layer is of no kind, ValueError for a rank out of range.
    """

    def __init__(self,
                 dense: nn.Module,
                 rank: int,
                 bias: bool = False,
                 norm: bool = False) -> None:
        super().__init__()
        kind = kind_of(dense)
        if kind is None:
            raise TypeError(f'a {type(dense).__name__} cannot be represented '
                            'by a basis')
        groups, out_per_group, in_size = kind.matrix_shape(dense)
        full_rank = min(out_per_group, in_size)
        if not 1 <= rank <= full_rank:
            raise ValueError(
                f'the rank of a {type(dense).__name__} of matrix shape '
                f'{(groups, out_per_group, in_size)} must be in '
                f'[1, {full_rank}], but got {rank}')
        self.kind = kind
        self.rank = rank
        self.groups = groups
        self.out_channels = groups * out_per_group
        for name, value in inheritance.own_attributes(dense).items():
            if not hasattr(type(self), name):
                vars(self).setdefault(name, value)
        weight = dense.weight
        self.basis = _clone(dense, kind,
                            weight.new_zeros((groups, rank, in_size)))
        self.norm = kind.build_norm(dense, groups * rank) if norm else None
        self.coefficients = kind.build_coefficients(
            dense, groups * rank, bias or dense.bias is not None)
        self.train(dense.training)
        self.to(device=weight.device, dtype=weight.dtype)
        for part in filter(None, (self.norm, self.coefficients)):
            part.requires_grad_(weight.requires_grad)
        _liken(self.coefficients.weight, weight)
        if dense.bias is not None:
            _liken(self.coefficients.bias, dense.bias)

    def take_over(self, dense: nn.Module) -> None:
        """Take the hooks and the own ``forward``, if any, of the dense layer
        that this one was built from; CannotRebind if ``forward`` needs it."""
        rebound = inheritance.rebound_attributes(dense, self)
        for own, other in self._counterparts(dense):
            vars(other).update(inheritance.share_hooks(other, own))
        vars(self).update(rebound)

    def hand_back(self, dense: nn.Module) -> None:
        """Give the hooks to the dense layer that replaces this one."""
        for own, other in self._counterparts(dense):
            vars(own).update(inheritance.share_hooks(own, other))

    def _counterparts(self, dense: nn.Module) -> Iterator:
        """This layer and those inside, each with that of the dense one."""
        return zip([self, *list(self.basis.modules())[1:]], dense.modules())

    def __deepcopy__(self, memo: dict) -> 'BasisLayer':
        clone = memo[id(self)] = copy.copy(self)
        vars(clone).update(copy.deepcopy(vars(self), memo))
        vars(clone).update(inheritance.rebound_attributes(self, clone))
        return clone

    def forward(self, *args, **kwargs) -> Tensor:
        """Compute the output from the arguments of the dense layer."""
        x = self.basis(*args, **kwargs)
        if self.norm is not None:
            x = self.norm(x)
        return self.coefficients(x)

    @property
    def factors(self) -> Tuple[Tensor, Tensor]:
        """Basis ``F`` of shape ``(G, Q, D)`` and coefficients ``w`` of shape
        ``(G, P / G, Q)``; gradients flow through both."""
        weight = self.coefficients.weight
        return self.kind.to_matrix(self.basis), weight.reshape(
            self.groups, -1, self.rank)

    @property
    def weight(self) -> Tensor:
        """The weights of the equivalent dense layer, in evaluation mode: some
        models read the weights of their layers."""
        coefficients = self._folded()[0].to(self.basis.weight)
        matrix = factorization.merge(self.factors[0], coefficients)
        return self.kind.from_matrix(matrix, self.basis)

    @property
    def bias(self) -> Optional[Tensor]:
        """The bias of the equivalent dense layer, shape ``(P, )``."""
        bias = self._folded()[1]
        return bias if bias is None else bias.to(self.basis.weight.dtype)

    def _folded(self) -> Tuple[Tensor, Optional[Tensor]]:
        """Coefficients ``(G, P / G, Q)`` and bias ``(P, )`` that make up for
        the normalization in evaluation mode."""
        weight, bias = self.factors[1], self.coefficients.bias
        if self.norm is None:
            return weight, bias
        norm, weight = self.norm, weight.double()
        scale = norm.weight.double() / (norm.running_var.double() +
                                        norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        extra = (weight @ shift.view(self.groups, self.rank, 1)).flatten()
        return (weight * scale.view(self.groups, 1, self.rank),
                extra if bias is None else bias.double() + extra)

    @torch.no_grad()
    def set_factors(self,
                    basis: Tensor,
                    coefficients: Tensor,
                    bias: Optional[Tensor] = None) -> None:
        """Overwrite the :attr:`factors` and, if given, the bias of shape
        ``(P, )`` in place; ValueError if the layer has no bias."""
        self.basis.weight.copy_(self.kind.from_matrix(basis, self.basis))
        self.coefficients.weight.copy_(
            coefficients.reshape(self.coefficients.weight.shape))
        if bias is not None:
            if self.coefficients.bias is None:
                raise ValueError('this basis layer has no bias: build it with '
                                 'bias=True')
            self.coefficients.bias.copy_(bias)

    def project(self,
                dense: nn.Module,
                vectors: Optional[Tensor] = None,
                mean: Optional[Tensor] = None) -> None:
        """Project the dense layer on a subspace of its outputs.

        Args:
            dense (nn.Module): The layer to represent.
            vectors (Tensor, optional): Orthonormal columns ``U`` of shape
                ``(G, P / G, R)`` with ``R >= rank``, the most important
                first. Defaults to the left singular vectors of the weights.
            mean (Tensor, optional): Mean output before the bias, shape
                ``(G, P / G)``. What the subspace loses of it goes into the
                bias, if the layer has one. Defaults to zero.
        """
        matrix = self.kind.to_matrix(dense).detach().double()
        if vectors is None:
            vectors = factorization.spectrum_of_factor(matrix).vectors
        vectors = vectors[..., :self.rank]
        bias = self.coefficients.bias
        if bias is not None:
            bias = torch.zeros_like(bias) if dense.bias is None else dense.bias
            if mean is not None:
                mean = mean.unsqueeze(-1).to(vectors)
                lost = mean - vectors @ (vectors.mT @ mean)
                bias = bias + lost.flatten().to(bias)
        self.set_factors(*factorization.factorize(matrix, vectors), bias)

    @property
    def orthogonality_error(self) -> float:
        """Largest entry of ``|F F^T - I|``."""
        return float(
            factorization.orthogonality_error(self.factors[0].detach().float()))

    @torch.no_grad()
    def retract(self) -> None:
        """Make the basis orthonormal; the function of the layer stays.
        RuntimeError if a normalization stands between the factors."""
        if self.norm is not None:
            raise RuntimeError('a layer with a normalization between basis '
                               'and coefficients cannot be retracted; call '
                               'fold_norm() first')
        self.set_factors(*factorization.orthonormalize(*self.factors))

    @torch.no_grad()
    def fold_norm(self) -> 'BasisLayer':
        """Fold the middle batch normalization, if any, into the coefficients;
        returns the layer, which is the same function in evaluation mode."""
        if self.norm is None:
            return self
        coefficients, (weight, bias) = self.coefficients, self._folded()
        if coefficients.bias is None:
            coefficients.bias = nn.Parameter(
                coefficients.weight.new_zeros(self.out_channels),
                requires_grad=coefficients.weight.requires_grad)
        self.set_factors(self.factors[0], weight, bias)
        self.norm = None
        return self

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The equivalent dense layer in evaluation mode, of the class that was
        represented, with the hooks and the own ``forward`` of this one;
        ValueError if this layer has a bias, and the dense one cannot."""
        coefficients, bias = self._folded()
        if bias is not None and 'bias' not in self.basis._parameters:
            raise ValueError(
                f'a {type(self.basis).__name__} has no bias, so this basis '
                'layer, which has one, cannot be merged: keep it as it is, '
                'or compress with data_aware=False')
        matrix = factorization.merge(self.factors[0].double(),
                                     coefficients.double())
        dense = _clone(self.basis, self.kind, matrix)
        dense.weight.requires_grad |= self.coefficients.weight.requires_grad
        if bias is not None:
            dense.bias = nn.Parameter(
                bias.to(dense.weight).clone(), dense.weight.requires_grad)
            if self.coefficients.bias is not None:
                _liken(dense.bias, self.coefficients.bias)
        for layer, other in self._counterparts(dense):
            inheritance.share_hooks(layer, other)
        vars(dense).update(inheritance.rebound_attributes(self, dense))
        return dense

    def extra_repr(self) -> str:
        return f'rank={self.rank}, groups={self.groups}'


def _liken(parameter: nn.Parameter, model: nn.Parameter) -> None:
    """Whether it is trained, and what models note on it (as: no decay)."""
    parameter.requires_grad = model.requires_grad
    vars(parameter).update(vars(model))


def _clone(module: nn.Module, kind: Type[DenseKind],
           matrix: Tensor) -> nn.Module:
    """Copy a layer with other weights, no bias, no hooks and no methods of the
    instance's own. Plain attributes are shared: a model may hang all that it
    remembers on each of its layers."""
    clone = type(module).__new__(type(module))
    nn.Module.__init__(clone)
    for name, value in inheritance.own_attributes(module).items():
        if name != 'forward' and getattr(value, '__self__', 0) is not module:
            vars(clone)[name] = value
    weight = nn.Parameter(kind.from_matrix(matrix, module).to(module.weight))
    _liken(weight, module.weight)
    memo = {id(module): clone, id(module.weight): weight}
    for name in ('_parameters', '_buffers', '_modules', 'training'):
        vars(clone)[name] = copy.deepcopy(vars(module)[name], memo)
    if module.bias is not None:
        clone.register_parameter('bias', None)
    linear = hasattr(module, 'out_features')
    setattr(clone, 'out_features' if linear else 'out_channels',
            matrix.shape[:2].numel())
    return clone
