# Copyright (c) mmbasis authors. All rights reserved.
"""The house stays small and in layers (CONTRIBUTING.md draws it)."""
import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FUNCTION, MAX_FILE, MAX_TOOL = 40, 400, 250

# each folder may import those before it, and SHARED
FLOORS = ('factorization', 'layers', 'running', 'planning', 'compression',
          'models', 'hooks')
SHARED = {'registry', 'compat', 'stack', 'version', 'utils', 'quirks'}
# beside the floors: what these may import (floors may import optim, hooks also
# datasets)
SIDE = {
    '__main__': {'version'},
    'utils': {'registry', 'compat', 'stack'},
    'registry': set(),
    'compat': set(),
    'stack': set(),
    'version': set(),
    'quirks': set(),
    'datasets': {'registry', 'quirks'},
    'optim': {'factorization', 'layers', 'registry'},
    'visualization': {'factorization', 'layers', 'planning', 'utils'},
    'deploy': SHARED.union(FLOORS) - {'hooks'},
}
# a file of a shared folder that stands above all: only tools import it
ROOF = 'utils.runner'
# what these floors may import of the world, where that is limited
OUTSIDE = {'factorization': {'torch'}}
# a folder of somebody's machine, at the start of a path
MACHINE = re.compile(
    r'(?<![\w./}~-])/(?:check|home|media|mnt|root|Users|work|workspace)/\w')
# what no file of a floor may name, in whatever way it imports it
UNKNOWN = {'layers': {'runner', 'Runner', 'MODELS', 'HOOKS', 'DATASETS'}}


def sources(root):
    """Path and syntax tree by dotted name, of a package's files."""
    found = {}
    for path in sorted(root.rglob('*.py')):
        parts = path.relative_to(root.parent).with_suffix('').parts
        name = '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)
        found[name] = (path, ast.parse(path.read_text(encoding='utf-8')))
    return found


