# Copyright (c) mmbasis authors. All rights reserved.
from .config import as_text_config, init_cpu_dist, load_config
from .saving import find_resumable
from .weights import NotDataError, check_load_from, find_weights

__all__ = ['NotDataError', 'as_text_config', 'check_load_from',
           'find_resumable', 'find_weights', 'init_cpu_dist', 'load_config']
