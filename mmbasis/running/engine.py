# Copyright (c) mmbasis authors. All rights reserved.
"""MMEngine's models, in whichever of its modes they know."""
import inspect
import os.path as osp
import re
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ContextManager, Dict, Iterator, List, Optional, Tuple

import torch
import torch.nn as nn
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.runner import set_random_seed
from torch import Tensor

from ..registry import ADAPTERS
from .adapter import (
    Adapter,
    CannotRunError,
    ModuleAdapter,
    UnknownLossError,
    as_logits,
)
from .batch import Batch, bind, leaf, map_tensors, parameters_of, tensors
from .passes import current_pass
from .states import Unchanged, kept_random

_TORCH = osp.dirname(torch.__file__)


@ADAPTERS.register_module()
class MMEngineAdapter(Adapter):
    """Runs MMEngine's models in the modes ``tensor``, ``predict`` and
    ``loss``, or as a plain module where ``forward`` has no mode.

    A model may refuse a mode: by a ``NotImplementedError``, by a
    ``RuntimeError`` or ``ValueError`` that names the mode, or by returning
    None. Then the next way is tried; the one that works is found once and
    remembered. Any other error is the model's and is raised.

    A model without the mode ``predict`` (self-supervised) predicts by
    computing its loss, with the same random numbers each time, and nothing
    that it changes on the way stays changed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        #: the way that works, by purpose
        self._ways: Dict[str, str] = {}
        self._unchanged = Unchanged(model)
        self._has_mode = any(
            x.name == 'mode' or x.kind is inspect.Parameter.VAR_KEYWORD
            for x in parameters_of(model) or [])

    def twin(self, model: nn.Module) -> 'MMEngineAdapter':
        twin = type(self)(model)
        twin._ways.update(self._ways)
        return twin

    @classmethod
    def handles(cls, model: nn.Module) -> bool:
        return isinstance(model, BaseModel) or callable(
            getattr(model, 'test_step', None))

    # ------------------------------------------------------------- batches
    def bind(self, data: Any) -> Batch:
        preprocessor = getattr(self.model, 'data_preprocessor', None)
        if preprocessor is None:
            return super().bind(data)
        if isinstance(preprocessor, BaseDataPreprocessor):
            weight = next(self.model.parameters(), None)
            if weight is not None and preprocessor.device != weight.device:
                # moved past BaseModel.to(), as part of another model
                preprocessor.to(weight.device)
        ready = map_tensors(preprocessor(data, False), self.move)
        if not self._has_mode:
            batch = bind(self.model, ready)
        elif isinstance(ready, dict):
            batch = Batch(data, kwargs=ready)
        elif isinstance(ready, (tuple, list)):
            batch = Batch(data, tuple(ready))
        else:
            batch = Batch(data, (ready, ))
        batch.raw = data
        return batch

    def prepare(self, data: Any, gradients: bool = False) -> Batch:
        """See :meth:`Adapter.prepare`. Only ``inputs`` take gradients, or
        what comes first: the others may be targets."""
        batch = super().prepare(data)
        if not gradients:
            return batch
        args, kwargs = list(batch.args), dict(batch.kwargs)
        if args:
            args[0] = map_tensors(args[0], leaf)
        elif kwargs:
            key = 'inputs' if 'inputs' in kwargs else next(iter(kwargs))
            kwargs[key] = map_tensors(kwargs[key], leaf)
        return Batch(batch.raw, tuple(args), kwargs, batch.rest)

    # ---------------------------------------------------------------- ways
    def predict(self, data: Any) -> Any:
        return self._run('predict', data, ['predict', 'loss', 'tensor'])

    def raw(self, data: Any) -> Any:
        return self._run('outputs', data, ['tensor', 'predict', 'loss'])

    def logits(self, data: Any) -> Optional[Tensor]:
        batch = self.prepare(data)
        logits = as_logits(self.raw(batch))
        if logits is None or not self._has_mode:
            return logits
        if self._ways['outputs'] != 'tensor':
            return None
        # features of a self-supervised model look like logits
        return None if self._lacks_predict(batch) else logits

    def loss(self, data: Any) -> Tensor:
        if not self._has_mode:
            return super().loss(data)
        try:
            losses = self._run('loss', data, ['loss'])
        except CannotRunError as error:
            raise UnknownLossError(
                f'{error}; or set loss_aware=False') from error
        if isinstance(losses, dict):
            parse = getattr(self.model, 'parse_losses',
                            partial(BaseModel.parse_losses, self.model))
            return parse(losses)[0]
        raise UnknownLossError(
            f'{type(self.model).__name__} returns '
            f'{type(losses).__name__} in mode loss, not a dictionary of '
            f'losses: {_advice("loss")}; or set loss_aware=False')

    def _has_own_test_step(self) -> bool:
        step = getattr(self.model, 'test_step', None)
        return step is not None and getattr(
            step, '__func__', step) is not BaseModel.test_step

    def _lacks_predict(self, data: Any) -> bool:
        if 'predict' not in self._ways:
            self.predict(data)
        return self._ways['predict'] in ('loss', 'tensor')

    def _run(self, purpose: str, data: Any, ways: List[str]) -> Any:
        """Run the model in the first way that works."""
        if not self._has_mode:
            ways = ['call']
        if purpose != 'loss' and self._has_own_test_step():
            # instead of the mode predict, which it may not have
            ways.insert(
                ways.index('predict') if self._has_mode else 0, 'test_step')
        if purpose in self._ways:
            return self._in_way(purpose, self._ways[purpose], data)
        failed: List[Tuple[str, str]] = []
        for way in ways:
            try:
                result = self._in_way(purpose, way, data)
            except Exception as error:
                # backbones cannot take the views of a self-supervised model
                if not (_refuses(error, way)
                        or way == 'tensor' and purpose == 'outputs'
                        and self._lacks_predict(data)):
                    raise
                failed.append((way, f'{type(error).__name__}: {error}'))
                continue
            if result is not None:
                self._ways[purpose] = way
                return result
            failed.append((way, 'it returned None'))
        tried = '; '.join(f'{way} ({why})' for way, why in failed)
        raise CannotRunError(f'{type(self.model).__name__} has no way to get '
                             f'at its {purpose}, tried {tried}: '
                             f'{_advice(purpose)}')

    def _in_way(self, purpose: str, way: str, data: Any) -> Any:
        if way == 'test_step':
            raw = data.raw if isinstance(data, Batch) else data
            return self.model.test_step(raw)
        batch = self.prepare(data)
        if way == 'call':
            return self.call(batch)
        if way != 'loss':
            return self.call(batch, mode=way)
        if purpose == 'loss':
            with self._kept(self._ways.get('predict') == 'loss'):
                return self.call(batch, mode=way)
        with self._kept(True), kept_random():
            set_random_seed(0)
            if purpose == 'predict':
                return self.call(batch, mode=way)
            with _children(self.model) as found:
                losses = self.call(batch, mode=way)
            return found or losses

    def _kept(self, parameters: bool) -> ContextManager[None]:
        """Nothing changes; in a pass that stops parameters may, since others
        write weights meanwhile."""
        if torch.jit.is_tracing():
            return nullcontext()  # who traces a model takes care of its state
        return self._unchanged.during(parameters and current_pass() is None)


@contextmanager
def _children(model: nn.Module) -> Iterator[List[Tensor]]:
    """Outputs of a model's parts: all that there is to compare where only the
    loss can be computed."""
    found: List[Tensor] = []
    handles = [
        child.register_forward_hook(
            lambda _, args, output: found.extend(tensors(output)))
        for child in model.children() if any(True for _ in child.parameters())
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _refuses(error: Exception, mode: str) -> bool:
    """Whether an error says that there is no such mode."""
    mode = 'predict' if mode == 'test_step' else mode
    text, trace = str(error), error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is not None and trace.tb_frame.f_code.co_filename.startswith(
            _TORCH):
        return False
    if isinstance(error, NotImplementedError):
        return not text.startswith('Could not run')  # a missing kernel
    return isinstance(error, (RuntimeError, ValueError)) and all(
        re.search(rf'\b{word}\b', text) for word in ('modes?', mode))


def _advice(purpose: str) -> str:
    return ('make forward() accept the mode, or register a subclass of '
            f'mmbasis.running.Adapter with {purpose}() in '
            'mmbasis.registry.ADAPTERS')


# asked last, by everybody
ADAPTERS.register_module(module=ModuleAdapter)
