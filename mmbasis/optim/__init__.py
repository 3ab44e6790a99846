# Copyright (c) mmbasis authors. All rights reserved.
from .carry_over import carry_over
from .cpu_amp_optim_wrapper import CPUAmpOptimWrapper
from .regroup import dense_names, keep_custom_keys, regroup

__all__ = [
    'CPUAmpOptimWrapper', 'carry_over', 'dense_names', 'keep_custom_keys',
    'regroup'
]