def imports(name, path, tree):
    """Dotted names that a file imports, ``from a import b`` as ``a.b``; also
    those that it imports late, in a function."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (x.name for x in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                parts = package.split('.')
                parts = parts[:len(parts) - node.level + 1]
                base = '.'.join([*parts, *filter(None, [base])])
            yield from (f'{base}.{x.name}' for x in node.names)


def import_graph(modules):
    """For each module the modules of the package that it imports."""

    def module_of(name):
        return name if name in modules else name.rpartition('.')[0]

    return {
        name: {module_of(x) for x in imports(name, *source)}
        & set(modules) - {name}
        for name, source in modules.items()
    }


def circle(graph):
    """Modules that import each other in a circle, or an empty list."""
    done = set()

    def visit(name, way):
        if name in way:
            return way[way.index(name):]
        if name not in done:
            for other in sorted(graph[name]):
                found = visit(other, [*way, name])
                if found:
                    return found
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in graph)), [])


def long_functions(modules):
    for name, (_, tree) in modules.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION:
                    yield f'{name}.{node.name}: {lines} lines'


def wrong_imports(modules):
    """Imports that go up, or out of what a folder may know."""
    top = next(iter(modules))
    for name, source in modules.items():
        if name == top:
            continue
        here = name.split('.')[1]
        if name == f'{top}.{ROOF}':
            continue
        assert here in FLOORS or here in SIDE, f'{here} is new: add it here'
        allowed = SIDE.get(here, SHARED | {'optim'})
        if here in FLOORS:
            allowed = allowed | set(FLOORS[:FLOORS.index(here)])
        if here == 'hooks':
            allowed = allowed | {'datasets'}
        for imported in imports(name, *source):
            first, *rest = imported.split('.')
            if first == top:
                wrong = bool(rest) and (rest[0] not in allowed | {here}
                                        or '.'.join(rest).startswith(ROOF))
            else:
                wrong = here in OUTSIDE and not (
                    first in OUTSIDE[here] or is_standard(first))
            named = UNKNOWN.get(here, set()).intersection(rest)
            if wrong or named:
                yield f'{name} imports {imported}'


def is_standard(name):
    # Python 3.8 and 3.9 cannot say: the few that tensor mathematics may need
    few = {'dataclasses', 'functools', 'itertools', 'math', 'typing'}
    return name in getattr(sys, 'stdlib_module_names', few | {'__future__'})


@pytest.fixture(scope='module')
def modules():
    return sources(ROOT / 'mmbasis')


def test_functions_are_short(modules):
    assert list(long_functions(modules)) == []


def test_files_are_short(modules):
    lines = {
        name: len(path.read_text(encoding='utf-8').splitlines())
        for name, (path, _) in modules.items()
    }
    assert {k: v for k, v in lines.items() if v > MAX_FILE} == {}


def test_imports_go_down(modules):
    assert list(wrong_imports(modules)) == []


def test_no_import_circles(modules):
    assert circle(import_graph(modules)) == []


@pytest.mark.parametrize(
    'path', sorted((ROOT / 'tools').glob('*.py')), ids=lambda x: x.name)
def test_tools_are_thin(path):
    """A tool reads arguments, calls the package and prints."""
    assert len(path.read_text(encoding='utf-8').splitlines()) <= MAX_TOOL


def machine_paths(root):
    """Where texts below a folder name a path of the machine they come from."""
    for path in sorted(x for x in root.rglob('*') if x.is_file()):
        try:
            lines = path.read_text(encoding='utf-8').splitlines()
        except UnicodeDecodeError:
            continue  # an image
        for number, line in enumerate(lines, 1):
            found = MACHINE.search(line)
            if found:
                yield f'{path.relative_to(root)}:{number}: {found.group()}'


@pytest.mark.parametrize('folder', ['configs', 'docs', 'mmbasis', 'tools'])
def test_no_file_names_a_path_of_a_machine(folder):
    assert list(machine_paths(ROOT / folder)) == []


def test_paths_of_machines_are_seen(tmp_path):
    (tmp_path / 'a.json').write_text(
        '{"a": 1,\n "file": "/root/w/a.pth", "b": "work_dirs/home/x"}')
    (tmp_path / 'b.png').write_bytes(b'\xff/home/me/x')
    assert list(machine_paths(tmp_path)) == ['a.json:2: /root/w']


def test_the_checks_see_faults(tmp_path):
    house = tmp_path / 'house'
    for path, text in {
            '__init__.py': '',
            'factorization/__init__.py': 'from .a import x\nimport numpy\n',
            'factorization/a.py': 'import math\nfrom . import b\n',
            'factorization/b.py': 'def f():\n    from .a import x\n' + 39 *
                                  '    x()\n',
            'layers/__init__.py': 'from mmengine import runner\n'
                                  'from ..registry import MODELS\n',
            'planning/__init__.py': 'from ..models import quirks\n',
            'deploy/__init__.py': 'from ..utils.runner import evaluate\n',
            'hooks/__init__.py': 'from ..datasets import calibration\n',
            'models/__init__.py': 'from ..datasets import calibration\n',
            'utils/runner.py': 'from ..models import builder\n',
            'registry.py': '',
    }.items():
        (house / path).parent.mkdir(parents=True, exist_ok=True)
        (house / path).write_text(text)
    modules = sources(house)
    assert circle(import_graph(modules)) == [
        'house.factorization.a', 'house.factorization.b'
    ]
    long = list(long_functions(modules))
    assert long == ['house.factorization.b.f: 41 lines']
    assert list(wrong_imports(modules)) == [
        'house.deploy imports house.utils.runner.evaluate',
        'house.factorization imports numpy',
        'house.layers imports mmengine.runner',
        'house.layers imports house.registry.MODELS',
        'house.models imports house.datasets.calibration',
        'house.planning imports house.models.quirks',
    ]
