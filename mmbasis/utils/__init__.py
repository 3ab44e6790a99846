# Copyright (c) mmbasis authors. All rights reserved.
from .config import as_text_config, init_cpu_dist, load_config
from .weights import check_load_from, find_weights

__all__ = ['as_text_config', 'check_load_from', 'find_weights',
           'init_cpu_dist', 'load_config']
