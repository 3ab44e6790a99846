# Copyright (c) mmbasis authors. All rights reserved.
"""The uncompressed model as teacher."""
import copy
import functools
import os.path as osp
import re
from contextlib import ExitStack
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

import torch
import torch.nn as nn
from mmengine.model import BaseModel
from torch import Tensor

from ..compression import densified, load_weights, read_checkpoint
from ..layers import BasisLayer, basis_layer_type
from ..running import tensors, train_deterministically
from ..utils.divergence import kl_divergence, normalized_mse


class Distillation:
    """Losses that pull a model's inner outputs towards those of its dense
    self. No module: nothing of it is saved, trained or counted.

    Args:
        architecture (BaseModel): The model; it need not be dense.
        checkpoint (str, optional): Weights of the teacher. By default it is
            given later, by :meth:`take` or :meth:`load`.
        terms (Sequence[dict], optional): What is compared: ``module`` (its
            name in the model, or a regular expression that matches whole
            names: a term for each of these, logged as their sum), ``type``
            (``'kl'`` for logits, ``'mse'`` for features and maps, each
            channel in units of its variance), ``weight`` and, for ``'kl'``,
            ``temperature``. Defaults to the logits of a classifier,
            the outputs of a detector's neck, dense head and
            region proposals, otherwise to those of the backbone.
        task_weight (float, optional): Factor of the model's own losses.
            Defaults to 0.3 where logits are compared, otherwise to 1.

    Raises:
        ValueError: If a term is malformed or names no module of the model, or
            if there is no default for it.
    """

    def __init__(self,
                 architecture: BaseModel,
                 checkpoint: Optional[str] = None,
                 terms: Optional[Sequence[dict]] = None,
                 task_weight: Optional[float] = None) -> None:
        names = dict(architecture.named_modules(remove_duplicate=False))
        self.terms = [
            _check_term(term)
            for term in (_default_terms(names) if terms is None else terms)
        ]
        #: names of the modules that each term compares
        self.modules = [_find(term['module'], names) for term in self.terms]
        if task_weight is None:
            logits = any(term['type'] == 'kl' for term in self.terms)
            task_weight = .3 if logits else 1.
        self.task_weight = task_weight
        #: the dense model, None until it is known
        self.teacher: Optional[nn.Module] = None
        #: the file that its weights are in, for resuming
        self.source: Optional[str] = None
        if checkpoint is not None:
            self.load(architecture, checkpoint)

    def take(self, architecture: nn.Module, source: Optional[str]) -> None:
        """Take a copy of a dense model, as it is, for the teacher.

        Args:
            architecture (nn.Module): The dense model with its weights.
            source (str, optional): The file that they came from.
        """
        self.teacher = copy.deepcopy(architecture)
        self.teacher.requires_grad_(False)
        # what it puts out must be what the student does in training
        train_deterministically(self.teacher)
        if source is not None and osp.isfile(source):
            source = osp.abspath(source)
        self.source = source

    def load(self, architecture: nn.Module, path: str) -> None:
        """Build the teacher from a model, dense or compressed, and a file.

        Raises:
            RuntimeError: If the weights do not fit.
        """
        checkpoint = read_checkpoint(path)
        teacher = densified(architecture)
        for name, module in teacher.named_modules():
            # compression gives biases that the dense layer may not have
            if getattr(module, 'bias', None) is not None and (
                    f'{name}.bias' not in checkpoint['state_dict']
                    and f'{name}.weight' in checkpoint['state_dict']):
                module.bias = None
        load_weights(teacher, checkpoint, path)
        self.take(teacher, path)

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
        if self.teacher is None:
            raise RuntimeError(
                'distillation has no teacher yet: compress a model with '
                'trained weights, or give the file of the dense ones as '
                'distillation=dict(checkpoint=…)')
        device = next(model.parameters()).device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        names = {name for found in self.modules for name in found}
        # both draw the same queries to denoise (DINO)
        devices = [device] if device.type == 'cuda' else []
        with torch.no_grad(), torch.random.fork_rng(devices), _capture(
                self.teacher, names) as targets:
            # the same way through the code as the student takes: detectors
            # put out other things in the other modes
            self.teacher(inputs, copy.deepcopy(data_samples), mode='loss')
        with _capture(model, names) as outputs:
            losses = _scaled(forward(), self.task_weight)
        for term, found in zip(self.terms, self.modules):
            losses[f'loss_distill_{term["module"]}'] = term['weight'] * sum(
                _compare(term, name, outputs[name], targets[name])
                for name in found)
        return losses


