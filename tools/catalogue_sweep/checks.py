# Copyright (c) mmbasis authors. All rights reserved.
"""What is checked of one model of the catalogue."""
import copy
import gc
import json
import os
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from mmengine.config import Config

from mmbasis.compression import (
    Recipe,
    analyze,
    apply_plan,
    basis_layers,
    load_weights,
    make_plan,
    plan_of,
    read_checkpoint,
    run_recipe,
    save_checkpoint,
)
from mmbasis.compression.pipeline import bases_of, find_targets
from mmbasis.models import build_compressed
from mmbasis.models.distillation import Distillation
from mmbasis.planning import (
    Analysis,
    BudgetPlanner,
    CompressionPlan,
    Costs,
    FixedPlanner,
    Form,
    Ranks,
)
from mmbasis.planning.layers import FORMS
from mmbasis.planning.planners import Choice, Decided
from mmbasis.running import adapter_of

from .compare import (
    difference,
    forward,
    in_float32,
    layer_differences,
    precision,
    tensors,
)
from .counting import MacCounter
from .data import make_batch, sizes
from .models import architecture, build, settle_norms, uninitialized
from .operators import standing_in

#: relative difference of outputs at full rank
TOLERANCE = 1e-4
#: parameters above which there is no room for a model in float64
LARGE = 2.5e8
MODES = ('tensor', 'predict', 'loss')
#: facts of a comparison at full rank
COMPARED = ('full_rank_error', 'precision', 'compared', 'layer_error')


class CatalogueError(RuntimeError):
    """The dense model does not work either."""


class BothSides(FixedPlanner):
    """Full rank, with a basis of the inputs, too, where one could save
    anything."""
    forms = FORMS

    def choose(self, free: Sequence[Costs], decided: Decided) -> Choice:
        layers = [x.layer for x in free]
        return [
            Ranks(x.full_rank, x.in_channels if x.narrowable else None)
            for x in layers
        ]


class Split(FixedPlanner):
    """Full rank, windows split where they can be."""
    forms = FORMS

    def choose(self, free: Sequence[Costs], decided: Decided) -> Choice:
        layers = [x.layer for x in free]
        return [
            Ranks(x.full_rank) if x.why_not('spatial') else
            Ranks(x.full_spatial_rank, None, True) for x in layers
        ]


