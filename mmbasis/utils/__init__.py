# Copyright (c) mmbasis authors. All rights reserved.
from .config import as_text_config, load_config
from .dist import init_cpu_dist

__all__ = ['as_text_config', 'init_cpu_dist', 'load_config']
