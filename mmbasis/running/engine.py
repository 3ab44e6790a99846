# Copyright (c) mmbasis authors. All rights reserved.
"""MMEngine's models, in whichever of its modes they know."""
import os.path as osp
import re
from dataclasses import replace
from functools import partial
from traceback import walk_tb
from typing import Any, List, Optional

import torch
import torch.nn as nn
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.runner import set_random_seed
from torch import Tensor

from ..registry import ADAPTERS
from .adapter import Adapter, Batch, UnknownLossError, parameters_of, tensors
from .passes import Unchanged, current_pass, kept_random

_TORCH = osp.dirname(torch.__file__)
#: Ways to try, by what they are to return, the best one first.
_WAYS = dict(
    predict=('test_step', 'predict', 'loss', 'tensor'),
    outputs=('tensor', 'test_step', 'predict', 'loss'),
    loss=('loss', ))


class CannotRunError(RuntimeError):
    """No known way to run a model works."""


@ADAPTERS.register_module()
class MMEngineAdapter(Adapter):
    """Runs MMEngine's models in the modes ``tensor``, ``predict`` and
    ``loss``, by a ``test_step`` of their own, or as a plain module where
    ``forward`` has no mode.

    A model that refuses a mode (see :func:`_refuses`) or returns None is run
    in the next way; the one that works is remembered. A self-supervised model
    predicts by computing its loss, each time with the same random numbers,
    and without a change of its state.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._unchanged = Unchanged(model)
        self._has_mode = any(
            x.name == 'mode' or x.kind is x.VAR_KEYWORD
            for x in parameters_of(model))
        self._possible = {'predict', *['tensor', 'loss'] * self._has_mode}
        step = getattr(model, 'test_step', BaseModel.test_step)
        if getattr(step, '__func__', step) is not BaseModel.test_step:
            self._possible.add('test_step')

    @classmethod
    def handles(cls, model: nn.Module) -> bool:
        return callable(getattr(model, 'test_step', None))

    def bind(self, data: Any) -> Batch:
        preprocessor = getattr(self.model, 'data_preprocessor', None)
        if preprocessor is None:
            return super().bind(data)
        if isinstance(preprocessor, BaseDataPreprocessor):
            # the model may have been moved as a part of another one
            preprocessor.to(self.weight.device)
        ready = preprocessor(data, False)
        if not self._has_mode:
            return replace(super().bind(ready), raw=data)
        if isinstance(ready, dict):
            return Batch(data, kwargs=ready).map(self.move)
        args = ready if isinstance(ready, (tuple, list)) else [ready]
        return Batch(data, tuple(args)).map(self.move)

    def predict(self, data: Any) -> Any:
        return self._run('predict', data)

    def raw(self, data: Any) -> Any:
        return self._run('outputs', data)

    def logits(self, data: Any) -> Optional[Tensor]:
        batch = self.prepare(data)
        logits = super().logits(batch)
        # features of a self-supervised model look like logits
        if logits is not None and self._has_mode and (
                self.ways['outputs'] != 'tensor'
                or self._lacks_predict(batch)):
            return None
        return logits

    def loss(self, data: Any) -> Tensor:
        if not self._has_mode:
            return super().loss(data)
        parse = getattr(self.model, 'parse_losses',
                        partial(BaseModel.parse_losses, self.model))
        return parse(self._run('loss', data))[0]

    def _lacks_predict(self, data: Any) -> bool:
        if 'predict' not in self.ways:
            self.predict(data)
        return self.ways['predict'] in ('loss', 'tensor')

    def _run(self, purpose: str, data: Any) -> Any:
        """Run the model in the first way that works."""
        if purpose in self.ways:
            return self._in_way(purpose, self.ways[purpose], data)
        failed: List[str] = []
        for way in filter(self._possible.__contains__, _WAYS[purpose]):
            try:
                result = self._in_way(purpose, way, data)
                if result is None or purpose == 'loss' and not isinstance(
                        result, dict):
                    raise NotImplementedError(
                        f'it returned {type(result).__name__}')
            except Exception as error:
                # backbones cannot take the views of a self-supervised model
                if not (_refuses(error, way)
                        or way == 'tensor' and purpose == 'outputs'
                        and self._lacks_predict(data)):
                    raise
                failed.append(f'{way} ({type(error).__name__}: {error})')
            else:
                self.ways[purpose] = way
                return result
        is_loss = purpose == 'loss'
        raise (UnknownLossError if is_loss else CannotRunError)(
            f'{type(self.model).__name__} has no way to get at its {purpose}, '
            f'tried {"; ".join(failed)}: make forward() accept the mode, or '
            f'register a subclass of mmbasis.running.Adapter with {purpose}() '
            'in mmbasis.registry.ADAPTERS'
            + '; or set loss_aware=False' * is_loss)

    def _in_way(self, purpose: str, way: str, data: Any) -> Any:
        if way == 'test_step':
            return self.model.test_step(
                data.raw if isinstance(data, Batch) else data)
        mode = dict(mode=way) if self._has_mode else {}
        run = partial(self.call, self.prepare(data), **mode)
        if way != 'loss':
            return run()
        # in a pass that stops, others write weights meanwhile
        whole = current_pass() is None and (
            purpose != 'loss' or self.ways.get('predict') == 'loss')
        with self._unchanged.during(parameters=whole), kept_random() as stack:
            if purpose == 'loss':
                stack.pop_all()  # random numbers go on
                return run()
            set_random_seed(0)
            found: List[Tensor] = []
            if purpose == 'outputs':  # of the parts, rather than losses
                for child in self.model.children():
                    if next(child.parameters(), None) is not None:
                        stack.callback(child.register_forward_hook(
                            lambda _, args, y: found.extend(tensors(y))
                        ).remove)
            losses = run()
            return found or losses


def _refuses(error: Exception, mode: str) -> bool:
    """Whether an error says that there is no such mode."""
    mode = 'predict' if mode == 'test_step' else mode
    text = str(error)
    frame, _ = list(walk_tb(error.__traceback__))[-1]  # where it was raised
    if frame.f_code.co_filename.startswith(_TORCH):
        return False
    if isinstance(error, NotImplementedError):
        return not text.startswith('Could not run')  # a missing kernel
    return isinstance(error, (RuntimeError, ValueError)) and all(
        re.search(rf'\b{word}\b', text) for word in ('modes?', mode))
