# Copyright (c) mmbasis authors. All rights reserved.
"""Importing the libraries that a config names, whatever shape the packages
are in that they would use beside."""
import importlib
import re
import sys
import traceback
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Dict, Iterator, List, Set

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import MMLogger
from mmengine.registry import Registry

from ..stack import install_command

#: packages that libraries import where they find them, and can do without
GUESTS = ('transformers', 'timm', 'albumentations')
#: by module, the switch of a library for what needs guests: it asks for a
#: version and not whether the import works
SWITCHES = {'mmpretrain.utils.dependency': 'WITH_MULTIMODAL'}


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
    before = set(sys.modules)
    entries = {id(x): dict(x.module_dict) for x in _registries()}
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:  # a library without models
            return
        _import_without_guests(name, error, before, entries)
    except Exception as error:
        _import_without_guests(name, error, before, entries)


def _import_without_guests(name: str, error: Exception, before: Set[str],
                           entries: Dict[int, dict]) -> None:
    """Forget what was imported and registered since, and import it as if the
    guests that are to blame were not installed."""
    guests = _culprits(error)
    _forget(set(sys.modules) - before, guests)
    for registry in _registries():
        registry.module_dict.clear()
        registry.module_dict.update(entries.get(id(registry), {}))
    for module, switch in SWITCHES.items():
        if find_spec(module.partition('.')[0]) is not None:
            # for good: parts that are imported later look at it, too
            setattr(importlib.import_module(module), switch, False)
    try:
        with _hidden(guests):
            importlib.import_module(name)
    except Exception as other:
        raise other from error
    MMLogger.get_current_instance().warning(
        '%s cannot be imported with the %s that is installed (%s: %s). It was '
        'imported without: what needs it is missing. To have it, install a '
        'version that %s was made for', name, ' and '.join(guests),
        type(error).__name__, error, name.partition('.')[0])


def _forget(modules: Set[str], guests: List[str]) -> None:
    """Have these modules imported again, as far as they are of guests and of
    libraries; but registries, which must not be made twice, stay."""
    for module in modules:
        library, _, part = module.partition('.')
        if library in guests or (library in MODULE2PACKAGE
                                 and part not in ('', 'registry')):
            del sys.modules[module]


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


def _registries() -> Iterator[Registry]:
    """The registries of MMEngine and of all libraries that are imported."""
    names = ['mmengine.registry', *(f'{x}.registry' for x in MODULE2PACKAGE)]
    left = [x for name in names if name in sys.modules
            for x in vars(sys.modules[name]).values()
            if isinstance(x, Registry)]
    done = set()
    while left:
        registry = left.pop()
        if id(registry) not in done:
            done.add(id(registry))
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
