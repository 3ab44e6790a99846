# Copyright (c) mmbasis authors. All rights reserved.
"""What was attached to a layer and goes along when the layer is replaced:
hooks, attributes, and a ``forward`` of the instance's own."""
import copy
import gc
import inspect
import weakref
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

import torch.nn as nn
from torch import Tensor

_OPAQUE = (nn.Module, Tensor, ModuleType, type)
#: objects that are looked through before giving up
_MOST = 100000


class CannotRebind(Exception):
    """A callable depends on a layer in a way that cannot be rebound."""


def own_attributes(module: nn.Module) -> Dict[str, Any]:
    """The attributes of an instance that :class:`nn.Module` does not have."""
    plain = vars(nn.Module())
    return {k: v for k, v in vars(module).items() if k not in plain}


def first_argument(module: nn.Module, args: Sequence[Any],
                   kwargs: Mapping[str, Any]) -> Tuple[Any, tuple, dict]:
    """What a layer takes first, given by position or by name, and its other
    arguments."""
    if args:
        return args[0], tuple(args[1:]), dict(kwargs)
    rest = dict(kwargs)
    name = list(inspect.signature(type(module).forward).parameters)[1]
    return rest.pop(name), (), rest


def why_not_inherited(module: nn.Module) -> Optional[str]:
    """Why a replacement could not behave as a layer does; None if it can."""
    if any(value for name, value in vars(module).items()
           if 'state_dict' in name and name.endswith('_hooks')):
        return 'hooks on its state dict speak of its own weights'
    if any(getattr(parameter, name, None)
           for parameter in module.parameters(recurse=False)
           for name in ('_backward_hooks', '_post_accumulate_grad_hooks')):
        return 'hooks on the gradients of its weights speak of their shape'
    for name, value in own_attributes(module).items():
        if (name != 'forward' and callable(value)
                and hasattr(type(module), name)):
            return f'its {name} was replaced on the instance'
    try:
        rebound_attributes(module, nn.Module())
    except CannotRebind as error:
        return f'its forward was replaced on the instance ({error})'
    return None


def share_hooks(old: nn.Module, new: nn.Module) -> Dict[str, Any]:
    """Let modules have the same hooks, in the same dictionaries, so that
    handles stay valid; returns what a module without hooks has."""
    fresh = {
        k: v
        for k, v in vars(nn.Module()).items()
        if 'hook' in k and 'state_dict' not in k
    }
    vars(new).update({k: vars(old)[k] for k in fresh})
    return fresh


def rebound_attributes(old: nn.Module,
                       new: nn.Module,
                       inner: Optional[Callable] = None) -> Dict[str, Any]:
    """Attributes by which a replacement or deep copy ``new`` gets the own
    ``forward`` of ``old``, if any, see :class:`_Rebind`.

    Raises:
        CannotRebind: If that holds on to ``old`` out of reach or, for a
            replacement, does not end in the ``forward`` of the class.
    """
    copied = new is not old and type(new) is type(old)
    own = own_attributes(old)
    if 'forward' not in own:
        return {}
    if copied:  # copying has done the rest
        own = dict(forward=vars(new)['forward'])
    rebind = _Rebind(old, new, inner)
    rebound = {
        k: rebind(v)
        for k, v in own.items() if callable(v) and not isinstance(v, type)
    }
    if not (copied or rebind.calls_class):
        raise CannotRebind('it does not call the forward of its class')
    if new is not old:
        _check_independent(rebound.values(), old)
    return rebound


def copy_module(module: nn.Module) -> nn.Module:
    """A deep copy that runs itself: a ``forward`` that is a closure, as
    activation checkpointing makes it, would go on running the original. If it
    cannot, CannotRebind names the module inside."""
    clone = copy.deepcopy(module)
    for (name, old), new in zip(module.named_modules(), clone.modules()):
        try:
            vars(new).update(rebound_attributes(old, new))
        except CannotRebind as error:
            raise CannotRebind(
                f'{name or "the model"} cannot be copied: its forward was '
                f'replaced on the instance, and {error}') from error
    return clone


