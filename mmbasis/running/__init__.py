# Copyright (c) mmbasis authors. All rights reserved.
"""How a model is run, which nothing else in the package needs to know."""
from .adapter import (
    Adapter,
    Batch,
    UnknownLossError,
    adapter_of,
    fisher_loss,
    tensors,
)
from .engine import CannotRunError, MMEngineAdapter
from .graph import Targets, model_complexity, trace_targets
from .passes import (
    Pass,
    SumWatch,
    current_pass,
    evaluation,
    kept_random,
    train_deterministically,
    undisturbed,
)
from .traffic import Operation, TrafficWatch

__all__ = [
    'Adapter', 'CannotRunError', 'UnknownLossError', 'adapter_of', 'Batch',
    'tensors', 'model_complexity', 'MMEngineAdapter', 'fisher_loss', 'Pass',
    'SumWatch', 'current_pass', 'evaluation', 'kept_random',
    'train_deterministically', 'undisturbed', 'Targets', 'trace_targets',
    'Operation', 'TrafficWatch'
]
