# Copyright (c) mmbasis authors. All rights reserved.
"""From a dense model to a compressed one, and to its checkpoint."""
from .checkpoint import (META_KEY, from_plain, plan_of, read_checkpoint,
                         save_checkpoint, to_plain)
from .complexity import model_complexity
from .pipeline import (analyze, apply_with_data, as_planner,
                       check_reconstruction, compress, log_plan)
from .reconstruction import Reconstruction
from .surgery import (apply_plan, attach_plan, basis_layers, get_plan, guard,
                      load_weights)

__all__ = [
    'META_KEY', 'from_plain', 'plan_of', 'read_checkpoint', 'save_checkpoint',
    'to_plain', 'model_complexity', 'analyze', 'apply_with_data', 'as_planner',
    'check_reconstruction', 'compress', 'log_plan', 'Reconstruction',
    'apply_plan', 'attach_plan', 'basis_layers', 'get_plan', 'guard',
    'load_weights'
]
