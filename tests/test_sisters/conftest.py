# Copyright (c) mmbasis authors. All rights reserved.
"""What the tests of sister libraries share: the demo of plain models, which
also exports those of configs."""
import importlib.util

import pytest


@pytest.fixture(scope='session')
def demo(repo_root):
    """``tools/demo/torch_models.py`` as a module."""
    path = repo_root / 'tools' / 'demo' / 'torch_models.py'
    spec = importlib.util.spec_from_file_location('torch_models', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
