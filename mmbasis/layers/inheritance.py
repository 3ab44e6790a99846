# Copyright (c) mmbasis authors. All rights reserved.
"""What was attached to a layer and goes along when the layer is replaced:
hooks, attributes, and a ``forward`` of the instance's own."""
import copy
import gc
import weakref
from functools import partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch.nn as nn
from torch import Tensor

_HOOKS = ('_forward_hooks', '_forward_hooks_with_kwargs',
          '_forward_hooks_always_called', '_forward_pre_hooks',
          '_forward_pre_hooks_with_kwargs', '_backward_hooks',
          '_backward_pre_hooks', '_is_full_backward_hook')
_STATE_HOOKS = ('_state_dict_hooks', '_state_dict_pre_hooks',
                '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks')
_OPAQUE = (nn.Module, Tensor, ModuleType, type)
#: objects that are looked through before giving up
_MOST = 100000


class CannotRebind(Exception):
    """A callable depends on a layer in a way that cannot be rebound."""


def own_attributes(module: nn.Module) -> Dict[str, Any]:
    """The attributes of an instance that :class:`nn.Module` does not have."""
    plain = vars(nn.Module())
    return {k: v for k, v in vars(module).items() if k not in plain}


def is_own_method(module: nn.Module, name: str, value: Any) -> bool:
    """Whether an attribute replaces or keeps a method of its instance."""
    return callable(value) and (hasattr(type(module), name) or getattr(
        value, '__self__', None) is module)


def why_not_inherited(module: nn.Module) -> Optional[str]:
    """Why a replacement could not behave as a layer does; None if it can."""
    if any(vars(module).get(name) for name in _STATE_HOOKS):
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
        rebound_attributes(module, module)
    except CannotRebind as error:
        return f'its forward was replaced on the instance ({error})'
    return None


def fresh_hooks() -> Dict[str, Any]:
    """Where a module keeps its hooks, for one that has none."""
    new = vars(nn.Module())
    return {k: new[k] for k in _HOOKS if k in new}


def share_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module the hooks of another one. Both hold the same dictionaries
    afterwards, so that the handles of the hooks stay valid."""
    vars(new).update({k: vars(old)[k] for k in _HOOKS if k in vars(old)})


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Take the hooks of a module away and give them to another one."""
    share_hooks(old, new)
    vars(old).update(fresh_hooks())


def inner_modules(old: nn.Module,
                  new: nn.Module) -> Iterator[Tuple[nn.Module, nn.Module]]:
    """Pairs of the modules inside two modules (an offset branch)."""
    for name, module in old.named_modules():
        if name:
            yield module, new.get_submodule(name)


def rebound_attributes(old: nn.Module,
                       new: nn.Module,
                       inner: Optional[Callable] = None) -> Dict[str, Any]:
    """Callable attributes of a layer, its own ``forward`` above all, for the
    layer that replaces it.

    Args:
        old (nn.Module): The layer to replace.
        new (nn.Module): Its replacement.
        inner (Callable, optional): What takes the place of the ``forward`` of
            the class. Defaults to that of the class of ``new``.

    Returns:
        dict[str, Any]: The attributes to set, by name: those that depended on
        ``old`` depend on ``new`` instead.

    Raises:
        CannotRebind: If ``old`` has a ``forward`` of its own that does not
            end in the class's, or that holds on to ``old`` out of reach.
    """
    own = own_attributes(old)
    if 'forward' not in own:
        return {}
    rebind = _Rebind(old, new, inner=inner)
    rebound = {k: rebind(v) for k, v in own.items() if callable(v)}
    if not rebind.calls_class:
        raise CannotRebind('it does not call the forward of its class')
    rebound['forward'] = _OwnForward(rebound['forward'], new)
    return {k: v for k, v in rebound.items() if v is not own[k]}


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

        self.module, self.before = module, own_attributes(module)
        try:
            new = rebound_attributes(module, module, forward)
        except CannotRebind:  # it stays dense, and only costs are of interest
            new, inner = {}, self.before['forward']
        self.names = set(new) | {'forward'}
        vars(module).update(new or dict(forward=forward))
        # torch's fast paths of transformers go round layers without hooks
        self.handle = module.register_forward_hook(lambda *_: None)

    def remove(self) -> None:
        """Stop watching; of several observers, the last one first."""
        self.handle.remove()
        for name in self.names:
            del vars(self.module)[name]
            if name in self.before:
                vars(self.module)[name] = self.before[name]


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
                call = _Rebind(old, new, copying=True)(call)
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
        rebind = _Rebind(self.module, module, copying=True)
        return _OwnForward(rebind(self.call), module)


