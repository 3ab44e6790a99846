# Copyright (c) mmbasis authors. All rights reserved.
"""The uncompressed model as teacher."""
import copy
from contextlib import ExitStack
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.model import BaseModel
from torch import Tensor

from ..compression import get_plan, load_weights, read_checkpoint
from ..utils.divergence import kl_divergence, normalized_mse


class Distillation:
    """Losses that pull a model's inner outputs towards those of its dense
    self. No module: nothing of it is saved, trained or counted.

    Args:
        architecture (BaseModel): The dense model; it is copied.
        checkpoint (str): Weights of the teacher.
        terms (Sequence[dict], optional): What is compared: ``module`` (its
            name in the model), ``type`` (``'kl'`` for logits, ``'mse'`` for
            features), ``weight`` and, for ``'kl'``, ``temperature``. Defaults
            to the logits where the model has ``head.fc``, otherwise to the
            features of its neck or backbone.
        task_weight (float): Factor of the model's own losses. Defaults to
            0.3.

    Raises:
        ValueError: If a term is malformed or names no module of the model, or
            if the model is compressed already.
    """

    def __init__(self,
                 architecture: BaseModel,
                 checkpoint: str,
                 terms: Optional[Sequence[dict]] = None,
                 task_weight: float = 0.3) -> None:
        if get_plan(architecture) is not None:
            raise ValueError('distillation needs the dense model as teacher: '
                             'use the dense config with BasisCompressionHook, '
                             'not compressed.py')
        self.teacher = copy.deepcopy(architecture)
        load_weights(self.teacher, read_checkpoint(checkpoint), checkpoint)
        self.teacher.requires_grad_(False).eval()
        self.task_weight = task_weight
        names = dict(architecture.named_modules())
        self.terms = [
            _check_term(term, names)
            for term in (_default_terms(names) if terms is None else terms)
        ]

    def __deepcopy__(self, memo: dict) -> 'Distillation':
        """Averaged copies of the model need no teacher of their own."""
        return self

    def losses(self, model: nn.Module, inputs: Any,
               forward: Callable[[], Dict[str, Any]],
               data_samples: Any) -> Dict[str, Any]:
        """The model's losses, and those of distillation.

        Args:
            model (nn.Module): The student.
            inputs (Any): Preprocessed inputs.
            forward (Callable): Computes the model's own losses.
            data_samples (Any): As the model takes them.

        Returns:
            dict: Own losses times ``task_weight``, and ``loss_distill_<name>``
            for each term.
        """
        device = next(model.parameters()).device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        names = [term['module'] for term in self.terms]
        with torch.no_grad(), _capture(self.teacher, names) as targets:
            self.teacher(inputs, data_samples, mode='tensor')
        with _capture(model, names) as outputs:
            losses = _scaled(forward(), self.task_weight)
        for term in self.terms:
            pairs = list(zip(outputs[term['module']], targets[term['module']]))
            losses[f'loss_distill_{term["module"]}'] = term['weight'] * sum(
                _compare(term, s, t) for s, t in pairs) / len(pairs)
        return losses


def _check_term(term: dict, names: Dict[str, nn.Module]) -> dict:
    term = dict(dict(weight=1.), **term)
    if term.get('type') == 'kl':
        term.setdefault('temperature', 4.)
    allowed = {'module', 'type', 'weight'}
    if term.get('type') == 'kl':
        allowed.add('temperature')
    if term.get('type') not in ('kl', 'mse') or set(term) != allowed:
        raise ValueError("a term of distillation is dict(module=…, type='kl' "
                         "or 'mse', weight=…), with 'kl' also temperature, "
                         f'but got {term}')
    if term['module'] not in names:
        raise ValueError(f'distillation: the model has no module '
                         f'{term["module"]!r}')
    return term


def _default_terms(names: Dict[str, nn.Module]) -> List[dict]:
    if 'head.fc' in names:
        return [dict(module='head.fc', type='kl', weight=.7)]
    for name in ('neck', 'backbone'):
        if name in names:
            return [dict(module=name, type='mse')]
    raise ValueError('distillation: the model has no head.fc, neck or '
                     'backbone, say what to compare by terms=[dict(module=…)]')


class _capture(ExitStack):
    """Collect the outputs of named modules: a list of tensors for each, over
    calls and, where a module puts out several, over these."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.outputs: Dict[str, List[Tensor]] = {name: [] for name in names}
        for name in names:

            def hook(module, args, output, found=self.outputs[name]):
                found.extend(_tensors(output))

            handle = model.get_submodule(name).register_forward_hook(hook)
            self.callback(handle.remove)

    def __enter__(self) -> Dict[str, List[Tensor]]:
        return self.outputs


def _tensors(output: Any) -> List[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, (tuple, list)):
        return [x for item in output for x in _tensors(item)]
    return []


def _compare(term: dict, student: Tensor, teacher: Tensor) -> Tensor:
    if student.shape != teacher.shape:
        raise RuntimeError(
            f'distillation: {term["module"]} puts out {tuple(student.shape)} '
            f'in the model and {tuple(teacher.shape)} in the teacher')
    student, teacher = student.float(), teacher.float()
    if term['type'] == 'kl':
        return kl_divergence(student, teacher, term['temperature'])
    return normalized_mse(student, teacher)


def _scaled(losses: Dict[str, Any], factor: float) -> Dict[str, Any]:
    """Scale what counts towards the total: entries named ``loss``."""

    def scale(key: str, value: Any) -> Any:
        if 'loss' not in key:
            return value
        if isinstance(value, (tuple, list)):
            return [factor * x for x in value]
        return factor * value

    return {key: scale(key, value) for key, value in losses.items()}