class Checked:
    """One model on its way through the checks.

    Args:
        library (str): Whose model it is.
        cfg (Config): Its config.
        report (Callable): Told the name of each step before it starts.
        thorough (bool): Compress to half with all that users get by default:
            ranks by the loss, sequential reconstruction, and the dense model
            as teacher. That takes as long as all the rest. Defaults to False.
    """

    def __init__(self,
                 library: str,
                 cfg: Config,
                 report: Callable[[str], None],
                 thorough: bool = False) -> None:
        self.library = library
        self.cfg = cfg
        self.report = report
        #: goes into the result
        self.facts: Dict[str, Any] = dict(step='read', thorough=thorough)
        self.facts['times'] = {}
        #: the dense model, of those that are looked at closely
        self.teacher: Optional[Distillation] = None
        #: layers that get no gradient
        self.unused: Set[str] = set()
        self.since = time.time()

    def run(self) -> None:
        """All steps; facts are filled in as far as they were reached.

        Raises:
            CatalogueError: If the dense model cannot be built or run.
            Exception: Whatever is wrong with the compressed one.
        """
        self._step('build')
        self.model = _as_catalogue(build, self.cfg)
        self.shapes = _shapes(self.model)
        self.facts['built'] = True
        self.facts['params'] = sum(p.numel() for p in self.model.parameters())
        self.facts['stand_ins'] = standing_in(self.model)
        self._step('dense')
        self._find_size()
        self._step('analysis')
        one_side, *others = (
            Recipe.of(
                planner=planner({'.*': 'full'},
                                allow_costlier=True,
                                prediction_layers=True))
            for planner in (FixedPlanner, BothSides, Split))
        analysis = analyze(self.model, others[0], [self.data])
        self._step('full rank')
        self._full_rank(make_plan(one_side, analysis), analysis)
        for form, recipe in zip(('both', 'spatial'), others):
            plan = make_plan(recipe, analysis)
            if any(x.form == form for x in plan.layers.values()):
                self._step(f'full rank, {form}')
                self._keep_worse(partial(self._full_rank, plan, analysis))
        self._step('half')
        plan = self._half(analysis)
        self._step('round trip')
        self._round_trip(plan)
        self._step('test mode')
        self._evaluate()
        self._step('train mode')
        self._train()
        self._step('end')

    def _step(self, name: str) -> None:
        now = time.time()
        if 'step' in self.facts:
            self.facts['times'][self.facts['step']] = round(
                now - self.since, 1)
        self.facts['step'], self.since = name, now
        gc.collect()  # models that hold methods of their own (ViT) are cycles
        self.report(name)

    # ------------------------------------------------------------ dense
    def _find_size(self) -> None:
        """The smallest images that the dense model takes in all the modes that
        it takes the largest in."""
        best: Tuple[int, int, dict] = (0, 0, {})
        for size in _as_catalogue(sizes, self.library, self.cfg):
            errors = self._modes_at(size)
            if best[0] and errors == best[2]:
                break  # whatever it cannot do has nothing to do with the size
            if best[0] < len(MODES) - len(errors) or not best[1]:
                best = (len(MODES) - len(errors), size, errors)
            if not errors:
                break
        _, size, errors = best
        self.facts.update(
            size=size,
            modes=[m for m in MODES if m not in errors],
            dense_errors=errors)
        if not self.facts['modes']:
            raise CatalogueError(errors['tensor'])
        self.data = make_batch(self.cfg, self.model, size)
        if self.facts['modes'] == ['loss']:
            # which it must do in evaluation mode, too, to be looked at
            with torch.no_grad():
                _as_catalogue(self._outputs, copy.deepcopy(self.model))
        if 'predict' not in self.facts['modes']:
            # a pretext task cannot be tested, nor calibrated by users
            self.facts['thorough'] = False

            def test_step(model: nn.Module, data: Any) -> Any:
                return self._outputs(model)

            self.model.test_step = MethodType(test_step, self.model)

    def _modes_at(self, size: int) -> Dict[str, str]:
        """Errors of the dense model by mode."""
        errors = {}
        try:
            data = make_batch(self.cfg, self.model, size)
        except Exception as error:
            return dict.fromkeys(MODES, describe(error))
        for mode in MODES:
            try:
                if mode == 'loss':
                    model = copy.deepcopy(self.model)
                    self.facts['finite'] = _backward(model, data)
                    self.unused = {
                        name.rpartition('.')[0]
                        for name, p in model.named_parameters()
                        if p.requires_grad and p.grad is None
                    }
                    continue
                with torch.no_grad():
                    if mode == 'tensor':
                        settle_norms(
                            self.model,
                            lambda: forward(self.model, data, 'tensor'))
                    outputs = forward(self.model, data, mode)
                    if mode == 'tensor':
                        self.facts['finite_outputs'] = _finite(outputs)
            except Exception as error:
                errors[mode] = describe(error)
        if _shapes(self.model) != self.shapes:
            # EVA-02 forgets the size that it was built for
            self.model = _as_catalogue(build, self.cfg)
            return dict.fromkeys(MODES, 'buffers grow or shrink with images')
        return errors

    def _outputs(self, model: nn.Module, data: Any = None) -> List[Any]:
        """What is compared: outputs before post-processing; final ones of a
        model that has no others; also the loss of one that has no final ones.
        """
        data = self.data if data is None else data
        modes = self.facts['modes']
        chosen = modes[:1] if 'predict' in modes else modes
        self.facts['compared'] = ' and '.join(chosen)
        return [forward(model, data, mode) for mode in chosen]

    # -------------------------------------------------------- full rank
    def _full_rank(self, plan: CompressionPlan, analysis: Analysis) -> None:
        """The compressed model is the same function.

        In float64 where they differ in float32: rounding makes boxes change
        places, and grows in deep networks with random weights. Where they
        differ then, too, rounding must be to blame: each layer for itself is
        the same function, and the dense model does not bear errors as small
        either. Large models are compared in float32 alone.
        """
        if not plan.layers:
            raise AssertionError(
                'no layer can be replaced: ' +
                '; '.join({x.reason
                           for x in plan.dense.values()}))
        self.facts['full_rank_layers'] = len(plan.layers)
        dtypes = [torch.float32]
        if self.facts['params'] < LARGE:
            dtypes.append(torch.float64)
        model = None
        for dtype in dtypes:
            data = self.data
            if dtype == torch.float64 and 'loss' not in self.facts['compared']:
                data = self._first_image()  # convolutions are slow then
            with precision(dtype), torch.no_grad():
                expected = self._dense_outputs(data, dtype)
                if expected is None:
                    break
                gc.collect()  # large models leave no room for the next
                if model is None:
                    model = self._at_full_rank(plan, analysis, dtypes[-1])
                basis = model
                if dtype != dtypes[-1]:
                    basis = in_float32(model)
                error = difference(self._outputs(basis, data), expected)
            del basis
            self.facts.update(
                full_rank_error=error, precision=str(dtype)[len('torch.'):])
            if error <= TOLERANCE:
                break
        # one number, the loss, says little
        if error > TOLERANCE or self.facts['modes'] == ['loss']:
            self._compare_layers(model)

    def _keep_worse(self, compare: Callable[[], None]) -> None:
        """Compare once more: the facts are those of the larger error."""
        before = dict(self.facts)
        compare()
        if before['full_rank_error'] > self.facts['full_rank_error']:
            self.facts.update({k: before[k] for k in COMPARED if k in before})

    def _dense_outputs(self, data: Any,
                       dtype: torch.dtype) -> Optional[List[Any]]:
        """Of the dense model; None if its operators know float32 only."""
        # a copy: a queue or a moving average changes with each run
        # (LAD has a to() of its own, for devices only)
        dense = nn.Module.to(copy.deepcopy(self.model), dtype)
        try:
            return self._outputs(dense, data)
        except Exception:
            if dtype == torch.float64:
                return None
            raise

    def _at_full_rank(self, plan: CompressionPlan, analysis: Analysis,
                      dtype: torch.dtype) -> nn.Module:
        """A compressed copy of the dense model."""
        memo = {}
        if dtype == torch.float32:
            # the weights that are replaced anyway are not copied, for room
            memo = {
                id(x): x
                for name in plan.layers
                for x in self.model.get_submodule(name).parameters()
            }
        model = nn.Module.to(copy.deepcopy(self.model, memo), dtype)
        apply_plan(model, plan, bases_of(analysis))
        return model

    def _compare_layers(self, model: nn.Module) -> None:
        """Each layer on its own inputs, in the precision that was compared
        last."""
        dtype = getattr(torch, self.facts['precision'])
        self.facts['compared'] += ', and each layer on its own inputs'
        with precision(dtype), torch.no_grad():
            dense = nn.Module.to(copy.deepcopy(self.model), dtype)
            worst = layer_differences(
                dense, dict(basis_layers(nn.Module.to(model, dtype))),
                lambda: self._outputs(dense))
            self.facts['layer_error'] = worst
            error = self.facts['full_rank_error']
            if worst > TOLERANCE or error > TOLERANCE and not self._is_chaotic(
                    dense, worst):
                raise AssertionError(f'outputs differ by {error:.2g} at full '
                                     f'rank, layers by {worst:.2g}')

    def _is_chaotic(self, model: nn.Module, epsilon: float) -> bool:
        """Whether relative errors of the weights change the outputs by more
        than the tolerance."""
        other = copy.deepcopy(model)
        for parameter in other.parameters():
            parameter.mul_(1 + epsilon * (2 * torch.rand_like(parameter) - 1))
        return difference(self._outputs(other),
                          self._outputs(model)) > TOLERANCE

    # -------------------------------------------------------- half MACs
    def _half(self, analyzed: Analysis) -> CompressionPlan:
        """Compress to half the MACs, and count them."""
        counter = self._counter(analyzed)
        if self.facts['thorough']:
            if 'loss' in self.facts['modes']:
                self.teacher = Distillation(self.model)
                self.teacher.take(self.model, None)
            # some data is of another kind in training (Soft Teacher)
            recipe = Recipe.of(
                planner=BudgetPlanner(
                    macs=.5,
                    forms=FORMS,
                    loss_aware='loss' in self.facts['modes']))
            plan = run_recipe(self.model, recipe, [self.data], [])[0]
        else:
            plan = self._compress(analyzed)
        totals = plan.totals()['macs']
        skipped = [
            _general(x.reason) for x in plan.dense.values()
            if not x.compressible
        ]
        self.facts.update(
            layers=len(plan.layers),
            macs=totals,
            skipped=dict(Counter(skipped)),
            kinds=dict(Counter(x.kind for x in plan.layers.values())))
        if not totals['after'] <= .5 * totals['before'] * (1 + 1e-9):
            raise AssertionError(f'the plan keeps {totals} MACs')
        if counter is not None:
            self.facts['counted'] = counter.check(self.model, plan,
                                                  self.unused)
        return plan

    def _compress(self, analyzed: Analysis) -> CompressionPlan:
        """To half, by the analysis that was made for full rank."""
        planner = BudgetPlanner(macs=.5, forms=FORMS, loss_aware=False)
        layers = analyzed.layers
        targets = find_targets(adapter_of(self.model), layers, self.data)
        selection = planner.select(layers, targets).without(
            analyzed.selection.excluded)
        plan = planner.plan(
            replace(analyzed, selection=selection), Form(bias=True))
        apply_plan(self.model, plan, bases_of(analyzed))
        return plan

    def _first_image(self) -> Any:
        return {k: v[:1] for k, v in copy.deepcopy(self.data).items()}

    def _counter(self, analysis: Analysis) -> Optional[MacCounter]:
        """None where MMEngine cannot count the model."""
        if not {'tensor', 'predict'} <= set(self.facts['modes']):
            self.facts['counter'] = 'mode tensor is not all that it does'
            return None
        try:
            return MacCounter(self.model, self._first_image(), analysis)
        except Exception as error:
            self.facts['counter'] = describe(error)
            return None

    # ------------------------------------------------------ afterwards
    def _round_trip(self, plan: CompressionPlan) -> None:
        """Saved, built from config and plan alone, and loaded, the model
        returns the same."""
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, 'compressed.pth')
            save_checkpoint(self.model, plan, path, {})
            content = read_checkpoint(path)
            with uninitialized():
                model = build_compressed(
                    architecture(self.cfg),
                    json.loads(plan_of(content).dumps()))
            load_weights(model, content, path)
        # LoRA saves its own weights alone; the others come from elsewhere
        kept, own = model.state_dict(), dict(self.model.named_parameters())
        for name, parameter in model.named_parameters():
            if name not in kept:
                parameter.data.copy_(own[name])
        if model.state_dict().keys() != self.model.state_dict().keys():
            differing = (
                model.state_dict().keys() ^ self.model.state_dict().keys())
            raise AssertionError('the state dict has other keys: ' +
                                 ', '.join(sorted(differing)))
        model.eval()
        with torch.no_grad():
            # on copies: a queue or a moving average changes with each run
            error = difference(
                self._outputs(model), self._outputs(copy.deepcopy(self.model)))
        self.facts['round_trip_error'] = error
        if error > 1e-6:
            raise AssertionError(f'outputs differ by {error:.2g} after saving '
                                 'and loading')

    def _evaluate(self) -> None:
        with torch.no_grad():
            for mode in set(self.facts['modes']) & {'tensor', 'predict'}:
                outputs = forward(self.model, self.data, mode)
                if (mode == 'tensor' and self.facts['finite_outputs']
                        and not _finite(outputs)):
                    raise AssertionError('outputs are not finite')

    def _train(self) -> None:
        if 'loss' not in self.facts['modes']:
            return
        finite = _backward(self.model, self.data, self.teacher)
        if self.facts['finite'] and not finite:
            raise AssertionError('loss or gradients are not finite')
        trained = [
            x.basis.weight for name, x in basis_layers(self.model)
            if x.basis.weight.requires_grad and name not in self.unused
        ]
        # a linear probe trains none
        if trained and all(weight.grad is None for weight in trained):
            raise AssertionError('no basis layer gets a gradient')


