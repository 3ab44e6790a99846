# Copyright (c) mmbasis authors. All rights reserved.
"""What was attached to a layer and goes along when the layer is replaced:
hooks, attributes, and a ``forward`` of the instance's own."""
import copy
import gc
import weakref
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Callable, Dict, Iterable, Iterator, Optional, Tuple

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


def fresh_hooks() -> Dict[str, Any]:
    """Where a module keeps its hooks, for one that has none."""
    return {
        k: v
        for k, v in vars(nn.Module()).items()
        if 'hook' in k and 'state_dict' not in k
    }


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let two modules have the same hooks, in the same dictionaries, so that
    the handles of the hooks stay valid."""
    vars(new).update({k: vars(old)[k] for k in fresh_hooks()})


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Take the hooks of a module away and give them to another one."""
    share_hooks(old, new)
    vars(old).update(fresh_hooks())


def rebound_attributes(old: nn.Module,
                       new: nn.Module,
                       inner: Optional[Callable] = None) -> Dict[str, Any]:
    """Callable attributes of a layer, its own ``forward`` above all, for the
    layer that replaces it, see :class:`_Rebind`.

    Returns:
        dict[str, Any]: The attributes to set, by name.

    Raises:
        CannotRebind: If ``old`` has a ``forward`` of its own that does not
            end in the class's, or that holds on to ``old`` out of reach.
    """
    own = own_attributes(old)
    if 'forward' not in own:
        return {}
    rebind = _Rebind(old, new, inner)
    rebound = {
        k: rebind(v)
        for k, v in own.items() if callable(v) and not isinstance(v, type)
    }
    if not rebind.calls_class:
        raise CannotRebind('it does not call the forward of its class')
    if new is not old:
        _check_independent(rebound.values(), old)
    rebound['forward'] = _OwnForward(rebound['forward'], new)
    return rebound


class observe:
    """Watch what the ``forward`` of a layer's class takes and returns, inside
    of whatever hooks and own ``forward`` change it for others.

    Args:
        module (nn.Module): The layer.
        behind (Callable, optional): ``(module, args, kwargs, output)``, as of
            a forward hook: what it returns, if anything, is the output.
        before (Callable, optional): ``(module, args)``, called before.
    """

    def __init__(self,
                 module: nn.Module,
                 behind: Optional[Callable] = None,
                 before: Optional[Callable] = None) -> None:
        inner = MethodType(type(module).forward, module)

        def forward(*args, **kwargs) -> Any:
            if before is not None:
                before(module, args)
            y = inner(*args, **kwargs)
            changed = behind and behind(module, args, kwargs, y)
            return y if changed is None else changed

        own = own_attributes(module)
        new = dict(forward=forward)
        try:
            rebound_attributes(module, nn.Module())
            new.update(rebound_attributes(module, module, forward))
        except CannotRebind:  # it stays dense, and only costs are of interest
            inner = own['forward']
        self.module, self.names = module, list(new)
        self.old = {k: own[k] for k in new if k in own}
        vars(module).update(new)
        # torch's fast paths of transformers go round layers without hooks
        self.handle = module.register_forward_hook(lambda *_: None)

    def remove(self) -> None:
        """Stop watching; of several observers, the last one first."""
        self.handle.remove()
        for name in self.names:
            del vars(self.module)[name]
        vars(self.module).update(self.old)


def copy_module(module: nn.Module) -> nn.Module:
    """A deep copy in which modules with a ``forward`` of their own run that
    of the copy: a closure, as activation checkpointing makes it, would go on
    running the original.

    Raises:
        CannotRebind: If that is impossible; it names the module.
    """
    clone = copy.deepcopy(module)
    for (name, old), new in zip(module.named_modules(), clone.modules()):
        call = vars(new).get('forward')
        if call is not None and not isinstance(call, _OwnForward):
            try:
                call = _Rebind(old, new)(call)
                _check_independent([call], old)
            except CannotRebind as error:
                raise CannotRebind(
                    f'{name or "the model"} cannot be copied: its forward was '
                    f'replaced on the instance, and {error}') from error
            vars(new)['forward'] = _OwnForward(call, new)
    return clone


class _OwnForward:
    """A ``forward`` bound to a layer. In a copy of the layer it is bound to
    the copy, even if it is a closure, which copying leaves as it is."""

    def __init__(self, call: Any, module: nn.Module) -> None:
        self.call, self.module = call, module

    def __call__(self, *args, **kwargs) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> '_OwnForward':
        module = copy.deepcopy(self.module, memo)
        return _OwnForward(_Rebind(self.module, module)(self.call), module)


