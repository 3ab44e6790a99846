# Copyright (c) mmbasis authors. All rights reserved.
from .config import as_text_config, init_cpu_dist, load_config

__all__ = ['as_text_config', 'init_cpu_dist', 'load_config']
