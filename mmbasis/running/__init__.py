# Copyright (c) mmbasis authors. All rights reserved.
"""How a model is run, which nothing else in the package needs to know."""
from .adapter import (
    Adapter,
    CannotRunError,
    UnknownLossError,
    adapter_of,
    classifies,
    fisher_loss,
)
from .batch import Batch, tensors
from .complexity import model_complexity
from .engine import MMEngineAdapter
from .graph import Targets, trace_targets
from .passes import Pass, Sum, SumWatch, current_pass
from .states import evaluation, train_deterministically, undisturbed

__all__ = [
    'Adapter', 'CannotRunError', 'UnknownLossError', 'adapter_of', 'Batch',
    'tensors', 'model_complexity', 'MMEngineAdapter', 'classifies',
    'fisher_loss', 'Pass', 'Sum', 'SumWatch', 'current_pass', 'evaluation',
    'train_deterministically', 'undisturbed', 'Targets', 'trace_targets'
]