def _check_term(term: dict) -> dict:
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
    return term


def _find(module: str, names: Dict[str, nn.Module]) -> List[str]:
    if module in names:
        return [module]
    found = [name for name in names if re.fullmatch(module, name)]
    if not found:
        raise ValueError(f'distillation: the model has no module {module!r}, '
                         'nor does it match a name as a regular expression')
    return found


def _default_terms(names: Dict[str, nn.Module]) -> List[dict]:
    logits = _logit_layers(names)
    if logits:
        weight = .7 / len(logits)
        return [dict(module=x, type='kl', weight=weight) for x in logits]
    for prefix in ('', 'detector.'):  # of a tracker
        # not the proposals that Sparse R-CNN has instead of an RPN
        found = [
            prefix + x for x in ('neck', 'bbox_head', 'rpn_head')
            if prefix + x in names and _has_layers(names[prefix + x])
        ]
        if not found and prefix + 'backbone' in names:
            found = [prefix + 'backbone']
        if found:
            break
    if not found:
        raise ValueError('distillation: the model has no head.fc, neck, '
                         'bbox_head or backbone, say what to compare by '
                         'terms=[dict(module=…)]')
    return [dict(module=name, type='mse') for name in found]


def _has_layers(module: nn.Module) -> bool:
    return any(
        isinstance(x, BasisLayer) or basis_layer_type(x)
        for x in module.modules())


def _logit_layers(names: Dict[str, nn.Module]) -> List[str]:
    """The layers that put out a classifier's logits: its ``head.fc``, or those
    of its head that are as wide as there are classes."""
    if 'head.fc' in names:
        return ['head.fc']
    found: List[str] = []
    classes = getattr(names.get('head'), 'num_classes', None)
    for name, module in names.items():
        if (classes is not None and name.startswith('head.')
                and getattr(module, 'out_features', None) == classes):
            # not the coefficients, which are as wide as their basis layer
            if not isinstance(names[name.rpartition('.')[0]], BasisLayer):
                found.append(name)
    return found


class _capture(ExitStack):
    """Collect the outputs of named modules: a list of tensors for each, over
    calls and, where a module puts out several, over these.

    Detectors call the ``forward`` of a head directly, past its hooks: so
    ``forward`` itself is wrapped.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.outputs: Dict[str, List[Tensor]] = {name: [] for name in names}
        for name in names:
            module = model.get_submodule(name)
            module.forward = _noting(module.forward, self.outputs[name])
            self.callback(delattr, module, 'forward')

    def __enter__(self) -> Dict[str, List[Tensor]]:
        return self.outputs


def _noting(forward: Callable, found: List[Tensor]) -> Callable:

    @functools.wraps(forward)
    def noting(*args, **kwargs):
        output = forward(*args, **kwargs)
        found.extend(tensors(output))
        return output

    return noting


def _compare(term: dict, name: str, students: Sequence[Tensor],
             teachers: Sequence[Tensor]) -> Tensor:
    """Mean distance of the outputs that pair: a detector in training may put
    out more than its teacher (queries for denoising, proposals)."""
    pairs = [(s.float(), t.float()) for s, t in zip(students, teachers)
             if s.shape == t.shape and s.is_floating_point()]
    if not pairs:
        shapes = [[tuple(x.shape) for x in y[:3]]
                  for y in (students, teachers)]
        raise RuntimeError(
            f'distillation: {name} puts out {shapes[0]} in the '
            f'model and {shapes[1]} in the teacher: nothing to compare')
    if term['type'] == 'kl':
        losses = [kl_divergence(s, t, term['temperature']) for s, t in pairs]
    else:
        losses = [normalized_mse(s, t) for s, t in pairs]
    return sum(losses) / len(losses)


def _scaled(losses: Dict[str, Any], factor: float) -> Dict[str, Any]:
    """Scale what counts towards the total: entries named ``loss``."""

    def scale(key: str, value: Any) -> Any:
        if 'loss' not in key:
            return value
        if isinstance(value, (tuple, list)):
            return [factor * x for x in value]
        return factor * value

    return {key: scale(key, value) for key, value in losses.items()}
