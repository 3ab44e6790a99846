# Copyright (c) mmbasis authors. All rights reserved.
from .carry_over import carry_over
from .cpu_amp_optim_wrapper import CPUAmpOptimWrapper

__all__ = ['CPUAmpOptimWrapper', 'carry_over']