class _Rebind:
    """Rebuild a callable with one layer in the place of another, wherever it
    holds that: as the object of a method, in a partial or a closure.

    Args:
        old (nn.Module): The layer that is replaced.
        new (nn.Module): Its replacement.
        copying (bool): Whether that is a copy, which has all methods of the
            old layer and not only ``forward``. Defaults to False.
        inner (Callable, optional): See :func:`rebound_attributes`.
    """

    def __init__(self,
                 old: nn.Module,
                 new: nn.Module,
                 copying: bool = False,
                 inner: Optional[Callable] = None) -> None:
        self.old, self.new, self.copying = old, new, copying
        self.inner = inner or MethodType(type(new).forward, new)
        #: whether the ``forward`` of the old layer's class was met
        self.calls_class = False
        self._done: Dict[int, Any] = {}
        self._seen: Dict[Tuple[int, int], Any] = {}

    def __call__(self, value: Any) -> Any:
        if value is self.old:
            return self.new
        if isinstance(value, _OwnForward):
            return self(value.call)
        if isinstance(value, MethodType) and value.__self__ is self.old:
            if self.copying:
                return MethodType(value.__func__, self.new)
            if value.__func__ is not type(self.old).forward:
                raise CannotRebind(f'it calls {value.__name__}')
            self.calls_class = True
            return self.inner
        if id(value) not in self._done:
            if isinstance(value, partial):
                self._partial(value)
            elif isinstance(value, FunctionType):
                self._function(value)
            else:
                self._refuse(value)
                self._done[id(value)] = value
        return self._done[id(value)]

    def _partial(self, value: partial) -> None:
        self._done[id(value)] = value  # ends circles
        rebuilt = type(value)(
            self(value.func), *map(self, value.args),
            **self._values(value.keywords))
        vars(rebuilt).update(self._values(vars(value)))
        self._done[id(value)] = rebuilt

    def _function(self, value: FunctionType) -> None:
        for name in _global_names(value.__code__):
            self._refuse(value.__globals__.get(name), value.__globals__)
        cells = [x for x in value.__closure__ or () if _content(x) is not x]
        new_cells = {id(x): CellType() for x in cells}
        defaults = value.__defaults__ or ()
        rebuilt = FunctionType(
            value.__code__, value.__globals__, value.__name__, None,
            value.__closure__ and tuple(
                new_cells.get(id(x), x) for x in value.__closure__))
        self._done[id(value)] = rebuilt
        for cell in cells:
            new_cells[id(cell)].cell_contents = self(cell.cell_contents)
        rebuilt.__defaults__ = tuple(map(self, defaults)) or None
        rebuilt.__kwdefaults__ = self._values(value.__kwdefaults__) or None
        vars(rebuilt).update(self._values(vars(value)))
        rebuilt.__qualname__, rebuilt.__doc__ = (value.__qualname__,
                                                 value.__doc__)
        if all(x is y or (x is value and y is rebuilt)
               for x, y in zip(_parts(value), _parts(rebuilt))):
            self._done[id(value)] = value  # nothing of the layer in it

    def _values(self, items: Optional[dict]) -> dict:
        return {k: self(v) for k, v in (items or {}).items()}

    def _refuse(self, value: Any, scope: Optional[dict] = None) -> None:
        """Require that data, or what a global name stands for, do not lead to
        the old layer; global names are followed in ``scope`` only."""
        weights = [x for x in self.old._parameters.values() if x is not None]
        queue = [value]
        while queue:
            value = queue.pop()
            if value is self.old or getattr(value, '__self__',
                                            None) is self.old:
                raise CannotRebind('it reaches the layer by a global name or '
                                   'through data')
            if any(value is x for x in weights):
                raise CannotRebind('it holds the weights of the layer')
            key = id(value), id(scope)
            if key not in self._seen:
                self._seen[key] = value  # alive, so that ids are unique
                queue.extend(_contents(value, scope))
            if len(self._seen) > _MOST:
                raise CannotRebind('it holds too much to look through')


def _content(cell: CellType) -> Any:
    """The content of a cell; the cell itself if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell


def _parts(value: FunctionType) -> List[Any]:
    """What a function holds, apart from global names."""
    return [
        *map(_content, value.__closure__ or ()), *(value.__defaults__ or ()),
        *(value.__kwdefaults__ or {}).values(),
        *vars(value).values()
    ]


def _global_names(code: CodeType) -> Iterator[str]:
    """The global names that a function and those inside it may use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _global_names(constant)


def _contents(value: Any, scope: Optional[dict]) -> Iterator[Any]:
    """What a value leads to."""
    if isinstance(value, FunctionType):
        yield from _parts(value)
        if value.__globals__ is scope:
            for name in _global_names(value.__code__):
                yield value.__globals__.get(name)
    elif isinstance(value, weakref.ref):
        yield value()
    elif not isinstance(value, _OPAQUE):
        yield from gc.get_referents(value)
