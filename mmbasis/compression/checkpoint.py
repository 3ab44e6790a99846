# Copyright (c) mmbasis authors. All rights reserved.
"""Checkpoints as data: they carry the plan and can be read without pickle."""
import os
from typing import Any, Dict, Optional

import torch
import torch.nn as nn
from mmengine.runner.checkpoint import (
    _load_checkpoint,
    get_state_dict,
    weights_to_cpu,
)

from ..planning import CompressionPlan

#: where the plan stands in ``checkpoint['meta']``
META_KEY = 'mmbasis'
#: where the file of the dense weights is named
TEACHER_KEY = 'mmbasis_teacher'


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint: a local file, or a URL that MMEngine reads.

    Returns:
        dict: The checkpoint, tensors on the CPU. A file that holds a bare
        state dict is returned as ``dict(state_dict=…)``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or holds no weights.
    """
    if '://' not in path and not os.path.isfile(path):
        raise FileNotFoundError(f'checkpoint {path} does not exist')
    try:
        checkpoint = _load_checkpoint(path, map_location='cpu')
    except Exception as error:
        raise ValueError(f'checkpoint {path} cannot be read, it may be '
                         f'truncated: {error}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'checkpoint {path} holds a '
                         f'{type(checkpoint).__name__}, not weights')
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    return checkpoint


def plan_of(checkpoint: Dict[str, Any]) -> Optional[CompressionPlan]:
    """The plan in a checkpoint, None if it is of a dense model.

    Raises:
        ValueError: If the plan is malformed or of a newer version.
    """
    data = (checkpoint.get('meta') or {}).get(META_KEY)
    return None if data is None else CompressionPlan.from_dict(data)


def save_checkpoint(model: nn.Module, plan: CompressionPlan, path: str,
                    meta: Dict[str, Any]) -> None:
    """Write the weights of a compressed model with its plan and further
    entries of ``meta``, in plain types; the whole file or none."""
    checkpoint = dict(
        meta=dict(meta, **{META_KEY: plan.to_dict()}),
        state_dict=weights_to_cpu(get_state_dict(model)))
    temporary = f'{path}.tmp{os.getpid()}'
    torch.save(checkpoint, temporary)
    os.replace(temporary, path)
