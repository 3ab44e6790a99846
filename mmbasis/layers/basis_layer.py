# Copyright (c) mmbasis authors. All rights reserved.
import copy
from collections import defaultdict
from types import SimpleNamespace
from typing import Iterator, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from .. import factorization
from . import inheritance, lines
from .cloning import clone, liken, window_of
from .kinds import kind_of
from .ranks import check_ranks


class BasisLayer(nn.Module):
    """A dense layer as basis filters and pointwise layers around them.

    ``basis`` is the same kind of layer as the dense one. By the form of the
    layer there are, too:

    - *output*: ``coefficients``, which rebuild the output channels from
      ``rank`` basis filters per group: the weights ``H`` of
      :class:`DenseKind` are ``H ~ w F`` (Tayyab et al., ICIP 2021).
    - *input*: ``input_basis`` in front, of which the basis sees
      ``input_rank`` channels per group.
    - *both*: Tucker-2.
    - *spatial*: of a window of k x l, the basis is k x 1, with ``rank``
      filters per group, and the coefficients 1 x l (Jaderberg et al., BMVC
      2014).

    A new layer has the structure and the plain attributes of the dense one
    (``kernel_size``, …), but its basis is zero, and it has no hooks.

    Args:
        dense (nn.Module): The layer to represent. It is not changed.
        rank (int, optional): Basis filters per group, at most the output
            channels and the weights of each (*spatial*: l times the output
            channels); None for no coefficients.
        bias (bool): Give the layer a bias even where the dense one has none.
            Defaults to False.
        norm (bool): Put a batch normalization between basis and coefficients.
            Defaults to False.
        input_rank (int, optional): Input channels of the basis per group, in
            ``[1, C / G]``; None for no input basis.
        spatial (bool): Split the window. Defaults to False.

    TypeError if the layer is of no kind, ValueError for a rank out of range
    and for a form that the layer cannot have.
    """

    def __init__(self,
                 dense: nn.Module,
                 rank: Optional[int],
                 bias: bool = False,
                 norm: bool = False,
                 input_rank: Optional[int] = None,
                 spatial: bool = False) -> None:
        super().__init__()
        kind = kind_of(dense)
        if kind is None:
            raise TypeError(f'a {type(dense).__name__} cannot be represented '
                            'by a basis')
        in_size = check_ranks(dense, kind, rank, norm, input_rank, spatial)
        groups, out_per_group, _ = kind.matrix_shape(dense)
        self.kind = kind
        self.rank, self.input_rank, self.spatial = rank, input_rank, spatial
        self.groups = groups
        self.out_channels = groups * out_per_group
        for name, value in inheritance.own_attributes(dense).items():
            if not hasattr(type(self), name):
                vars(self).setdefault(name, value)
        self._build(dense, in_size, bias or dense.bias is not None, norm)

    def _build(self, dense: nn.Module, in_size: int, bias: bool,
               norm: bool) -> None:
        """The parts, like the dense layer in mode, device, type and in what is
        trained."""
        kind, weight, groups = self.kind, dense.weight, self.groups
        rows = self.rank or self.out_channels // groups
        self.input_basis = None if self.input_rank is None else (
            kind.build_input_basis(dense, groups * self.input_rank))
        self.basis = clone(
            dense, kind, weight.new_zeros((groups, rows, in_size)),
            lines.geometry(dense, 0) if self.spatial else None)
        self.norm = self.coefficients = None
        if self.rank is not None:
            if norm:
                self.norm = kind.build_norm(dense, groups * rows)
            self.coefficients = (
                lines.build_rows if self.spatial
                else kind.build_coefficients)(dense, groups * rows, bias)
        elif bias:
            self.basis.bias = nn.Parameter(
                weight.new_zeros(self.out_channels))
        self.train(dense.training)
        self.to(device=weight.device, dtype=weight.dtype)
        parts = self.input_basis, self.norm, self.coefficients
        for part in filter(None, parts):
            part.requires_grad_(weight.requires_grad)
            if part is not self.norm:
                liken(part.weight, weight)
        if dense.bias is not None:
            liken(self.last.bias, dense.bias)

    @property
    def last(self) -> nn.Module:
        """The part that returns the output, with the bias if there is one."""
        return self.basis if self.coefficients is None else self.coefficients

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
        if self.input_basis is None:
            x = self.basis(*args, **kwargs)
        else:
            x, args, kwargs = inheritance.first_argument(
                self.basis, args, kwargs)
            x = self.kind.run_behind(
                self.basis, x, self.input_basis(x), *args, **kwargs)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.coefficients is None else self.coefficients(x)

    @property
    def factors(self) -> Tuple[Tensor, ...]:
        """Input basis ``V`` of shape ``(G, R, C / G)``, if any, basis ``F``
        and coefficients ``w``, if any, as in
        :func:`mmbasis.factorization.merge`; gradients flow through all."""
        return self.matrices(self.weights)

    @property
    def parts(self) -> List[nn.Module]:
        """Input basis, basis and coefficients, as far as there are any."""
        parts = self.input_basis, self.basis, self.coefficients
        return [part for part in parts if part is not None]

    @property
    def weights(self) -> List[nn.Parameter]:
        """Of the :attr:`parts`."""
        return [part.weight for part in self.parts]

    def matrices(self, weights: Sequence[Tensor]) -> Tuple[Tensor, ...]:
        """What has the shapes of :attr:`weights`, as matrices."""
        return tuple(
            self.kind.to_matrix(SimpleNamespace(weight=x, groups=self.groups))
            if part is self.basis
            else x.flatten(1).unflatten(0, (self.groups, -1))
            for part, x in zip(self.parts, weights))

    @property
    def bases(self) -> Tuple[Tensor, ...]:
        """Those of the :attr:`factors` whose rows are to be orthonormal: all
        but the last."""
        return self.factors[:-1]

    @property
    def weight(self) -> Tensor:
        """The weights of the equivalent dense layer, in evaluation mode: some
        models read the weights of their layers."""
        factors = [x.to(self.basis.weight) for x in self._folded()[0]]
        return self.kind.from_matrix(
            factorization.merge(*factors),
            window_of(self) if self.spatial else self.basis)

    @property
    def bias(self) -> Optional[Tensor]:
        """The bias of the equivalent dense layer, shape ``(P, )``."""
        bias = self._folded()[1]
        return bias if bias is None else bias.to(self.basis.weight.dtype)

    def _folded(self) -> Tuple[Tuple[Tensor, ...], Optional[Tensor]]:
        """The factors, and the bias ``(P, )``, that make up for the
        normalization in evaluation mode."""
        factors, bias = self.factors, self.last.bias
        if self.norm is None:
            return factors, bias
        norm, weight = self.norm, factors[-1].double()
        scale = norm.weight.double() / (norm.running_var.double() +
                                        norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        extra = (weight @ shift.view(self.groups, self.rank, 1)).flatten()
        weight = weight * scale.view(self.groups, 1, self.rank)
        return ((*factors[:-1], weight),
                extra if bias is None else bias.double() + extra)

    @torch.no_grad()
    def set_factors(self, *factors: Tensor,
                    bias: Optional[Tensor] = None) -> None:
        """Overwrite the :attr:`factors` and, if given, the bias of shape
        ``(P, )`` in place; ValueError if the layer has no bias."""
        for part, matrix in zip(self.parts, factors):
            if part is self.basis:
                matrix = self.kind.from_matrix(matrix, part)
            part.weight.copy_(matrix.reshape(part.weight.shape))
        if bias is not None:
            if self.last.bias is None:
                raise ValueError('this basis layer has no bias: build it with '
                                 'bias=True')
            self.last.bias.copy_(bias)

    def project(self,
                dense: nn.Module,
                vectors: Optional[Tensor] = None,
                mean: Optional[Tensor] = None,
                inputs: Optional[factorization.InputSpectrum] = None,
                columns: Optional[factorization.InputSpectrum] = None) -> None:
        """Project the dense layer on subspaces of its inputs and outputs.

        Args:
            dense (nn.Module): The layer to represent.
            vectors (Tensor, optional): Orthonormal columns ``U`` of shape
                ``(G, P / G, R)`` with ``R >= rank``, the most important
                first. Defaults to the left singular vectors of the weights.
            mean (Tensor, optional): Mean output before the bias, shape
                ``(G, P / G)``. What the subspace loses of it goes into the
                bias, if the layer has one. Defaults to zero.
            inputs (InputSpectrum, optional): Directions of the input, the
                most important first. Defaults to those of the weights.
            columns (InputSpectrum, optional): The same of the columns of its
                windows, for the spatial form.
        """
        if self.spatial:
            inputs = columns
        factors, matrix = self._narrow(dense, inputs)
        bias = self.last.bias
        if bias is not None:
            bias = torch.zeros_like(bias) if dense.bias is None else dense.bias
        if self.output_rank is None:
            factors = (*factors, matrix)
        else:
            if vectors is None:
                vectors = factorization.spectrum_of_factor(matrix).vectors
            vectors = vectors[..., :self.output_rank]
            if bias is not None and mean is not None:
                mean = mean.unsqueeze(-1).to(vectors)
                lost = mean - vectors @ (vectors.mT @ mean)
                bias = bias + lost.flatten().to(bias)
            factors = (*factors, *factorization.factorize(matrix, vectors))
        self.set_factors(*factors, bias=bias)

    @property
    def output_rank(self) -> Optional[int]:
        """Directions of the output per group, if that is what ``rank`` is."""
        return None if self.spatial else self.rank

    @property
    def front(self) -> Optional[nn.Module]:
        """The part that chooses what the layer sees of its input, if any."""
        return self.basis if self.spatial else self.input_basis

    def behind_front(
            self, dense: nn.Module,
            inputs: Optional[factorization.InputSpectrum]) -> nn.Module:
        """The dense layer as it sees what :meth:`project` gives it of the
        input, given its directions: a layer behind the :attr:`front`."""
        _, matrix = self._narrow(dense, inputs)
        core = clone(dense, self.kind, matrix,
                     lines.geometry(dense, 1) if self.spatial else None)
        core.bias = dense.bias
        return core

    def _narrow(self, dense: nn.Module,
                inputs: Optional[factorization.InputSpectrum]
                ) -> Tuple[Tuple[Tensor, ...], Tensor]:
        """The :attr:`front`, if any, and the weights of the layer behind."""
        matrix = self.kind.to_matrix(dense).detach().double()
        channels, rank = self.kind.in_channels(dense), self.input_rank
        if self.spatial:
            channels, rank = channels * dense.weight.shape[2], self.rank
        if rank is None:
            return (), matrix
        inputs = inputs or factorization.spectrum_of_input(matrix, channels)
        basis, matrix = factorization.narrow(matrix, inputs, rank)
        return (basis, ), matrix

    @property
    def orthogonality_error(self) -> float:
        """Largest entry of ``|F F^T - I|``, over all bases."""
        return max(
            float(factorization.orthogonality_error(x.detach().float()))
            for x in self.bases)

    def retract(self) -> None:
        """Make the bases orthonormal, see :func:`retract`."""
        retract([self])

    @torch.no_grad()
    def fold_norm(self) -> 'BasisLayer':
        """Fold the middle batch normalization, if any, into the coefficients;
        returns the layer, which is the same function in evaluation mode."""
        if self.norm is None:
            return self
        factors, bias = self._folded()
        if self.last.bias is None:
            weight = self.last.weight
            self.last.bias = nn.Parameter(
                weight.new_zeros(self.out_channels),
                requires_grad=weight.requires_grad)
        self.set_factors(*factors, bias=bias)
        self.norm = None
        return self

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The equivalent dense layer in evaluation mode, of the class that was
        represented, with the hooks and the own ``forward`` of this one;
        ValueError if this layer has a bias, and the dense one cannot."""
        factors, bias = self._folded()
        if bias is not None and not self.kind.can_have_bias(self.basis):
            raise ValueError(
                f'a {type(self.basis).__name__} has no bias, so this basis '
                'layer, which has one, cannot be merged: keep it as it is, '
                'or compress with data_aware=False')
        matrix = factorization.merge(*(x.double() for x in factors))
        dense = clone(
            self.basis, self.kind, matrix,
            lines.geometry(self, 0, 1) if self.spatial else None)
        dense.weight.requires_grad |= self.last.weight.requires_grad
        if bias is not None:
            dense.bias = nn.Parameter(
                bias.to(dense.weight).clone(), dense.weight.requires_grad)
            if self.last.bias is not None:
                liken(dense.bias, self.last.bias)
        for layer, other in self._counterparts(dense):
            inheritance.share_hooks(layer, other)
        vars(dense).update(inheritance.rebound_attributes(self, dense))
        return dense

    def extra_repr(self) -> str:
        ranks = dict(rank=self.rank, input_rank=self.input_rank)
        given = [f'{k}={v}' for k, v in ranks.items() if v is not None]
        given += ['spatial'] * self.spatial
        return ', '.join([*given, f'groups={self.groups}'])


@torch.no_grad()
def retract(layers: Sequence[BasisLayer]) -> None:
    """Make the bases of layers orthonormal; their functions stay. Layers of
    one shape are decomposed together.

    RuntimeError, and nothing is changed, if a normalization stands between
    the factors of a layer.
    """
    groups = defaultdict(list)
    for layer in layers:
        if layer.norm is not None:
            raise RuntimeError('a layer with a normalization between basis '
                               'and coefficients cannot be retracted; call '
                               'fold_norm() first')
        shapes = tuple(factor.shape[1:] for factor in layer.factors)
        groups[shapes, layer.basis.weight.device].append(layer)
    for same in groups.values():
        stacks = map(torch.cat, zip(*(layer.factors for layer in same)))
        sizes = [layer.groups for layer in same]
        found = [x.split(sizes) for x in factorization.orthonormalize(*stacks)]
        for layer, *factors in zip(same, *found):
            layer.set_factors(*factors)