class observe:
    """Watch what the ``forward`` of a layer's class takes and returns, inside
    of whatever hooks and own ``forward`` change it for others.

    ``behind(module, args, kwargs, output)`` is called as a forward hook: what
    it returns, if anything, is the output. ``before(module, args)``, if given,
    is called before: what it returns, if anything, are the arguments.
    """

    def __init__(self,
                 module: nn.Module,
                 behind: Optional[Callable] = None,
                 before: Optional[Callable] = None) -> None:
        inner = MethodType(type(module).forward, module)

        def forward(*args, **kwargs) -> Any:
            args = before and before(module, args) or args
            y = inner(*args, **kwargs)
            changed = behind and behind(module, args, kwargs, y)
            return y if changed is None else changed

        own, new = own_attributes(module), dict(forward=forward)
        try:
            new.update(rebound_attributes(module, module, forward))
        except CannotRebind:  # it stays dense, and only costs are of interest
            inner = own['forward']
        self.module, self.old = module, {k: own[k] for k in own if k in new}
        vars(module).update(new)
        # torch's fast paths of transformers go round layers without hooks
        self.handle = module.register_forward_hook(lambda *_: None)

    def remove(self) -> None:
        """Stop watching; of several observers, the last one first."""
        self.handle.remove()
        del vars(self.module)['forward']
        vars(self.module).update(self.old)


class _Rebind:
    """Rebuild a callable with one layer in the place of another, wherever it
    holds that: as the object of a method, in a partial or a closure. ``inner``
    takes the place of the class's ``forward``: by default, that of ``new``."""

    def __init__(self, old: nn.Module, new: nn.Module,
                 inner: Optional[Callable] = None) -> None:
        self.old, self.new = old, new
        self.inner = inner or MethodType(type(new).forward, new)
        self.calls_class = False  # the ``forward`` of the old layer's class
        self._done: Dict[int, Any] = {id(old): new}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, MethodType) and value.__self__ is self.old:
            if value.__func__ is type(self.old).forward:
                self.calls_class = True
                return self.inner
            if type(self.new) is not type(self.old):
                raise CannotRebind(f'it calls {value.__name__}')
            return MethodType(value.__func__, self.new)
        if id(value) not in self._done:
            self._done[id(value)] = value  # ends circles
            if isinstance(value, partial):
                rebuilt = type(value)(
                    self(value.func), *map(self, value.args),
                    **self._values(value.keywords))
                vars(rebuilt).update(self._values(vars(value)))
                self._done[id(value)] = rebuilt
            elif isinstance(value, FunctionType):
                self._done[id(value)] = self._function(value)
            elif isinstance(value, CellType):
                for content in gc.get_referents(value):  # one, or it is empty
                    if self(content) is not content:
                        self._done[id(value)] = CellType(self(content))
        return self._done[id(value)]

    def _function(self, value: FunctionType) -> FunctionType:
        parts = (value.__closure__ or (), value.__defaults__ or (),
                 value.__kwdefaults__ or {}, vars(value))
        closure, defaults = (tuple(map(self, x)) for x in parts[:2])
        keywords, attributes = map(self._values, parts[2:])
        if (closure, defaults, keywords, attributes) == parts:
            return value  # nothing of the layer in it
        rebuilt = FunctionType(value.__code__, value.__globals__,
                               value.__name__, defaults, closure)
        rebuilt.__kwdefaults__ = keywords
        vars(rebuilt).update(attributes)
        return rebuilt

    def _values(self, items: dict) -> dict:
        return {k: self(v) for k, v in items.items()}


def _check_independent(callables: Iterable[Any], old: nn.Module) -> None:
    """Require that rebuilt callables do not lead to the old layer. Global
    names are followed within one file only: beyond, they lead to
    everything."""
    forbidden = {id(old), *map(id, old.parameters(recurse=False))}
    seen: Dict[Tuple[int, int], Any] = {}  # alive, so that ids are unique
    queue: list = [(x, None) for x in callables]
    while queue:
        value, scope = queue.pop()
        if id(value) in forbidden:
            raise CannotRebind('it reaches the layer, or its weights, by a '
                               'global name or through data')
        if len(seen) > _MOST:
            raise CannotRebind('it holds too much to look through')
        key = id(value), id(scope)
        if key in seen or isinstance(value, _OPAQUE):
            continue
        seen[key] = value
        inside = gc.get_referents(value)
        if isinstance(value, FunctionType):
            inside = [value.__closure__, value.__defaults__,
                      value.__kwdefaults__, vars(value)]
            if scope is None or scope is value.__globals__:
                queue.append((value.__code__, value.__globals__))
        elif isinstance(value, CodeType):  # also that of functions inside it
            inside = [*map((scope or {}).get, value.co_names),
                      *value.co_consts]
        elif isinstance(value, weakref.ref):
            inside = [value()]
        queue += [(x, scope) for x in inside]
