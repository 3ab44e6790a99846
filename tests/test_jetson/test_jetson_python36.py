# Copyright (c) mmbasis authors. All rights reserved.
"""Everything that is copied to the board runs under Python 3.6."""
import ast
import glob
import os
import subprocess

import jetson_helpers as helpers
import pytest

FILES = [helpers.PROGRAM] + sorted(
    glob.glob(os.path.join(helpers.TOOLS, 'jetson', '*.py')))
PYENV = glob.glob(os.path.expanduser('~/.pyenv/versions/3.6.*/bin/python'))
PYTHON36 = os.environ.get('MMBASIS_PYTHON36', (PYENV or [None])[0])
NEEDS_36 = pytest.mark.skipif(
    PYTHON36 is None, reason='no Python 3.6 (MMBASIS_PYTHON36)')
# Of later versions, in calls that a grammar does not know.
TOO_NEW = ('capture_output', 'monotonic_ns', 'perf_counter_ns', 'dataclass',
           'from __future__ import annotations', 'missing_ok', 'text=True',
           'shlex.join', 'removeprefix', 'dirs_exist_ok')


@pytest.mark.parametrize('path', FILES, ids=os.path.basename)
def test_grammar(path):
    with open(path) as f:
        text = f.read()
    ast.parse(text, path, feature_version=(3, 6))
    assert not [word for word in TOO_NEW if word in text]


@NEEDS_36
def test_compiles():
    code = ('import sys\nfor p in sys.argv[1:]:\n'
            '    compile(open(p).read(), p, "exec")')
    subprocess.check_call([PYTHON36, '-c', code] + FILES)


@NEEDS_36
@pytest.mark.parametrize('args', [['--help'], ['probe'], ['layers', '-h']])
def test_runs_without_numpy(args):
    status, out, err = helpers.program(*args, python=PYTHON36)
    assert status == 0 and out, err


@NEEDS_36
def test_selftest():
    status, out, err = helpers.program('selftest', python=PYTHON36)
    assert out.count('ok  ') >= 3, out + err


def test_size_and_width_of_the_files():
    for path in FILES:
        with open(path) as f:
            lines = f.read().splitlines()
        assert len(lines) <= 400, path
        assert max(len(n) for n in lines) <= 79, path
