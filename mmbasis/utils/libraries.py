# Copyright (c) mmbasis authors. All rights reserved.
"""Importing the libraries that a config names, whatever shape the packages
are in that they would use beside."""
import importlib
import re
import sys
import traceback
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Iterator, List, Set

import mmengine.registry
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import MMLogger
from mmengine.registry import Registry

from ..stack import install_command

#: packages that libraries import where they find them, and can do without
GUESTS = ('transformers', 'timm', 'albumentations')
#: the switch of a library for what needs guests, where it has one: it asks
#: for a version and not whether the import works
SWITCHES = {'mmpretrain': ('mmpretrain.utils.dependency', 'WITH_MULTIMODAL')}


def check_library(name: str) -> None:
    """Raise a :class:`ModuleNotFoundError` with the command that installs a
    library, if it cannot be imported by that name."""
    if find_spec(name) is None:
        raise ModuleNotFoundError(
            f'{name} is not installed: {install_command(name)}', name=name)


def libraries_of(cfg: Config) -> Set[str]:
    """Import names of the OpenMMLab libraries that a config names: its
    default scope, and scopes before types."""
    found = {cfg.get('default_scope')}
    for type_ in _types(cfg._cfg_dict):
        found.add(type_.partition('.')[0])
    return found & set(MODULE2PACKAGE) - {'mmbasis'}


def import_models(library: str) -> None:
    """Import the models of a library, without its guests where one of them
    breaks the import; a warning says so. Does nothing for a library that is
    not installed: what needs it says so."""
    name = f'{library}.models'
    if name in sys.modules or find_spec(library) is None:
        return
    if find_spec(f'{library}.registry') is not None:
        # stays: registries must not be made twice
        importlib.import_module(f'{library}.registry')
    before = set(sys.modules)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:  # a library without models
            return
        _import_without_guests(name, error, before)
    except Exception as error:
        _import_without_guests(name, error, before)


def _import_without_guests(name: str, error: Exception,
                           before: Set[str]) -> None:
    """Forget what was imported since, and import it as if the guests that are
    to blame were not installed."""
    library = name.partition('.')[0]
    guests = _culprits(error)
    new = {x for x in set(sys.modules) - before
           if x.partition('.')[0] in {library, *guests}}
    for module in new:
        del sys.modules[module]
    for registry in _registries(library):
        for key, value in list(registry.module_dict.items()):
            if getattr(value, '__module__', None) in new:
                del registry.module_dict[key]
    if library in SWITCHES:
        module, switch = SWITCHES[library]
        # for good: parts that are imported later look at it, too
        setattr(importlib.import_module(module), switch, False)
    try:
        with _hidden(guests):
            importlib.import_module(name)
    except Exception:
        raise error from None
    MMLogger.get_current_instance().warning(
        '%s cannot be imported with the %s that is installed (%s: %s). It was '
        'imported without: what needs it is missing. To have it, install a '
        'version that %s was made for', name, ' and '.join(guests),
        type(error).__name__, error, library)


@contextmanager
def _hidden(names: List[str]) -> Iterator[None]:
    """Have imports of these packages fail as if they were not installed."""
    kept = {x: sys.modules[x] for x in names if x in sys.modules}
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(kept)


def _culprits(error: Exception) -> List[str]:
    """The guests whose files stand in a traceback; else the first one, whose
    absence a library may have papered over with None."""
    files = [x.filename for x in traceback.extract_tb(error.__traceback__)]
    found = [guest for guest in GUESTS
             if any(re.search(rf'[\\/]{guest}[\\/]', x) for x in files)]
    return found or [GUESTS[0]]


def _registries(library: str) -> Iterator[Registry]:
    """MMEngine's registries, those of a library, and all below them: a library
    may register its modules with another one, too."""
    modules = [mmengine.registry, sys.modules.get(f'{library}.registry')]
    left = [x for module in modules if module is not None
            for x in vars(module).values() if isinstance(x, Registry)]
    while left:
        registry = left.pop()
        yield registry
        left += registry.children.values()


def _types(value: Any) -> Iterator[str]:
    """The types and scopes in a config, as far as they are strings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ('type', '_scope_') and isinstance(inner, str):
                yield inner
            else:
                yield from _types(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _types(inner)
