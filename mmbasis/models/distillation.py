# Copyright (c) mmbasis authors. All rights reserved.
"""The uncompressed model as teacher."""
from __future__ import annotations

import copy
import operator
from collections import Counter
from functools import partial, reduce
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import compression
from ..compat import autocast_dtype
from ..compression import Teaching, Term
from ..compression.recalibration import kl_divergence, normalized_mse
from ..layers import BasisLayer, copy_module, kind_of
from ..quirks import DETECTOR_PREFIXES
from ..running import tensors, train_deterministically
from ..utils import find_weights
from ..utils.schema import matching


class Distillation:
    """Losses that pull a model's inner outputs towards those of its dense
    self. No module: nothing of it is saved, trained or counted.

    By default the logits of a classifier are compared, otherwise the outputs
    of a detector's neck and heads, otherwise those of the backbone. A term
    whose module is a regular expression is the sum over all that it matches.

    Args:
        architecture (nn.Module): The model; it need not be dense.
        teaching (Teaching, optional): What is compared, and the weights of
            the teacher where they are not given later, by :meth:`take` or
            :meth:`load`. Defaults to what suits the model.

    Raises:
        ValueError: If a term names no module of the model, or if there is no
            default for it.
    """

    def __init__(self,
                 architecture: nn.Module,
                 teaching: Teaching | None = None) -> None:
        teaching = teaching or Teaching()
        names = dict(architecture.named_modules(remove_duplicate=False))
        self.terms: Sequence[Term] = _default_terms(
            names) if teaching.terms is None else teaching.terms
        #: names of the modules that each term compares
        self.modules = [_find(term.module, names) for term in self.terms]
        logits = any(term.type == 'kl' for term in self.terms)
        default = .3 if logits else 1.
        self.task_weight = (
            default if teaching.task_weight is None else teaching.task_weight)
        #: the dense model, None until it is known
        self.teacher: nn.Module | None = None
        #: the file that its weights are in, for resuming
        self.source: compression.TeacherFile | None = None
        #: how it is run, see :meth:`_adapt`
        self._adapted: tuple[torch.device, torch.dtype | None] | None = None
        self._full: list[tuple[nn.Parameter, Tensor]] = []
        self._recorders: dict[str, Recorder] = {}
        if teaching.checkpoint is not None:
            self.load(architecture, teaching.checkpoint)

    def take(self, architecture: nn.Module, source: str | None) -> None:
        """Copy a dense model for the teacher; note the file of its weights."""
        self.teacher = copy_module(architecture)
        self.teacher.requires_grad_(False)
        # its outputs must be those of the student in training
        train_deterministically(self.teacher)
        self._adapted, self._full = None, []
        self.source = (
            None if source is None else compression.TeacherFile.of(source))

    def load(self, architecture: nn.Module, path: str) -> None:
        """Build the teacher from a model, dense or compressed, and a file; a
        RuntimeError is raised if its weights do not fit."""
        checkpoint = compression.read_checkpoint(path)
        teacher = compression.surgery.densified(architecture)
        for name, module in teacher.named_modules():
            # compression gives biases that the dense layer may not have
            if getattr(module, 'bias', None) is not None and (
                    f'{name}.bias' not in checkpoint['state_dict']
                    and f'{name}.weight' in checkpoint['state_dict']):
                module.bias = None
        compression.load_weights(teacher, checkpoint, path)
        self.take(teacher, find_weights(path))

    def __deepcopy__(self, memo: dict) -> Distillation:
        """Averaged copies of the model need no teacher of their own."""
        return self

    # what changes from step to step stays out of what is compiled
    @torch.compiler.disable(recursive=False)
    def losses(self, student: nn.Module, args: tuple[Any, ...],
               kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The losses of a student, times ``task_weight``, and those of the
        terms.

        Args:
            student (nn.Module): The model, or its compressed self.
            args (tuple): What it is called with, as is the teacher, in mode
                ``'loss'``.
            kwargs (Mapping): The same by keyword.

        Raises:
            RuntimeError: If there is no teacher, or nothing to compare.
        """
        if self.teacher is None:
            raise RuntimeError(
                'distillation has no teacher yet: compress a model with '
                'trained weights, or give the file of the dense ones as '
                'distillation=dict(checkpoint=…)')
        self._adapt(next(student.parameters()).device)
        targets = self._teach(args, kwargs)
        with self._recording(student, 'student') as outputs:
            losses = {
                # those that count towards the total
                key: tree_map(partial(operator.mul, self.task_weight), value)
                if 'loss' in key else value
                for key, value in student(*args, **kwargs).items()
            }
        pairs = [[_pairs(name, outputs[name], targets[name])
                  for name in found] for found in self.modules]
        values = _distances(self.terms, pairs)
        for term, value in zip(self.terms, values):
            losses[f'loss_distill_{term.module}'] = value
        return losses

    def _recording(self, model: nn.Module, role: str) -> Recorder:
        """What records the compared modules: the same in every step, or else
        compiled models would be compiled again."""
        modules = {name: model.get_submodule(name)
                   for found in self.modules for name in found}
        recorder = self._recorders.get(role)
        if recorder is None or not recorder.fits(modules):
            recorder = self._recorders[role] = Recorder(modules)
        return recorder

    @torch.compiler.disable(recursive=False)
    def _teach(self, args: tuple[Any, ...],
               kwargs: Mapping[str, Any]) -> dict[str, list[Any]]:
        """What the teacher's modules return. It goes the same way through the
        code as the student: detectors return other things in other modes."""
        assert self.teacher is not None
        # tensors of inputs, but not of samples, which models may change
        shared = {id(x): x for x in tensors([args, kwargs])}
        args, kwargs = copy.deepcopy((args, kwargs), shared)
        device = next(self.teacher.parameters()).device
        # both draw the same queries to denoise
        devices = [device] if device.type == 'cuda' else []
        with torch.no_grad(), torch.random.fork_rng(devices), self._recording(
                self.teacher, 'teacher') as outputs:
            self.teacher(*args, **kwargs)
            return {name: [*found] for name, found in outputs.items()}

    @torch.compiler.disable
    def _adapt(self, device: torch.device) -> None:
        """Have the teacher where the student is, and its weights in the type
        that autocast would convert them to in every step: it remembers
        only weights that are trained."""
        dtype = autocast_dtype(device.type)
        if self._adapted == (device, dtype):
            return
        assert self.teacher is not None
        for weight, full in self._full:
            weight.data = full
        self.teacher.to(device)
        self._full = []
        for weight in _cast_weights(self.teacher) if dtype else ():
            self._full.append((weight, weight.data))
            weight.data = weight.data.to(dtype)
        self._adapted = device, dtype


class Recorder:
    """Records what modules return, while it is entered, which gives the
    outputs by name. Detectors call a head's ``forward`` past its hooks, so
    that itself is replaced.

    Args:
        modules (dict[str, nn.Module]): The modules by name.
    """

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self._modules = modules
        # a module may have several names, and a forward of its own
        self._own = {x: vars(x).get('forward') for x in modules.values()}
        self._outputs: dict[nn.Module, list[Any]] = {x: [] for x in self._own}
        self._forwards = {x: _noting(x.forward, self._outputs[x])
                          for x in self._own}

    def fits(self, modules: dict[str, nn.Module]) -> bool:
        """Whether it is of these modules as they are."""
        return self._modules == modules and all(
            vars(x).get('forward') is own for x, own in self._own.items())

    def __enter__(self) -> dict[str, list[Any]]:
        for module, forward in self._forwards.items():
            self._outputs[module].clear()
            vars(module)['forward'] = forward
        return {k: self._outputs[x] for k, x in self._modules.items()}

    def __exit__(self, *error: Any) -> None:
        for module, own in self._own.items():
            del vars(module)['forward']
            if own is not None:
                vars(module)['forward'] = own


def _noting(forward: Callable, outputs: list[Any]) -> Callable:
    # a plain function that only appends: one that is compiled, too

    def note(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        outputs.append(output)
        return output

    return note


def _cast_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of plain layers, that only they read."""
    uses = Counter(id(parameter) for module in model.modules()
                   for parameter in module._parameters.values())
    return [
        parameter for module in model.modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
        and kind_of(module) for parameter in module.parameters(recurse=False)
        if uses[id(parameter)] == 1
    ]


def _find(module: str, names: Iterable[str]) -> list[str]:
    if module in names:
        return [module]
    found = matching(module, names, 'a term of distillation: module')
    if not found:
        raise ValueError(f'distillation: the model has no module {module!r}, '
                         'nor does it match a name as a regular expression')
    return found


def _default_terms(names: dict[str, nn.Module]) -> list[Term]:
    logits = _logit_layers(names)
    if logits:
        return [Term(x, 'kl', .7 / len(logits)) for x in logits]
    for prefix in DETECTOR_PREFIXES:
        # not the proposals that Sparse R-CNN has instead of an RPN
        found = [
            prefix + x for x in ('neck', 'bbox_head', 'rpn_head')
            if prefix + x in names and any(
                isinstance(module, BasisLayer) or kind_of(module)
                for module in names[prefix + x].modules())
        ] or [x for x in names if x == prefix + 'backbone']
        if found:
            return [Term(name, 'mse') for name in found]
    raise ValueError('distillation: the model has no head.fc, neck, bbox_head '
                     'or backbone, say what to compare by '
                     'terms=[dict(module=…)]')


def _logit_layers(names: dict[str, nn.Module]) -> list[str]:
    if 'head.fc' in names:
        return ['head.fc']
    classes = getattr(names.get('head'), 'num_classes', None)
    return [
        name for name, module in names.items()
        if name.startswith('head.')
        and getattr(module, 'out_features', 0) == classes
        # not the coefficients, which are as wide as their basis layer
        and not isinstance(names[name.rpartition('.')[0]], BasisLayer)
    ]


@torch.compiler.disable
def _pairs(name: str, students: Any,
           teachers: Any) -> list[tuple[Tensor, Tensor]]:
    """The outputs that pair: in training, a detector may return more than
    its teacher (queries for denoising, proposals)."""
    found, wanted = list(tensors(students)), list(tensors(teachers))
    pairs = [(s, t) for s, t in zip(found, wanted)
             if s.shape == t.shape and s.is_floating_point()]
    if not pairs:
        raise RuntimeError(
            f'distillation: {name} returns {[x.shape for x in found[:3]]} '
            f'in the model and {[x.shape for x in wanted[:3]]} in the '
            'teacher: nothing to compare')
    return pairs


def _distances(
        terms: Sequence[Term],
        pairs: list[list[list[tuple[Tensor, Tensor]]]]) -> list[Tensor]:
    """Per term the sum, over its modules, of the mean distance of pairs."""
    values = []
    for term, modules in zip(terms, pairs):
        means = [
            reduce(torch.add, [_distance(term, s.float(), t.float())
                               for s, t in found]) / len(found)
            for found in modules
        ]
        values.append(term.weight * reduce(torch.add, means))
    return values


def _distance(term: Term, student: Tensor, teacher: Tensor) -> Tensor:
    if term.type == 'mse':
        return normalized_mse(student, teacher)
    return kl_divergence(student, teacher, term.temperature)
