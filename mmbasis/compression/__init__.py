# Copyright (c) mmbasis authors. All rights reserved.
"""From a dense model to a compressed one, and to its checkpoint."""
from .pipeline import (
                         Compression,
                         analyze,
                         bases_of,
                         compress,
                         find_targets,
                         log_plan,
                         make_plan,
                         run_recipe,
                         take_batches,
)
from .recalibration import (
                         forward_latency,
                         output_error,
                         recalibrate,
                         recalibrate_if_better,
                         single_truncations,
)
from .recipe import (
                         Calibration,
                         Orthogonality,
                         PlanLike,
                         Recipe,
                         Teaching,
                         Term,
                         as_plan,
                         as_planner,
)
from .reconstruction import Reconstruction
from .start import (
                         META_KEY,
                         TEACHER_KEY,
                         Action,
                         Run,
                         Source,
                         Start,
                         plan_of,
                         read_checkpoint,
                         resolve,
                         save_checkpoint,
)
from .surgery import (
                         apply_plan,
                         attach_plan,
                         basis_layers,
                         densified,
                         get_plan,
                         guard,
                         load_weights,
                         restructure,
)

__all__ = [
    'forward_latency', 'single_truncations', 'META_KEY', 'TEACHER_KEY',
    'plan_of', 'read_checkpoint', 'save_checkpoint', 'Compression', 'analyze',
    'bases_of', 'compress', 'find_targets', 'log_plan', 'make_plan',
    'run_recipe', 'take_batches', 'output_error', 'recalibrate',
    'recalibrate_if_better', 'Calibration', 'Orthogonality', 'PlanLike',
    'Recipe', 'Teaching', 'Term', 'as_plan', 'as_planner', 'Reconstruction',
    'Action', 'Run', 'Source', 'Start', 'resolve', 'apply_plan', 'attach_plan',
    'basis_layers', 'densified', 'get_plan', 'guard', 'load_weights',
    'restructure'
]