def _shapes(model: nn.Module) -> Dict[str, torch.Size]:
    return {k: x.shape for k, x in model.state_dict().items()}


def _as_catalogue(function: Callable, *args: Any) -> Any:
    try:
        return function(*args)
    except MemoryError:
        raise
    except Exception as error:
        raise CatalogueError(describe(error)) from error


def _backward(model: nn.Module,
              data: Any,
              teacher: Optional[Distillation] = None) -> bool:
    """A step of training without the step; whether all was finite."""
    model.train()
    if teacher is None:
        losses = forward(model, data, 'loss')
    else:
        inputs = model.data_preprocessor(copy.deepcopy(data), True)
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs,
                                                                      {})
        losses = teacher.losses(model, args, dict(kwargs, mode='loss'))
    loss, _ = model.parse_losses(losses)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return bool(torch.isfinite(loss)) and all(
        bool(torch.isfinite(x).all()) for x in gradients)


def _finite(outputs: Any) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in tensors(outputs))


def _general(reason: str) -> str:
    """A reason without the names and numbers of one layer."""
    for start in ('shares its parameters', 'no rank pays', 'worth more',
                  'the rank it needs'):
        if reason.startswith(start):
            return start
    return reason


def describe(error: BaseException) -> str:
    """Type, message and place of an error in one line."""
    places: List[traceback.FrameSummary] = traceback.extract_tb(
        error.__traceback__)
    text = ' '.join(str(error).split())[:300]
    where = ''
    if places:
        file = '/'.join(places[-1].filename.split('/')[-3:])
        where = f' ({file}:{places[-1].lineno})'
    return f'{type(error).__name__}: {text}{where}'
