# Copyright (c) mmbasis authors. All rights reserved.
"""Whether the libraries that mmbasis stands on are there, and how to get them.

Two families of distributions, OpenMMLab's and the forks (``onedl-mmengine``,
``onedl-mmcv``, …), provide the same import names. So nothing here asks for a
distribution: what counts is what can be imported and what it can do. This
module runs before all others and imports only the standard library.
"""
import importlib
import importlib.util
import sys
import traceback
from typing import Any, Dict, List, NamedTuple, Optional


class Library(NamedTuple):
    """A library that mmbasis imports."""
    #: what a sufficient release has: dotted names below the library
    capabilities: List[str]
    #: the oldest release that is tested
    oldest: str


#: by import name, in the order in which they can be installed
LIBRARIES: Dict[str, Library] = {
    'numpy': Library(['linalg.eigh'], '1.24'),
    'torch': Library(['compiler.disable'], '2.1'),
    'mmengine': Library(
        ['analysis.FlopAnalyzer', 'config.lazy.LazyAttr',
         'config.Config._to_lazy_dict', 'runner.Runner._maybe_compile'],
        '0.10.7'),
    'mmcv': Library(['cnn.bricks.wrappers', 'transforms.BaseTransform'],
                    '2.1'),
    'rich': Library(['table.Table', 'progress.track'], '13'),
}

#: what the forks ask of others, and the oldest release that has it
OF_FORKS: Dict[str, Library] = {
    'torch': Library(['amp.GradScaler'], '2.4'),
}


def _compile(requirement: str) -> str:
    """How mmcv is compiled, against the torch that is there, with its ops."""
    name = requirement.partition('==')[0]
    return ('pip install "setuptools<81" wheel ninja psutil && MMCV_WITH_OPS=1'
            ' pip install --no-build-isolation --no-cache-dir --no-binary '
            f'{name} {requirement}')


_BOTH = {
    'matplotlib': 'pip install "mmbasis[plots]"',
    'mmdeploy': 'pip install "mmbasis[deploy]" && '
                'pip install --no-deps mmdeploy==1.3.1',
}
#: how each stack installs a library; what is not here is named as imported
COMMANDS: Dict[str, Dict[str, str]] = {
    'openmmlab': {
        **_BOTH,
        'numpy': 'pip install "numpy<2"',
        'torch': 'pip install torch==2.1.2 torchvision==0.16.2',
        'mmengine': 'pip install mmengine==0.10.7',
        # a wheel for torch 2.1; for another torch it is compiled
        'mmcv': 'pip install mmcv==2.1.0 -f https://download.openmmlab.com/'
                'mmcv/dist/{device}/torch2.1.0/index.html',
        'mmdet': 'pip install mmdet==3.3.0',
        'mmpretrain': 'pip install mmpretrain==1.2.0',
        'mmseg': 'pip install mmsegmentation==1.2.2',
    },
    'onedl': {
        **_BOTH,
        'torch': 'pip install torch==2.11.0 torchvision==0.26.0',
        'mmengine': 'pip install onedl-mmengine==0.10.12',
        'mmcv': _compile('onedl-mmcv==2.3.6'),
        'mmdet': 'pip install onedl-mmdetection==3.5.1',
        'mmpretrain': 'pip install onedl-mmpretrain==1.3.6',
        'mmseg': 'pip install onedl-mmsegmentation==1.4.2',
        'mmrotate': 'pip install onedl-mmrotate==1.2.1',
    },
}
#: the first release of the forks, above OpenMMLab's last ones
FORKS: Dict[str, str] = {
    'mmengine': '0.10.8', 'mmcv': '2.3', 'mmdet': '3.4', 'mmpretrain': '1.3',
    'mmseg': '1.3', 'mmrotate': '1.1',
}


def version_of(name: str) -> str:
    """What a library says of its version, ``''`` if it cannot be imported or
    says nothing."""
    try:
        return str(getattr(importlib.import_module(name), '__version__', ''))
    except Exception:  # broken or absent: the check says so
        return ''


