# Copyright (c) mmbasis authors. All rights reserved.
import copy
from abc import ABCMeta, abstractmethod
from typing import Iterator, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from torch import Tensor

from ..factorization import (factorize, merge, orthogonality_error,
                             orthonormalize, spectrum_of_factor)

#: what models ask their layers for
_GEOMETRY = ('in_channels', 'kernel_size', 'stride', 'padding', 'dilation',
             'in_features', 'out_features')


class BasisLayer(nn.Module, metaclass=ABCMeta):
    """A dense layer as basis filters and 1x1 coefficients.

    ``basis`` is the same kind of layer as the dense one, with ``rank`` output
    channels per group and no bias; ``coefficients`` is a pointwise layer that
    rebuilds the output channels. With ``H`` the dense weights as a matrix of
    shape ``(G, P / G, D)`` (``G`` groups, ``P`` output channels, ``D``
    weights per output channel), ``H ~ w F`` (Tayyab et al., ICIP 2021).

    Both are ordinary modules, so that hooks, counters, quantisers and
    exporters know them. A new layer has the structure only, its basis is
    zero: :meth:`project` or :meth:`set_factors` fills it, or a checkpoint.

    Args:
        dense (nn.Module): The layer to represent. It is not changed.
        rank (int): Basis filters per group, in ``[1, min(P / G, D)]``.
        bias (bool): Give the coefficients a bias even where the dense layer
            has none. Defaults to False.
        norm (bool): Put a batch normalisation between basis and coefficients.
            Defaults to False.

    Raises:
        ValueError: If the rank is out of range.
    """

    #: the dense layers that this class represents, by their own ``forward``
    dense_types: Tuple[type, ...] = ()

    def __init__(self,
                 dense: nn.Module,
                 rank: int,
                 bias: bool = False,
                 norm: bool = False) -> None:
        super().__init__()
        groups, out_per_group, in_size = self.matrix_shape(dense)
        full_rank = min(out_per_group, in_size)
        if not 1 <= rank <= full_rank:
            raise ValueError(
                f'the rank of a {type(dense).__name__} of matrix shape '
                f'{(groups, out_per_group, in_size)} must be in '
                f'[1, {full_rank}], but got {rank}')
        self.rank = rank
        self.groups = groups
        self.out_channels = groups * out_per_group
        self.dense_type = type(dense)
        for name in _GEOMETRY:
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))
        weight = dense.weight
        zeros = weight.new_zeros((groups, rank, in_size))
        self.basis = _clone(dense, self.from_matrix(zeros, dense),
                            **self._narrowed(dense, groups * rank))
        self.norm = self._build_norm(groups * rank) if norm else None
        self.coefficients = self._build_coefficients(
            dense, groups * rank, bias or dense.bias is not None)
        self.train(dense.training)
        self.to(device=weight.device, dtype=weight.dtype)
        for parameter in self._own_parameters():
            parameter.requires_grad = weight.requires_grad

    # ------------------------------------------------- one kind of layer
    @staticmethod
    @abstractmethod
    def matrix_shape(dense: nn.Module) -> Tuple[int, int, int]:
        """``(G, P / G, D)`` of a dense layer."""

    @staticmethod
    @abstractmethod
    def to_matrix(dense: nn.Module) -> Tensor:
        """The weights ``H`` of a dense (or basis) layer, ``(G, P / G, D)``."""

    @staticmethod
    @abstractmethod
    def from_matrix(matrix: Tensor, like: nn.Module) -> Tensor:
        """The inverse of :meth:`to_matrix`, for any number of rows."""

    @staticmethod
    @abstractmethod
    def _narrowed(dense: nn.Module, channels: int) -> dict:
        """Attributes of ``dense`` that say how many channels it puts out."""

    @staticmethod
    @abstractmethod
    def _build_norm(channels: int) -> nn.Module:
        """The batch normalisation that fits behind the basis."""

    @staticmethod
    @abstractmethod
    def _build_coefficients(dense: nn.Module, channels: int,
                            bias: bool) -> nn.Module:
        """The pointwise layer from ``channels`` to the output channels."""

    @staticmethod
    @abstractmethod
    def channel_axis(dense: nn.Module) -> int:
        """The axis of inputs and outputs, from the end, that holds the
        channels."""

    @staticmethod
    def weight_positions(dense: nn.Module, x: Tensor, y: Tensor) -> int:
        """How often the weights are applied to turn input ``x`` into output
        ``y``: the MACs of the layer over the number of its weights."""
        return y.numel() // dense.out_channels

    @staticmethod
    def sees_patches(dense: nn.Module) -> bool:
        """Whether :meth:`patches` can tell what the layer's weights are
        multiplied with."""
        return False

    @staticmethod
    def patches(dense: nn.Module, x: Tensor, out_shape: Sequence[int],
                positions: Tensor) -> Tensor:
        """What the weights are multiplied with at some output positions.

        Args:
            dense (nn.Module): A layer for which :meth:`sees_patches` holds.
            x (Tensor): Its input.
            out_shape (Sequence[int]): Spatial shape of its output.
            positions (Tensor): Indices of positions of the flattened output,
                shape ``(positions, )``.

        Returns:
            Tensor: Shape ``(N, G * D, positions)``: ``H`` times its blocks of
            ``D`` rows is the output at these positions, without bias.
        """
        raise TypeError(f'the patches of a {type(dense).__name__} are unknown')

    def _own_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters but those of a branch inside the dense layer."""
        yield self.basis.weight
        for module in (self.norm, self.coefficients):
            if module is not None:
                yield from module.parameters()

    # --------------------------------------------------------- factors
    def forward(self, *args, **kwargs) -> Tensor:
        """Basis filters, the optional normalisation, then coefficients.

        The arguments are those of the dense layer.
        """
        x = self.basis(*args, **kwargs)
        if self.norm is not None:
            x = self.norm(x)
        return self.coefficients(x)

    @property
    def factors(self) -> Tuple[Tensor, Tensor]:
        """Basis ``F`` of shape ``(G, Q, D)`` and coefficients ``w`` of shape
        ``(G, P / G, Q)``; gradients flow through both."""
        weight = self.coefficients.weight
        return self.to_matrix(self.basis), weight.reshape(
            self.groups, -1, self.rank)

    @property
    def weight(self) -> Tensor:
        """The weights of the dense layer that this one stands for, computed:
        some models ask a layer for the type or device of its weights.

        Raises:
            AttributeError: If a normalisation stands between the factors.
        """
        if self.norm is not None:
            raise AttributeError('a layer with a normalisation between basis '
                                 'and coefficients has no weight')
        return self.from_matrix(merge(*self.factors), self.basis)

    @torch.no_grad()
    def set_factors(self,
                    basis: Tensor,
                    coefficients: Tensor,
                    bias: Optional[Tensor] = None) -> None:
        """Overwrite the factors in place.

        Args:
            basis (Tensor): Shape ``(G, Q, D)``.
            coefficients (Tensor): Shape ``(G, P / G, Q)``.
            bias (Tensor, optional): Shape ``(P, )``. By default the bias
                stays as it is.

        Raises:
            ValueError: If a bias is given to a layer without one.
        """
        self.basis.weight.copy_(self.from_matrix(basis, self.basis))
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
                first. Defaults to the left singular vectors of the weights,
                which makes this the truncated SVD.
            mean (Tensor, optional): Mean output before the bias, shape
                ``(G, P / G)``. What the subspace loses of it goes into the
                bias, if the layer has one. Defaults to zero.
        """
        matrix = self.to_matrix(dense).detach().double()
        if vectors is None:
            vectors = spectrum_of_factor(matrix).vectors
        vectors = vectors[..., :self.rank]
        bias = self.coefficients.bias
        if bias is not None:
            bias = torch.zeros_like(bias) if dense.bias is None else dense.bias
            if mean is not None:
                mean = mean.unsqueeze(-1).to(vectors)
                lost = mean - vectors @ (vectors.mT @ mean)
                bias = bias + lost.flatten().to(bias)
        self.set_factors(*factorize(matrix, vectors), bias)

    @property
    def orthogonality_error(self) -> float:
        """Largest entry of ``|F F^T - I|``."""
        return float(orthogonality_error(self.factors[0].detach().float()))

    @torch.no_grad()
    def retract(self) -> None:
        """Make the basis orthonormal; the function of the layer stays.

        Raises:
            RuntimeError: If a normalisation stands between the factors: it
                acts on single basis filters, which would be mixed.
        """
        if self.norm is not None:
            raise RuntimeError('a layer with a normalisation between basis '
                               'and coefficients cannot be retracted; call '
                               'fold_norm() first')
        self.set_factors(*orthonormalize(*self.factors))

    # ------------------------------------------------------ deployment
    @torch.no_grad()
    def fold_norm(self) -> 'BasisLayer':
        """Fold the middle batch normalisation into the coefficients.

        Returns:
            BasisLayer: Self, changed in place; in evaluation mode it is the
            same function as before.
        """
        if self.norm is None:
            return self
        norm, coefficients = self.norm, self.coefficients
        scale = norm.weight.double() / (norm.running_var.double() +
                                        norm.eps).sqrt()
        shift = norm.bias.double() - norm.running_mean.double() * scale
        weight = self.factors[1].double()
        extra = weight @ shift.view(self.groups, self.rank, 1)
        bias = extra.flatten()
        if coefficients.bias is None:
            coefficients.bias = nn.Parameter(
                torch.zeros_like(bias, dtype=coefficients.weight.dtype),
                requires_grad=coefficients.weight.requires_grad)
        weight = weight * scale.view(self.groups, 1, self.rank)
        coefficients.weight.copy_(weight.reshape(coefficients.weight.shape))
        coefficients.bias.add_(bias)
        self.norm = None
        return self

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """The equivalent dense layer, of the class that was represented.

        The middle normalisation, if any, is folded in the copy; this layer is
        not changed.
        """
        folded = self
        if self.norm is not None:
            folded = copy.deepcopy(self).fold_norm()
        matrix = merge(*(factor.double() for factor in folded.factors))
        bias = folded.coefficients.bias
        weight = self.from_matrix(matrix, self.basis).to(self.basis.weight)
        dense = _clone(folded.basis, weight,
                       **self._narrowed(folded.basis, self.out_channels))
        if bias is not None:
            dense.bias = copy.deepcopy(bias)
        for parameter in dense.parameters(recurse=False):
            parameter.requires_grad = self.basis.weight.requires_grad
        return dense

    def extra_repr(self) -> str:
        return f'rank={self.rank}, groups={self.groups}'


def _clone(module: nn.Module, weight: Tensor, **attributes) -> nn.Module:
    """Copy a layer with other weights, no bias and no hooks.

    Copying keeps whatever the class adds to the plain layer (adaptive padding,
    an offset branch, …) without a word about it here. Its attributes are
    shared: some models hang all that they remember on each of their layers
    (DDQ).
    """
    own = vars(nn.Module())
    memo = {id(x): x for name, x in vars(module).items() if name not in own}
    memo[id(module.weight)] = nn.Parameter(weight)
    if module.bias is not None:
        memo[id(module.bias)] = None
    clone = copy.deepcopy(module, memo)
    for name, value in vars(clone).items():
        if name.endswith('_hooks'):
            value.clear()
    for name, value in attributes.items():
        setattr(clone, name, value)
    return clone
