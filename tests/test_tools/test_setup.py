# Copyright (c) mmbasis authors. All rights reserved.
import os
import subprocess

import pytest
from packaging.requirements import Requirement

PYTHONS = ('3.8', '3.9', '3.10', '3.11', '3.12')


def files(repo_root):
    found = sorted((repo_root / 'requirements').glob('*.txt'))
    assert len(found) >= 7
    return found


def requirements(path):
    lines = path.read_text().splitlines()
    return [Requirement(x) for x in lines if x and not x.startswith('#')]


def test_every_pin_says_why(repo_root):
    for path in files(repo_root):
        before = ''
        for line in path.read_text().splitlines():
            if line and not line.startswith('#'):
                assert before.startswith('#'), f'{path.name}: {line}'
            before = line


@pytest.mark.parametrize('python', PYTHONS)
def test_one_pin_for_each_python(repo_root, python):
    for path in files(repo_root):
        names = [
            want.name for want in requirements(path) if want.marker is None
            or want.marker.evaluate(dict(python_version=python))
        ]
        assert len(names) == len(set(names)), path.name
        assert set(names) == {want.name for want in requirements(path)}


def run_setup(repo_root, tmp_path, *args, **env):
    return subprocess.run(['tools/setup_env.sh', *args],
                          capture_output=True,
                          text=True,
                          cwd=repo_root,
                          env=dict(os.environ, TMPDIR=str(tmp_path), **env))


def test_says_which_python_is_needed(repo_root, tmp_path):
    result = run_setup(
        repo_root, tmp_path, VENV=str(tmp_path / 'env'), PYTHON='/bin/false')
    assert result.returncode == 1
    assert "'main' needs Python 3.11, 3.10, 3.9, 3.8" in result.stderr
    assert 'found: none that runs' in result.stderr
    assert not (tmp_path / 'env').exists()


def test_old_or_new_pythons_are_named(repo_root, tmp_path):
    fake = tmp_path / 'python3.12'
    fake.write_text('#!/bin/sh\necho 3.12\n')
    fake.chmod(0o755)
    result = run_setup(
        repo_root, tmp_path, VENV=str(tmp_path / 'env'), PYTHON=str(fake))
    assert result.returncode == 1
    assert f'found: {fake} (3.12)' in result.stderr


@pytest.mark.parametrize('version, expected', [
    ('3.12', 'forks'), ('3.11', 'main'), ('3.8', 'main'), ('2.7', 'main')])
def test_the_default_set_follows_the_interpreter(repo_root, tmp_path, version,
                                                 expected):
    fake = tmp_path / 'python'
    fake.write_text(f'#!/bin/sh\necho {version}\n')
    fake.chmod(0o755)
    result = run_setup(repo_root, tmp_path, 'which', PYTHON=str(fake))
    assert result.stdout.split() == [expected]


def test_the_forks_need_python_3_12(repo_root, tmp_path):
    fake = tmp_path / 'python3.11'
    fake.write_text('#!/bin/sh\necho 3.11\n')
    fake.chmod(0o755)
    result = run_setup(repo_root, tmp_path, 'forks', PYTHON=str(fake),
                       VENV=str(tmp_path / 'env'))
    assert result.returncode == 1
    assert "'forks' needs Python 3.12" in result.stderr
    assert f'found: {fake} (3.11)' in result.stderr
