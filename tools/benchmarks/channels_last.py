# Copyright (c) mmbasis authors. All rights reserved.
"""Faster training on CPU: channels-last order, arithmetic in bfloat16."""
from contextlib import contextmanager
from typing import Iterator

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Convolutions follow the memory format of their input."""

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Change the strides, not the numbers."""
        data_batch['inputs'] = data_batch['inputs'].contiguous(
            memory_format=torch.channels_last)


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Autocast on CPU, which MMEngine's ``AmpOptimWrapper`` refuses. Weights,
    their gradients and steps stay in float32; bfloat16 has its range, so that
    no loss needs scaling."""

    @contextmanager
    def optim_context(self, model: torch.nn.Module) -> Iterator[None]:
        """Of forward passes."""
        with super().optim_context(model), torch.autocast(
                'cpu', torch.bfloat16):
            yield
