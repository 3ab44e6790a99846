# Copyright (c) mmbasis authors. All rights reserved.
"""From a dense model to a compressed one, and to its checkpoint."""
from .integrity import check_weights, load_weights, weights_of
from .pipeline import analyze, compress, make_plan, run_recipe, take_batches
from .recalibration import (
    output_error,
    output_errors,
    recalibrate,
    recalibrate_if_better,
)
from .recipe import PlanLike, Recipe, Teaching, Term, as_plan
from .start import (
    META_KEY,
    Action,
    Run,
    Source,
    TeacherFile,
    plan_of,
    read_checkpoint,
    resolve,
    save_checkpoint,
)
from .surgery import apply_plan, basis_layers, get_plan

__all__ = [
    'META_KEY', 'Action', 'PlanLike', 'Recipe', 'Run', 'Source', 'TeacherFile',
    'Teaching', 'Term', 'analyze', 'apply_plan', 'as_plan', 'basis_layers',
    'check_weights', 'compress', 'get_plan', 'load_weights', 'make_plan',
    'output_error', 'output_errors', 'plan_of', 'read_checkpoint',
    'recalibrate', 'recalibrate_if_better', 'resolve', 'run_recipe',
    'save_checkpoint', 'take_batches', 'weights_of'
]
