# Copyright (c) mmbasis authors. All rights reserved.
"""Compression of convolutional networks by basis filters and spectral fine-
tuning, for the OpenMMLab ecosystem. Importing it registers everything."""
from .stack import check_stack

check_stack()  # before anything is imported that may be missing

# ruff: noqa: E402
from . import compat, datasets, hooks, models, optim  # noqa: F401
from .compression import compress
from .models import load_compressed
from .planning import CompressionPlan
from .version import __version__

__all__ = ['compress', 'load_compressed', 'CompressionPlan', '__version__']
