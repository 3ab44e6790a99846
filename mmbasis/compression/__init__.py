# Copyright (c) mmbasis authors. All rights reserved.
"""From a dense model to a compressed one, and to its checkpoint."""
from .analysis import forward_latency, single_truncations
from .checkpoint import (META_KEY, TEACHER_KEY, from_plain, plan_of,
                         read_checkpoint, save_checkpoint, to_plain)
from .pipeline import (Compressor, analyze, as_planner, compress, log_plan,
                       take_batches)
from .recalibration import output_error, recalibrate, recalibrate_if_better
from .reconstruction import Reconstruction
from .surgery import (apply_plan, attach_plan, basis_layers, densified,
                      get_plan, guard, load_weights)

__all__ = [
    'META_KEY', 'TEACHER_KEY', 'from_plain', 'plan_of', 'read_checkpoint',
    'save_checkpoint', 'to_plain', 'Compressor', 'analyze', 'as_planner',
    'compress', 'log_plan', 'take_batches', 'output_error',
    'recalibrate', 'recalibrate_if_better', 'forward_latency',
    'single_truncations', 'Reconstruction', 'apply_plan', 'attach_plan',
    'basis_layers', 'densified', 'get_plan', 'guard', 'load_weights'
]
