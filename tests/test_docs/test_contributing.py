# Copyright (c) mmbasis authors. All rights reserved.
"""CONTRIBUTING.md says what is true."""
import re

import pytest

from mmbasis import registry

REGISTRIES = ('LAYER_KINDS', 'PLANNERS', 'ADAPTERS')


@pytest.fixture(scope='module')
def text(repo_root):
    return (repo_root / 'CONTRIBUTING.md').read_text(encoding='utf-8')


@pytest.fixture
def registries():
    """The registries that a user can extend, as they were afterwards."""
    found = {name: getattr(registry, name) for name in REGISTRIES}
    before = {name: dict(x.module_dict) for name, x in found.items()}
    yield found
    for name, entries in before.items():
        found[name].module_dict.clear()
        found[name].module_dict.update(entries)


@pytest.mark.parametrize('heading, name', [
    ('A kind of layer', 'LAYER_KINDS'),
    ('A planner', 'PLANNERS'),
    ('A way to run a model', 'ADAPTERS'),
])
def test_examples_run(text, registries, heading, name):
    section = text.split(f'### {heading}\n')[1].split('\n##')[0]
    block, = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
    before = set(registries[name].module_dict)
    scope = {'__name__': 'example'}
    exec(compile(block, f'CONTRIBUTING.md, {heading}', 'exec'), scope)
    added = set(registries[name].module_dict) - before
    assert len(added) == 1 and added < set(scope)


def test_no_example_is_left_out(text):
    assert text.count('```python') == len(REGISTRIES)


def test_files_exist(text, repo_root):
    # ../shared is beside the repository
    paths = set(re.findall(r'`((?:[\w.]+/)+[\w.]*)', text)) - {'../shared'}
    assert len(paths) > 10
    assert not [path for path in paths if not (repo_root / path).exists()]


def test_targets_exist(text, repo_root):
    makefile = (repo_root / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'(?:^|`)make (\w+)', text, re.MULTILINE))
    assert targets
    for target in targets:
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target
