# Copyright (c) mmbasis authors. All rights reserved.
"""The uncompressed model as teacher."""
from __future__ import annotations

import copy
import os.path as osp
import re
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence
from unittest import mock

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._pytree import tree_map

from .. import compression
from ..compression import Teaching, Term
from ..compression.recalibration import kl_divergence, normalized_mse
from ..layers import BasisLayer, copy_module, kind_of
from ..quirks import DETECTOR_PREFIXES
from ..running import tensors, train_deterministically


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
        self.source: str | None = None
        if teaching.checkpoint is not None:
            self.load(architecture, teaching.checkpoint)

    def take(self, architecture: nn.Module, source: str | None) -> None:
        """Copy a dense model for the teacher; note the file of its weights."""
        self.teacher = copy_module(architecture)
        self.teacher.requires_grad_(False)
        # its outputs must be those of the student in training
        train_deterministically(self.teacher)
        if source is not None and osp.isfile(source):
            source = osp.abspath(source)
        self.source = source

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
        self.take(teacher, path)

    def __deepcopy__(self, memo: dict) -> Distillation:
        """Averaged copies of the model need no teacher of their own."""
        return self

    def losses(self, model: nn.Module, args: Sequence[Any],
               kwargs: Mapping[str, Any],
               forward: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The losses of a student, which ``forward`` computes, times
        ``task_weight``, and those of the terms. The teacher is called with the
        same preprocessed arguments, in mode ``'loss'``.

        Raises:
            RuntimeError: If there is no teacher, or nothing to compare.
        """
        if self.teacher is None:
            raise RuntimeError(
                'distillation has no teacher yet: compress a model with '
                'trained weights, or give the file of the dense ones as '
                'distillation=dict(checkpoint=…)')
        names = {name for found in self.modules for name in found}
        with _capture(self.teacher, names) as targets:
            device = next(model.parameters()).device
            self._teach(device, args, kwargs)
        with _capture(model, names) as outputs:
            losses = {
                # those that count towards the total
                key: tree_map(lambda x: self.task_weight * x, value)
                if 'loss' in key else value
                for key, value in forward().items()
            }
        for term, found in zip(self.terms, self.modules):
            losses[f'loss_distill_{term.module}'] = term.weight * sum(
                _compare(term, name, outputs[name], targets[name])
                for name in found)
        return losses

    def _teach(self, device: torch.device, *call: Any) -> None:
        """Run the teacher the same way through the code as the student:
        detectors return other things in the other modes."""
        assert self.teacher is not None
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        # tensors of inputs, but not of samples, which models may change
        shared = {id(x): x for x in tensors(call)}
        args, kwargs = copy.deepcopy(call, shared)
        # both draw the same queries to denoise
        devices = [device] if device.type == 'cuda' else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            self.teacher(*args, **kwargs)


def _find(module: str, names: Iterable[str]) -> list[str]:
    if module in names:
        return [module]
    found = [name for name in names if re.fullmatch(module, name)]
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


@contextmanager
def _capture(model: nn.Module,
             names: Iterable[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect all tensors that named modules return. Detectors call a head's
    ``forward`` past its hooks, so that itself is wrapped."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name, found in outputs.items():
            module = model.get_submodule(name)
            noting = partial(_noting, module.forward, found)
            stack.enter_context(mock.patch.object(module, 'forward', noting))
        yield outputs


def _noting(forward: Callable, found: list[Tensor], *args: Any,
            **kwargs: Any) -> Any:
    output = forward(*args, **kwargs)
    found.extend(tensors(output))
    return output


def _compare(term: Term, name: str, students: Sequence[Tensor],
             teachers: Sequence[Tensor]) -> Tensor:
    """Mean distance of the outputs that pair: in training, a detector may
    return more than its teacher (queries for denoising, proposals)."""
    pairs = [(s.float(), t.float()) for s, t in zip(students, teachers)
             if s.shape == t.shape and s.is_floating_point()]
    if not pairs:
        raise RuntimeError(
            f'distillation: {name} returns {[x.shape for x in students[:3]]} '
            f'in the model and {[x.shape for x in teachers[:3]]} in the '
            'teacher: nothing to compare')
    distance = normalized_mse if term.type == 'mse' else partial(
        kl_divergence, temperature=term.temperature)
    return torch.stack([distance(s, t) for s, t in pairs]).mean()
