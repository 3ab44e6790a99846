# Copyright (c) mmbasis authors. All rights reserved.
"""Sequential reconstruction: each layer corrects errors before and beside
it."""
from __future__ import annotations

import itertools
import time
from contextlib import ExitStack
from functools import partial
from typing import Any, Sequence

import torch.nn as nn
from mmengine.logging import MMLogger
from torch import Tensor

from ..factorization import merge, orthonormalize
from ..layers import BasisLayer, observe
from ..planning import Analysis, Layer
from ..planning.samples import output_samples
from ..running import Pass, SumWatch, adapter_of, current_pass, evaluation
from ..utils.collectives import together
from .layer_regression import LayerRegression

#: Images that layers which run several times in a pass are fitted to: each
#: such layer takes a pass of its own.
SHARED_IMAGES = 16


class Reconstruction:
    """Fits the layers of a compressed model, in the order in which they run,
    to the outputs of the dense model.

    A layer is the best of its rank (reduced-rank regression, in the metric of
    the loss' gradients where they are known) from what the compressed layers
    before it return to what the dense layer returns. Where its output is added
    to something else, as at the end of a residual block, it corrects the
    errors of that, too. Layers that the planner kept dense, and prediction
    layers, are fitted at full rank.

    Args:
        model (nn.Module): The compressed model, changed in place.
        reference (nn.Module): The dense model.
        analysis (Analysis): What was measured of the reference.
    """

    def __init__(self, model: nn.Module, reference: nn.Module,
                 analysis: Analysis) -> None:
        self.model, self.reference = model, reference
        self.teacher = adapter_of(reference)
        self.statistics = analysis.statistics
        self.todo = {x.name: x for x in analysis.selection.fitted}
        self.watch = SumWatch()
        self._done, self._start = 0, time.time()

    def run(self, batches: Sequence[Any]) -> None:
        """Fit all layers to batches, which are all on their way through both
        models at a time. All processes take part in the fit of each layer,
        whether their batches run it or not."""
        with evaluation(self.model), evaluation(self.reference):
            modules = {x: self.reference.get_submodule(x) for x in self.todo}
            self.watch.probe(self.teacher, modules, batches[0])
            self.student = self.teacher.twin(self.model)
            found = together('reconstruction, first batch',
                             (self.watch.order, self.watch.residual))
            order = [*dict.fromkeys(x for names, _ in found for x in names)]
            self.watch.order = order
            self.watch.residual = set().union(*[names for _, names in found])
            shared = [x for x in order if self.statistics[x].calls > 1]
            self.todo = {name: self.todo[name] for name in order}
            first = order.index(shared[0]) if shared else len(order)
            self.watch.residual.difference_update(shared)
            for fit, names in (
                    (self._fit_side_by_side, order[:first]),
                    (self._fit_shared, shared),
                    (self._fit_side_by_side,
                     [x for x in order[first:] if x not in shared])):
                if names:
                    fit(names, batches)

    def _log(self, name: str, fitted: bool) -> None:
        self._done += 1
        left = len(self.todo) - self._done
        seconds = (time.time() - self._start) / self._done * left
        MMLogger.get_current_instance().info(
            'Reconstruction: layer %d/%d, eta %d s, %s%s', self._done,
            len(self.todo), seconds, name,
            '' if fitted else ' (left as it was)')

    def _fit_side_by_side(self, names: Sequence[str],
                          batches: Sequence[Any]) -> None:
        with ExitStack() as stack:
            for layer in names:
                self._stop_at(layer, stack)
            passes = [
                (stack.enter_context(Pass(self.teacher, data, self.watch)),
                 stack.enter_context(Pass(self.student, data, self.watch)))
                for data in batches]
            name: str | None = None  # before passes begin, and at their end
            while True:
                for one in itertools.chain(*passes):
                    if one.name == name:
                        one.advance()
                standing = together(
                    'reconstruction, next layer',
                    [s.name for _, s in passes if s.name])
                name = next(itertools.chain(*standing), None)
                if name is None:
                    break
                self._log(name, self._fit(name, passes))

    def _stop_at(self, name: str, stack: ExitStack) -> None:
        """Have passes stop at a layer: the student before it, the teacher
        behind it, or both where its output goes into a sum."""
        residual = name in self.watch.residual

        def before(module: nn.Module, args: tuple) -> None:
            current = current_pass()
            if current is not None and residual:
                current.inputs[name] = args[0]
            elif current is not None:
                current.stop(name, args[0])

        def behind(module: nn.Module, args: tuple, kwargs: dict,
                   y: Tensor) -> None:
            current = current_pass()
            if current is not None and residual:
                self.watch.mark(name, y)
            elif current is not None:
                current.stop(name, y)

        student = observe(
            self.model.get_submodule(name), behind if residual else None,
            before)
        teacher = observe(self.reference.get_submodule(name), behind)
        stack.callback(student.remove)
        stack.callback(teacher.remove)

    def _fit(self, name: str, passes: Sequence[tuple[Pass, Pass]]) -> bool:
        """Fit a layer where all passes stand at it; whether that was
        possible."""
        layer = self.todo[name]
        pairs = [(t, s) for t, s in passes if t.name == s.name == name]
        if name in self.watch.residual:
            return self._fit_sum(layer, pairs)
        return self._regress(layer, [
            (s.tensor, output_samples(layer, t.tensor)) for t, s in pairs])

    def _regress(self, layer: Layer, samples: Sequence[tuple[Tensor, ...]],
                 scale: Tensor | None = None) -> bool:
        """Fit a layer to what :meth:`LayerRegression.add` takes, but for the
        importance."""
        targets = [x[1] for x in samples]
        regression = self._regression(layer, targets, scale)
        for one, sample in zip(self._importance(layer, targets), samples):
            regression.add(one, *sample)
        return self._set(regression)

    def _importance(self, layer: Layer,
                    targets: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """What the samples of each target count; None where it is unknown, or
        belongs to other samples than the model sees in testing."""
        known = self.statistics[layer.name].importance
        fits = len(known) >= len(targets) and all(
            len(x) == y.shape[-1] for x, y in zip(known, targets))
        agreed = together(f'importance of {layer.name}', fits)
        return known[:len(targets)] if all(agreed) else [None] * len(targets)

    def _regression(self, layer: Layer, targets: Sequence[Tensor],
                    scale: Tensor | None = None) -> LayerRegression:
        return LayerRegression(layer, self.statistics[layer.name], targets,
                               scale, self.model.get_submodule(layer.name))

    def _fit_sum(self, layer: Layer,
                 pairs: Sequence[tuple[Pass, Pass]]) -> bool:
        """Fit a layer whose output is about to go into a sum, so that the sum
        is what it is in the dense model."""
        target = self.model.get_submodule(layer.name)
        groups, rows, _ = layer.matrix_shape
        scales = together(f'reconstruction of {layer.name}',
                          [t.sum.scale.cpu() for t, _ in pairs[:1]])
        one = next(itertools.chain(*scales), None)
        if one is None:
            return False
        scale = one.to(layer.module.weight).expand(groups * rows)
        axis = layer.known_kind.channel_axis(layer.module)
        wide = scale.view(-1, *[1] * (-axis - 1))
        samples = []
        for teacher, student in pairs:
            wanted = teacher.sum.branch + teacher.sum.other
            found = student.sum.branch + student.sum.other
            y = target(student.tensor)
            samples.append(
                (student.tensor, *(output_samples(layer, value)
                                   for value in (y, wanted - found, wanted))))
            # what stands in the sum already is replaced by the new output
            student.sum.branch.sub_(wide * y)
        fitted = self._regress(layer, samples, scale)
        for _, student in pairs:
            student.sum.branch.add_(wide * target(student.tensor))
        return fitted

    def _fit_shared(self, names: Sequence[str],
                    batches: Sequence[Any]) -> None:
        """Fit layers one after the other, each to all its calls."""
        images = itertools.accumulate(map(self.teacher.count_images, batches))
        some = [data for data, before in zip(batches, [0, *images])
                if before < SHARED_IMAGES]
        targets = [self._outputs(names, data) for data in some]
        for name in names:
            self._log(name, self._fit_calls(name, some,
                                            [x[name] for x in targets]))

    def _fit_calls(self, name: str, batches: Sequence[Any],
                   targets: Sequence[Sequence[Tensor]]) -> bool:
        layer, wanted = self.todo[name], [*itertools.chain(*targets)]
        regression = self._regression(layer, wanted)
        known = zip(wanted, self._importance(layer, wanted))

        def add(module: nn.Module, args: tuple) -> None:
            # the dense layer may have been called less often
            target, importance = next(calls, (None, None))
            if target is not None:
                regression.add(importance, args[0], target)

        watch = observe(self.model.get_submodule(name), before=add)
        for data, found in zip(batches, targets):
            calls = iter([*itertools.islice(known, len(found))])
            self.student.predict(data)
        watch.remove()
        return self._set(regression)

    def _outputs(self, names: Sequence[str],
                 data: Any) -> dict[str, list[Tensor]]:
        """Samples of the outputs of dense layers, call by call."""
        found: dict[str, list[Tensor]] = {name: [] for name in names}

        def keep(name: str, module: nn.Module, args: tuple, kwargs: dict,
                 y: Tensor) -> None:
            found[name].append(output_samples(self.todo[name], y))

        with ExitStack() as stack:
            for name in names:
                module = self.reference.get_submodule(name)
                stack.callback(observe(module, partial(keep, name)).remove)
            self.teacher.predict(data)
        return found

    def _set(self, regression: LayerRegression) -> bool:
        """Write the solution into the compressed model, if there is one."""
        layer = regression.layer
        target = self.model.get_submodule(layer.name)
        compressed = isinstance(target, BasisLayer)
        old_bias = target.last.bias if compressed else target.bias
        solution = regression.solve(target.output_rank if compressed else None,
                                    old_bias is not None)
        if solution is None:
            return False
        factors, bias = solution
        if compressed:
            if target.output_rank is None:
                factors[-2:] = [merge(*factors[-2:])]
            if len(factors) < len(target.factors):  # it was not fitted
                factors.insert(0, target.factors[0])
            target.set_factors(*orthonormalize(*factors),
                               bias=None if old_bias is None else bias)
        else:
            target.weight.copy_(
                layer.known_kind.from_matrix(merge(*factors), target))
            if old_bias is not None:
                old_bias.copy_(bias)
        return True
