# Copyright (c) mmbasis authors. All rights reserved.
"""From a dense model to a compressed one, and to its checkpoint."""
from .pipeline import (
                         analyze,
                         bases_of,
                         compress,
                         find_targets,
                         log_plan,
                         make_plan,
                         run_recipe,
                         take_batches,
)
from .recalibration import output_error, recalibrate, recalibrate_if_better
from .recipe import PlanLike, Recipe, Teaching, Term, as_plan, as_planner
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
    'META_KEY', 'TEACHER_KEY', 'Action', 'PlanLike', 'Recipe', 'Run', 'Source',
    'Start', 'Teaching', 'Term', 'analyze', 'apply_plan', 'as_plan',
    'as_planner', 'attach_plan', 'bases_of', 'basis_layers', 'compress',
    'densified', 'find_targets', 'get_plan', 'guard', 'load_weights',
    'log_plan', 'make_plan', 'output_error', 'plan_of', 'read_checkpoint',
    'recalibrate', 'recalibrate_if_better', 'resolve', 'restructure',
    'run_recipe', 'save_checkpoint', 'take_batches'
]
