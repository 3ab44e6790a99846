# Copyright (c) mmbasis authors. All rights reserved.
"""One layer fitted to the outputs of the dense network."""
from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Sequence

import torch
import torch.nn as nn
from torch import Tensor

from ..factorization import (
    merge,
    reduced_rank_regression,
    two_sided_regression,
)
from ..layers import BasisLayer
from ..planning import Layer, LayerStatistics
from ..planning import samples as sampling
from ..planning.statistics import weight_matrix
from ..utils.collectives import sum_over_processes

#: Where less than this share of the dense network's output can be had from the
#: compressed network's, the layer is not fitted: the two passes see different
#: things there, other proposals for example.
MIN_EXPLAINED = 0.5
#: Weights are fitted freely where there are so many samples for each weight
#: of an output channel; otherwise only combinations of the dense layer's
#: outputs are.
SAMPLES_PER_WEIGHT = 4
#: What samples count that the loss does not feel, where 1 is the mean.
MIN_IMPORTANCE = 0.1
#: Scales below this fraction of the largest count as it.
MIN_SCALE = 1e-3


class LayerRegression:
    """Moments of a layer's target and regressors over all batches: patches of
    its input in the compressed network or, where samples are few, what the
    dense layer makes of them.

    Args:
        layer (Layer): The dense layer.
        statistics (LayerStatistics): What was measured of it.
        targets (Sequence[Tensor]): Samples that will be added.
        scale (Tensor, optional): Factor of the output, ``(P, )``, before it is
            added to something; errors are those of the product.
        target (nn.Module, optional): The layer of the compressed model.
    """

    def __init__(self, layer: Layer, statistics: LayerStatistics,
                 targets: Sequence[Tensor], scale: Tensor | None = None,
                 target: nn.Module | None = None) -> None:
        self.statistics = statistics
        #: what is in front of the layer: an input basis or, of a spatial
        #: form, k x 1; and its weights if they are fitted, too
        self.front: nn.Module | None = None
        self.input_basis: Tensor | None = None
        if isinstance(target, BasisLayer) and target.front is not None:
            if self._sees_all(layer, targets):
                self.input_basis = target.factors[0].double()
            else:
                self.front = target.front
                layer = replace(layer, module=target.behind_front(
                    layer.module, statistics.columns if target.spatial
                    else statistics.inputs))
        self.layer = layer
        groups, self.rows, in_size = layer.matrix_shape
        weight = layer.module.weight
        #: whether it corrects errors of something else, too
        self.in_sum = scale is not None
        self.of_input = self._sees_all(layer, targets)
        if scale is None:
            scale = weight.new_ones(groups * self.rows)
        least = (MIN_SCALE * scale.abs().max()).clamp_min(1e-12)
        scale = torch.where(scale.abs() < least, least, scale)
        self.scale = scale.reshape(groups, self.rows, 1)
        size = in_size if self.of_input else self.rows
        zeros = partial(weight.new_zeros, dtype=torch.float64)
        # products of (change, regressors, 1) with (regressors, 1), where the
        # change is that of the target against the layer as it was
        self.joint = zeros((groups, self.rows + size + 1, size + 1))
        # of the change and of wanted outputs, sums and sums of squares
        self.sums = zeros((2, 2, groups, self.rows))

    @staticmethod
    def _sees_all(layer: Layer, targets: Sequence[Tensor]) -> bool:
        """Whether all weights of a layer are fitted."""
        total = torch.tensor(float(sum(y.shape[-1] for y in targets)))
        sum_over_processes(f'reconstruction of {layer.name}', total)
        return sampling.is_expansion(layer) or (
            layer.known_kind.sees_patches(layer.module)
            and bool(total >= SAMPLES_PER_WEIGHT * layer.matrix_shape[2]))

    def add(self, importance: Tensor | None, x: Tensor, target: Tensor,
            error: Tensor | None = None,
            wanted: Tensor | None = None) -> None:
        """Add a batch. One whose samples do not pair with those of the dense
        network is left out.

        Args:
            importance (Tensor, optional): What an error of each sample counts;
                1 if it is None.
            x (Tensor): The layer's input in the compressed network.
            target (Tensor): Samples of what it should return.
            error (Tensor, optional): Samples of what its scaled output should
                add to that.
            wanted (Tensor, optional): Samples of the sum in the dense
                network. Without a sum it is the target.
        """
        regressors, unchanged = self._see(x)
        if target.shape != unchanged.shape:
            return
        change = (target - unchanged) * self.scale
        if error is not None:
            change += error
        one = torch.ones_like(change[:, :1])
        wanted = target if wanted is None else wanted
        # the product of two samples counts their importance
        root = one if importance is None else (
            importance + MIN_IMPORTANCE).sqrt().to(one)
        one, change, regressors, wanted = (
            value * root for value in (one, change, regressors, wanted))
        right = torch.cat([regressors, one], 1)
        sampling.add_products(self.joint[:, :self.rows], change, right)
        sampling.add_products(self.joint[:, self.rows:], right, right)
        for sums, samples in zip(self.sums, (change, wanted)):
            samples = samples.double()
            sums += torch.stack([(samples * root).sum(-1),
                                 samples.square().sum(-1)])

    def _see(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Samples of the regressors, and of the output as the layer was."""
        layer = self.layer
        seen = x if self.front is None else self.front(x)
        bias = layer.module.bias.view_as(self.scale) if layer.has_bias else 0
        if self.of_input:
            regressors = sampling.input_samples(layer, seen)
            return regressors, weight_matrix(
                layer).float() @ regressors + bias
        if self.front is None:
            y = type(layer.module).forward(layer.module, x)  # no hooks
        else:
            y = layer.known_kind.run_behind(layer.module, x, seen)
        unchanged = sampling.output_samples(layer, y)
        return unchanged - bias, unchanged

    def solve(self, rank: int | None,
              centred: bool) -> tuple[list[Tensor], Tensor] | None:
        """The best layer of a rank (None: of full rank), with a bias to give
        if it is centred: the input basis, if it was fitted, basis and
        coefficients as in :func:`mmbasis.factorization.merge`, and the bias
        ``(P, )``; None where the regressors do not vary, or say too little of
        the target."""
        sum_over_processes(f'reconstruction of {self.layer.name}', self.joint,
                           self.sums)
        moments = self._moments(centred)
        if moments is None:
            return None
        mean_change, mean_r, cross, second = moments
        matrix, scale = weight_matrix(self.layer), self.scale.double()
        prior = scale * (
            matrix if self.of_input else matrix.new_ones(self.rows).diag())
        factors, explained = self._regress(cross, second, prior, rank)
        means, squares = (self.sums / self.joint[0, -1, -1]).unbind(1)
        change, wanted = (squares - (means * centred).square()).sum((1, 2))
        if change - explained > (1 - MIN_EXPLAINED) * wanted:
            return None

        bias = mean_change + (prior - merge(*factors)) @ mean_r
        bias = (bias / scale).flatten()
        if self.layer.has_bias:
            bias = bias + self.layer.module.bias
        if not self.of_input:
            factors[-2] = factors[-2] @ matrix
        factors[-1] = factors[-1] / scale
        return factors, bias

    def _moments(self, centred: bool) -> tuple[Tensor, ...] | None:
        """Means of change and regressors, and their joint moments; None where
        the regressors do not vary."""
        count, rows = self.joint[:, -1:, -1:], self.rows
        if count.min() < 1:
            return None
        joint = self.joint / count
        mean = joint[..., -1:] * centred
        mean_change, mean_r = mean[:, :rows], mean[:, rows:-1]
        cross = joint[:, :rows, :-1] - mean_change @ mean_r.mT
        second = joint[:, rows:-1, :-1] - mean_r @ mean_r.mT
        # below the rounding of float32 products there is no variance
        noise = 1e-6 * joint[:, rows:-1].diagonal(dim1=1, dim2=2).sum(1)
        if (second.diagonal(dim1=1, dim2=2).sum(1) <= noise).any():
            return None
        second.diagonal(dim1=1, dim2=2).add_(noise.unsqueeze(1))
        return mean_change, mean_r, cross, second

    def _regress(self, cross: Tensor, second: Tensor, prior: Tensor,
                 rank: int | None) -> tuple[list[Tensor], Tensor]:
        """Regression in the metric of the loss' gradients, if it is known:
        factors, and how much full rank explains."""
        weight, spectrum = self.statistics.gradient, self.statistics.spectrum
        if weight is not None and weight.shape[-1] == self.rows:
            scale = self.scale.double()
            weight = weight / (scale @ scale.mT)
        elif weight is None or spectrum is None or self.in_sum or (
                self.input_basis is not None):
            weight = None  # a sum has errors in directions that it lacks
        else:
            vectors = spectrum.vectors
            coefficients, basis, explained = reduced_rank_regression(
                vectors.mT @ cross, second, vectors.mT @ prior, rank, weight)
            return [basis, vectors @ coefficients], explained
        front = []
        if self.input_basis is None:
            coefficients, basis, explained = reduced_rank_regression(
                cross, second, prior, rank, weight)
        else:
            coefficients, basis, explained, fitted = two_sided_regression(
                cross, second, prior, self.input_basis, rank, weight)
            front = [fitted]
        return [*front, basis, coefficients], explained
