# Copyright (c) mmbasis authors. All rights reserved.
"""Forms of a 3x3 convolution, each fitted by least squares to what the layer
returns on data until it stands still, for spatial_form.py: the share of the
output's energy that it loses at the same MACs."""
from operator import itemgetter

import torch

from mmbasis.factorization import (
    reduced_rank_regression,
    spectrum_of_factor,
    spectrum_of_input,
    two_sided_regression,
)

#: the last one is k x 1, then 1 x k (Jaderberg et al., BMVC 2014, scheme 2)
FORMS = ('output', 'input', 'both', 'spatial')
EITHER_ORDER = 'spatial, the better order'
COEFFICIENTS = 'spatial + coefficients, the better order'
#: of the top eigenvalue, so that systems can be solved
RIDGE = 1e-9
#: rounds of alternating least squares: for input bases, and at most for
#: spatial forms, which end where a round gains less than TOLERANCE; more
#: change the errors by less than 1.5 %
ROUNDS, MOST_ROUNDS, TOLERANCE = 6, 60, 5e-4
#: steps of conjugate gradients in a round
STEPS = 8


class Layer:
    """Weights ``(P, C, 3, 3)`` and the covariance of patches, ``(D, D)``."""

    def __init__(self, weight, second, stride):
        self.weight, self.second, self.stride = weight, second, stride
        self.outputs, self.inputs = weight.shape[:2]
        self.matrix = weight.flatten(1)
        self.metric = self.matrix @ second
        self.energy = (self.metric * self.matrix).sum()
        self.macs = 9 * self.inputs * self.outputs

    def transposed(self):
        """With rows and columns of the kernel exchanged."""
        second = self.second.view(self.inputs, 3, 3, self.inputs, 3, 3)
        second = second.permute(0, 2, 1, 3, 5, 4).reshape_as(self.second)
        return Layer(self.weight.mT.contiguous(), second, self.stride)

    def error(self, weight):
        """The share of the output's energy that other weights lose."""
        wrong = self.matrix - weight.reshape_as(self.matrix)
        return float((wrong @ self.second * wrong).sum() / self.energy)

    def cost(self, form, ranks):
        """MACs for one position of the output."""
        c, p, s, r = self.inputs, self.outputs, self.stride, ranks[0]
        return {
            'output': r * (9 * c + p),
            'input': r * (s**2 * c + 9 * p),
            'both': r * s**2 * c + ranks[-1] * (9 * r + p),
            'spatial': 3 * r * (s * c + p),
        }[form]

    def _found(self, weight, ranks):
        return self.error(weight), ranks, weight

    def _regression_arguments(self):
        return (torch.zeros_like(self.matrix)[None], self.second[None],
                self.matrix[None])

    # ------------------------------------------------ the forms that exist
    def output(self, budget):
        rank = int(budget * self.macs / (9 * self.inputs + self.outputs))
        if rank < 1:
            return None
        w, basis, _ = reduced_rank_regression(
            *self._regression_arguments(), rank, ridge=RIDGE)
        return self._found(w[0] @ basis[0], [rank])

    def input(self, budget):
        rank = int(budget * self.macs /
                   (self.stride**2 * self.inputs + 9 * self.outputs))
        if rank < 1:
            return None
        return self._found(self._two_sided(rank, None, ROUNDS), [rank])

    def both(self, budget):
        splits = []
        step = max(1, self.inputs // 16)
        for inner in range(max(1, self.inputs // 5), self.inputs + 1, step):
            rest = budget * self.macs - self.stride**2 * self.inputs * inner
            rank = min(int(rest / (9 * inner + self.outputs)), self.outputs)
            if rank > 0:
                weight = self._two_sided(inner, rank, 0)
                splits.append((self.error(weight), inner, rank))
        if not splits:
            return None
        _, inner, rank = min(splits)
        return self._found(
            self._two_sided(inner, rank, ROUNDS), [inner, rank])

    def _two_sided(self, inner, rank, rounds):
        # the centre of patches stands for all places
        channels = self.second.view(self.inputs, 9, self.inputs, 9)[:, 4, :, 4]
        start = spectrum_of_input(
            self.matrix[None], self.inputs, channels[None])
        start = torch.linalg.qr(start.narrow[..., :inner])[0].mT
        w, basis, _, front = two_sided_regression(
            *self._regression_arguments(), start, rank, ridge=RIDGE,
            rounds=rounds)
        layer = (w[0] @ basis[0]).unflatten(1, (inner, 9))
        return torch.einsum('prk,rc->pck', layer, front[0])

    # ---------------------------------------------------- the spatial forms
    def spatial(self, budget):
        rank = int(budget * self.macs /
                   (3 * self.inputs * self.stride + 3 * self.outputs))
        if rank < 1:
            return None
        return self._found(self._alternate(self._start(rank), None), [rank])

    def spatial_with_coefficients(self, budget):
        splits = []
        for inner in range(1, 3 * self.inputs + 1,
                           max(1, self.inputs // 8)):
            rest = budget * self.macs - 3 * self.stride * self.inputs * inner
            rank = min(int(rest / (3 * inner + self.outputs)), self.outputs,
                       3 * inner)
            if rank > 0:
                start = self._start(inner)
                splits.append((self.error(self._behind(start, rank)[1]),
                               inner, rank))
        if not splits:
            return None
        _, inner, rank = min(splits)
        return self._found(
            self._alternate(self._start(inner), rank), [inner, rank])

    def _start(self, rank):
        """The filters ``k x 1``, ``(R, C, 3)``, of the weights' SVD."""
        pairs = self.weight.permute(1, 2, 0, 3).reshape(3 * self.inputs, -1)
        vectors = spectrum_of_factor(pairs[None]).vectors[0]
        return vectors[:, :rank].T.reshape(-1, self.inputs, 3)

    def _behind(self, first, rank):
        """The best layer ``1 x k`` behind, ``(P, R, 3)``, and the weights
        that it makes with it."""
        # second moment of what the first filters return, (R, 3)
        second = self.second.view(self.inputs, 3, 3, -1)
        half = torch.einsum('rci,cijn->rjn', first, second).flatten(0, 1)
        inner = torch.einsum(
            'rci,ncij->nrj', first,
            half.view(-1, self.inputs, 3, 3)).flatten(1)
        strength = RIDGE * inner.diagonal().sum()
        root = torch.linalg.cholesky(
            inner + strength * torch.eye(len(inner)).to(inner))
        last = torch.cholesky_solve(half @ self.matrix.T, root).T
        if rank is not None:
            vectors = spectrum_of_factor((last @ root)[None]).vectors[0]
            last = vectors[:, :rank] @ (vectors[:, :rank].T @ last)
        last = last.view(self.outputs, -1, 3)
        return last, torch.einsum('prj,rci->pcij', last, first)

    def _alternate(self, first, rank):
        last, weight = self._behind(first, rank)
        error = self.error(weight)
        for _ in range(MOST_ROUNDS):
            first = self._fit_first(last, first)
            # of any basis of what they span, the best conditioned one
            first = torch.linalg.qr(first.flatten(1).T)[0].T.view_as(first)
            last, weight = self._behind(first, rank)
            before, error = error, self.error(weight)
            if before - error < TOLERANCE * before:
                break
        return weight

    def _fit_first(self, last, first):
        """Towards the best filters ``k x 1`` in front of a layer, by
        conjugate gradients from those of before."""
        gram = torch.einsum('prj,psl->rjsl', last, last)
        size = 3 * self.inputs
        second = self.second.view(size, 3, size, 3)
        # preconditioner: one matrix for each side
        left = _inverse(torch.einsum('rjsj->rs', gram))
        right = _inverse(torch.einsum('ajbj->ab', second))
        seen = second.reshape(size, -1)  # (b, l a j)
        gram = gram.permute(0, 1, 3, 2).flatten(1)  # (r, j l s)

        def product(x):
            found = (x @ seen).view(len(x), 3, size, 3)  # (s, l, a, j)
            return gram @ found.permute(3, 1, 0, 2).reshape(-1, size)

        x = first.flatten(1)
        wanted = torch.einsum(
            'prj,paj->ra', last, self.metric.view(-1, size, 3))
        rest = wanted - product(x)
        step = direction = left @ rest @ right
        scale = (rest * step).sum()
        for _ in range(STEPS):
            along = product(direction)
            length = scale / (direction * along).sum().clamp_min(1e-300)
            x, rest = x + length * direction, rest - length * along
            step = left @ rest @ right
            scale, before = (rest * step).sum(), scale
            direction = step + scale / before.clamp_min(1e-300) * direction
        return x.view_as(first)

    def in_better_order(self, form, budget):
        """A spatial form or that of 1 x k, then k x 1."""
        other = self.transposed()
        found = [getattr(self, form)(budget), getattr(other, form)(budget)]
        if found[1] is not None:
            error, ranks, weight = found[1]
            weight = weight.view_as(self.weight).mT.contiguous()
            found[1] = error, ranks, weight
        return min(filter(None, found), key=itemgetter(0), default=None)

    def fit(self, form, budget):
        """Error, ranks and weights of a form at the budget; None where no rank
        is cheap enough."""
        if form in FORMS:
            return getattr(self, form)(budget)
        name = 'spatial' if form == EITHER_ORDER else (
            'spatial_with_coefficients')
        return self.in_better_order(name, budget)


def _inverse(moment):
    strength = 1e-6 * moment.diagonal().mean()
    return torch.linalg.inv(
        moment + strength * torch.eye(len(moment)).to(moment))
