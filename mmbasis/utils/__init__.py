# Copyright (c) mmbasis authors. All rights reserved.
from .config import load_config
from .dist import init_cpu_dist

__all__ = ['init_cpu_dist', 'load_config']
