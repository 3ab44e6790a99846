# Copyright (c) mmbasis authors. All rights reserved.
"""Sequential reconstruction: each layer makes up for the layers before it."""
from contextlib import ExitStack
from typing import Any, Optional, Sequence, Tuple

import torch
import torch.nn as nn
from greenlet import getcurrent, greenlet
from mmengine.dist import all_reduce, get_world_size
from mmengine.logging import MMLogger
from torch import Tensor

from ..factorization import orthonormalize, reduced_rank_regression
from ..layers import BasisLayer
from ..planning import (CompressionPlan, LayerInfo, evaluation,
                        expansion_input, forward_batch, is_expansion,
                        output_samples, sum_of_products)
from ..planning.layers import PREDICTION

#: A layer whose output on the compressed network's input says less than this
#: share of its output on the dense network's is not reconstructed from it:
#: the two passes see different things there, other proposals for example.
MIN_EXPLAINED = 0.5


class _Pass(greenlet):
    """The forward pass of one batch, which stops at layers.

    A hook of the layer hands control back to who advanced the pass, in the
    middle of whatever the model's ``forward`` does; it goes on when it is
    advanced again. So all batches go through the model side by side and
    once, without anybody knowing how the model is built.
    """

    def __init__(self, model: nn.Module, data: Any) -> None:
        super().__init__()
        self.model, self.data = model, data
        #: where the pass stands; None at its end
        self.name: Optional[str] = None
        self.tensor: Optional[Tensor] = None

    def run(self, *_) -> None:
        forward_batch(self.model, self.data)

    def stop(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.parent.switch()

    def advance(self) -> None:
        """Go on to the next layer, or to the end of the pass."""
        self.name = self.tensor = None
        self.switch()


def _stop(name: str, tensor: Tensor) -> None:
    current = getcurrent()
    if isinstance(current, _Pass):
        current.stop(name, tensor)


class _Regression:
    """Moments of a layer's target and regressors over all batches.

    The target is the layer's output in the dense network. The regressors are
    what it would put out in the compressed network if it were dense there,
    without bias, or its input there where that is smaller (a pointwise
    expansion).

    Args:
        layer (LayerInfo): The dense layer.
    """

    def __init__(self, layer: LayerInfo) -> None:
        self.layer = layer
        self.of_input = is_expansion(layer)
        groups, self.rows, in_size = layer.matrix_shape
        size = in_size if self.of_input else self.rows
        new = layer.module.weight.new_zeros
        # products of (change, regressors, 1) with (regressors, 1), where the
        # change is that of the target against the layer as it was
        self.joint = new((groups, self.rows + size + 1, size + 1)).double()
        self.squares = new((groups, self.rows)).double()

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch.

        Args:
            x (Tensor): The layer's input in the compressed network.
            y (Tensor): Its output in the dense one.
        """
        layer = self.layer
        target = output_samples(layer, y)
        unchanged = output_samples(layer, layer.module(x))
        if target.shape != unchanged.shape:
            return
        regressors = unchanged
        if self.of_input:
            regressors = expansion_input(layer, x)
        elif layer.module.bias is not None:
            bias = layer.module.bias.view(len(regressors), -1, 1)
            regressors = unchanged - bias
        change = target - unchanged
        right = torch.cat([regressors, torch.ones_like(target[:, :1])], 1)
        self.joint += sum_of_products(torch.cat([change, right], 1), right)
        self.squares += change.square().sum(-1)

    def solve(self, rank: Optional[int],
              centred: bool) -> Optional[Tuple[Tensor, Tensor, Tensor]]:
        """The best layer of a rank.

        Args:
            rank (int, optional): None for full rank.
            centred (bool): Whether the layer has a bias to give.

        Returns:
            tuple[Tensor, Tensor, Tensor] | None: Basis ``(G, Q, D)``,
            coefficients ``(G, P / G, Q)`` and bias ``(P, )``; None where the
            regressors do not vary, or say too little of the target.
        """
        if get_world_size() > 1:
            all_reduce(self.joint)
            all_reduce(self.squares)
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

        dense = self.layer.module
        matrix = self.layer.kind.to_matrix(dense).detach().double()
        prior = matrix if self.of_input else torch.eye(rows).to(matrix).expand(
            len(matrix), -1, -1)
        change = self.squares.sum() / count.max() - mean_change.square().sum()
        coefficients, basis, explained = reduced_rank_regression(
            cross, second, prior, rank)
        total = change + (prior @ second *
                          prior).sum() + 2 * (cross * prior).sum()
        if change - explained > (1 - MIN_EXPLAINED) * total:
            return None

        bias = mean_change + prior @ mean_r - coefficients @ (basis @ mean_r)
        bias = bias.flatten()
        if dense.bias is not None:
            bias = bias + dense.bias
        return basis if self.of_input else basis @ matrix, coefficients, bias


def reconstruct(model: nn.Module, reference: nn.Module,
                layers: Sequence[LayerInfo], plan: CompressionPlan,
                batches: Sequence[Any]) -> None:
    """Fit the layers of a compressed model, in the order in which they run, to
    the outputs of the dense model.

    A layer sees what the compressed layers before it make of the images, and
    is the best map of its rank from there to what the dense layer puts out
    (reduced-rank regression). Layers that the planner kept dense, and
    prediction layers, are fitted at full rank: that costs nothing. Layers
    that run several times in a pass stay as they are.

    Args:
        model (nn.Module): The compressed model, changed in place.
        reference (nn.Module): The dense model.
        layers (Sequence[LayerInfo]): The layers of the reference, calibrated.
        plan (CompressionPlan): The plan that the model follows.
        batches (Sequence): Batches; all of them are on their way through both
            models at a time.
    """
    logger = MMLogger.get_current_instance()
    todo = {
        layer.name: layer
        for layer in layers
        if layer.calls == 1 and layer.kind is not None and (
            layer.compressible or layer.reason == PREDICTION)
        and layer.module.weight.requires_grad
    }
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(evaluation(reference))
        for name in todo:
            stack.callback(
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _, args, name=name: _stop(name, args[0])).remove)
            stack.callback(
                reference.get_submodule(name).register_forward_hook(
                    lambda _, args, y, name=name: _stop(name, y)).remove)
        passes = [(_Pass(reference, data), _Pass(model, data))
                  for data in batches]
        for pair in passes:
            for one in pair:
                one.advance()
        done = 0
        while any(student.name for _, student in passes):
            name = next(s.name for _, s in passes if s.name)
            fitted = _fit(todo[name], model.get_submodule(name), plan, passes)
            done += 1
            for one in (one for pair in passes for one in pair):
                if one.name == name:
                    one.advance()
            logger.info('Reconstruction: layer %d/%d, %s%s', done, len(todo),
                        name, '' if fitted else ' (left as it was)')


def _fit(layer: LayerInfo, target: nn.Module, plan: CompressionPlan,
         passes: Sequence[Tuple[_Pass, _Pass]]) -> bool:
    """Fit one layer where all passes stand at it; whether that was
    possible."""
    regression = _Regression(layer)
    for teacher, student in passes:
        if teacher.name == student.name == layer.name:
            regression.add(student.tensor, teacher.tensor)
    compressed = isinstance(target, BasisLayer)
    entry = plan.layers.get(layer.name)
    old_bias = target.coefficients.bias if compressed else target.bias
    solution = regression.solve(entry and entry.rank, old_bias is not None)
    if solution is None:
        return False
    basis, coefficients, bias = solution
    if compressed:
        target.set_factors(*orthonormalize(basis, coefficients),
                           None if old_bias is None else bias)
        return True
    target.weight.copy_(layer.kind.from_matrix(coefficients @ basis, target))
    if old_bias is not None:
        old_bias.copy_(bias)
    return True
