# Copyright (c) mmbasis authors. All rights reserved.
"""Makes ``tools`` and the helpers importable; builds the stand-ins."""
import os
import shutil
import subprocess
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import jetson_helpers  # noqa: E402


def _library(folder, source, name, *flags):
    if shutil.which('gcc') is None:
        pytest.skip('gcc is absent: the stand-ins for libraries need it')
    subprocess.check_call([
        'gcc', '-O1', '-shared', '-fPIC', *flags, '-o',
        str(folder / name),
        os.path.join(HERE, 'stand_in', source)
    ])
    return str(folder)


@pytest.fixture(scope='session')
def tensorrt_env(tmp_path_factory):
    """Environment in which a program finds the stand-ins for TensorRT."""
    folder = _library(
        tmp_path_factory.mktemp('cudart'), 'cudart.c', 'libcudart.so')
    return dict(
        LD_LIBRARY_PATH=folder, PYTHONPATH=os.path.join(HERE, 'stand_in'))


@pytest.fixture(scope='session')
def old_cuda_env(tmp_path_factory):
    """The same with a CUDA before 11.4."""
    folder = _library(
        tmp_path_factory.mktemp('cudart'), 'cudart.c', 'libcudart.so',
        '-DFAKE_CUDA_OLD')
    return dict(
        LD_LIBRARY_PATH=folder, PYTHONPATH=os.path.join(HERE, 'stand_in'))


@pytest.fixture(scope='session')
def nvml_env(tmp_path_factory):
    """Environment in which a program finds the stand-in for NVML."""
    return dict(
        LD_LIBRARY_PATH=_library(
            tmp_path_factory.mktemp('nvml'), 'nvml.c', 'libnvidia-ml.so.1'))


@pytest.fixture
def shared_file():
    """Returns a finder of files that are too large for the repository."""

    def find(name):
        path = os.path.join(jetson_helpers.SHARED, 'data', name)
        if not os.path.exists(path):
            pytest.skip('{} is absent (set MMBASIS_SHARED)'.format(path))
        return path

    return find