def name_stack() -> str:
    """``'onedl'`` or ``'openmmlab'``: the stack that a user is on, or should
    take, by the versions that are there and else by Python's."""
    for name in ('mmengine', 'mmcv'):
        version = version_of(name)
        if version:
            fork = _numbers(version) >= _numbers(FORKS[name])
            return 'onedl' if fork else 'openmmlab'
    # torch 2.1, which OpenMMLab's releases were made for, stops at 3.11
    return 'onedl' if sys.version_info >= (3, 12) else 'openmmlab'


def install_command(name: str) -> str:
    """What a user types to install a library, by its import name, into the
    stack at hand."""
    stack, torch = name_stack(), version_of('torch')
    if (stack, name) == ('openmmlab', 'mmcv') and torch and (
            _numbers(torch)[:2] != [2, 1]):
        return _compile('mmcv==2.1.0')
    return COMMANDS[stack].get(name, f'pip install {name}').format(
        device='cu121' if '+cu' in torch else 'cpu')


def problems() -> Dict[str, str]:
    """What is missing, broken or too old, by import name; empty if mmbasis
    can run. What stands on something that is broken is not tried."""
    found: Dict[str, str] = {}
    broken = False
    for name, library in LIBRARIES.items():
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            found[name] = f'{name} is missing'
        elif not broken:
            problem = _problem(name, library)
            if problem is None and name_stack() == 'onedl':
                problem = _problem(name, OF_FORKS.get(name, Library([], '')))
            broken = problem is not None
            found.update({name: problem} if problem else {})
    if not found and not _shares_arrays():
        found['numpy'] = (f'numpy {version_of("numpy")} is too new for torch '
                          f'{version_of("torch")}, which cannot use its '
                          'arrays')
    return found


def check_stack() -> None:
    """Raise an :class:`ImportError` that names what is missing, broken or too
    old, and the commands that help."""
    found = problems()
    if not found:
        return
    commands = {
        'numpy': 'pip install "numpy<2"'
    } if 'too new' in found.get('numpy', '') else {
        name: install_command(name) for name in found
    }
    here = ', '.join(f'{x} {version_of(x)}' for x in LIBRARIES
                     if version_of(x))
    raise ImportError('\n'.join([
        'mmbasis cannot run here (Python '
        f'{".".join(map(str, sys.version_info[:3]))}'
        f'{", " if here else ""}{here}):',
        *(f'  - {x}' for x in found.values()),
        f'What helps on this stack ({name_stack()}, see docs/install.md):',
        *(f'  {x}' for x in commands.values()),
    ]))


def _problem(name: str, library: Library) -> Optional[str]:
    """What is wrong with a library that is there."""
    try:
        module = importlib.import_module(name)
        for capability in library.capabilities:
            if not _has(module, capability):
                return (f'{name} {version_of(name)} is too old: it has no '
                        f'{name}.{capability}; {library.oldest} does')
    except Exception as error:
        # the line that failed may be of another package
        file, line = traceback.extract_tb(error.__traceback__)[-1][:2]
        return (f'{name} is installed but cannot be imported: '
                f'{type(error).__name__}: {error} ({file}, line {line})')
    return None


def _has(module: Any, capability: str) -> bool:
    """Whether a dotted name is below a module, in submodules, too."""
    value, path = module, module.__name__
    for part in capability.split('.'):
        path = f'{path}.{part}'
        if not hasattr(value, part):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError as error:
                if error.name and path.startswith(error.name):
                    return False
                raise
        value = getattr(value, part, None)
    return value is not None


def _shares_arrays() -> bool:
    """Whether torch takes arrays: one that was compiled for numpy 1 does not
    take those of numpy 2."""
    import numpy
    import torch
    try:
        torch.from_numpy(numpy.zeros(1))
    except RuntimeError:
        return False
    return True


def _numbers(version: str) -> List[int]:
    """The leading numbers of a version: ``'0.10.7+cpu'`` is 0, 10, 7."""
    numbers = []
    for part in version.split('+')[0].split('.'):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return numbers
