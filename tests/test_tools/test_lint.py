# Copyright (c) mmbasis authors. All rights reserved.
"""`make lint` and the git hooks are the same checks."""
import re


def test_hooks_use_the_pinned_releases(repo_root):
    pins = (repo_root / 'requirements' / 'lint.txt').read_text()
    hooks = (repo_root / '.pre-commit-config.yaml').read_text()
    for name, version in re.findall(r'^([\w-]+)==(\S+)', pins, re.MULTILINE):
        if name != 'mypy':  # the hook runs that of the environment
            assert re.search(rf'/{name}(-pre-commit)?\n    rev: v{version}\n',
                             hooks), name


def test_hooks_and_lint_run_the_same_tools(repo_root):
    script = (repo_root / 'tools' / 'lint.sh').read_text()
    hooks = (repo_root / '.pre-commit-config.yaml').read_text()
    pins = (repo_root / 'requirements' / 'lint.txt').read_text()
    names = re.findall(r'^([\w-]+)==', pins, re.MULTILINE)
    assert len(names) >= 3
    assert set(re.findall(r'"\$bin/(\w+)"', script)) == set(names)
    assert all(f'- id: {name}' in hooks for name in names)