class _Rebind:
    """Rebuild a callable with one layer in the place of another, wherever it
    holds that: as the object of a method, in a partial or a closure. ``inner``
    takes the place of the class's ``forward``: by default, that of ``new``."""

    def __init__(self,
                 old: nn.Module,
                 new: nn.Module,
                 inner: Optional[Callable] = None) -> None:
        self.old, self.new = old, new
        self.inner = inner or MethodType(type(new).forward, new)
        #: whether the ``forward`` of the old layer's class was met
        self.calls_class = False
        self._done: Dict[int, Any] = {}

    def __call__(self, value: Any) -> Any:
        if value is self.old:
            return self.new
        if isinstance(value, _OwnForward):
            return self(value.call)
        if isinstance(value, MethodType) and value.__self__ is self.old:
            return self._method(value)
        if id(value) not in self._done:
            self._done[id(value)] = value  # ends circles
            if isinstance(value, partial):
                self._done[id(value)] = self._partial(value)
            elif isinstance(value, FunctionType):
                self._done[id(value)] = self._function(value)
        return self._done[id(value)]

    def _method(self, value: MethodType) -> Callable:
        if value.__func__ is type(self.old).forward:
            self.calls_class = True
            return self.inner
        if type(self.new) is not type(self.old):
            raise CannotRebind(f'it calls {value.__name__}')
        return MethodType(value.__func__, self.new)

    def _partial(self, value: partial) -> partial:
        rebuilt = type(value)(
            self(value.func), *map(self, value.args),
            **self._values(value.keywords))
        vars(rebuilt).update(self._values(vars(value)))
        return rebuilt

    def _function(self, value: FunctionType) -> FunctionType:
        closure = tuple(map(self._cell, value.__closure__ or ()))
        defaults = tuple(map(self, value.__defaults__ or ()))
        keywords = self._values(value.__kwdefaults__ or {})
        attributes = self._values(vars(value))
        if (closure, defaults, keywords, attributes) == (
                value.__closure__ or (), value.__defaults__ or (),
                value.__kwdefaults__ or {}, vars(value)):
            return value  # nothing of the layer in it
        rebuilt = FunctionType(value.__code__, value.__globals__,
                               value.__name__, defaults or None, closure
                               or None)
        rebuilt.__kwdefaults__ = keywords or None
        vars(rebuilt).update(attributes)
        return rebuilt

    def _cell(self, cell: CellType) -> CellType:
        try:
            content = cell.cell_contents
        except ValueError:  # it is empty
            return cell
        rebuilt = self(content)
        return cell if rebuilt is content else CellType(rebuilt)

    def _values(self, items: dict) -> dict:
        return {k: self(v) for k, v in items.items()}


def _check_independent(callables: Iterable[Any], old: nn.Module) -> None:
    """Require that rebuilt callables do not lead to the old layer. Global
    names are followed within one file only: beyond, they lead to
    everything."""
    forbidden = {id(old), *map(id, old.parameters(recurse=False))}
    seen: Dict[Tuple[int, int], Any] = {}
    queue: list = [(x, None) for x in callables]
    while queue:
        value, scope = queue.pop()
        if id(value) in forbidden:
            raise CannotRebind('it reaches the layer, or its weights, by a '
                               'global name or through data')
        key = id(value), id(scope)
        if key not in seen:
            seen[key] = value  # alive, so that ids are unique
            queue.extend(_contents(value, scope))
        if len(seen) > _MOST:
            raise CannotRebind('it holds too much to look through')


def _contents(value: Any,
              scope: Optional[dict]) -> Iterator[Tuple[Any, Optional[dict]]]:
    """What a value leads to, and where global names are looked up there."""
    if isinstance(value, FunctionType):
        for x in (value.__closure__, value.__defaults__, value.__kwdefaults__,
                  vars(value)):
            yield x, scope
        if scope is None or scope is value.__globals__:
            yield value.__code__, value.__globals__
    elif isinstance(value, CodeType):
        for name in value.co_names:
            yield (scope or {}).get(name), scope
        for x in value.co_consts:  # the code of functions inside it
            yield x, scope
    elif isinstance(value, weakref.ref):
        yield value(), scope
    elif not isinstance(value, _OPAQUE):
        for x in gc.get_referents(value):
            yield x, scope
