# Copyright (c) mmbasis authors. All rights reserved.
from contextlib import contextmanager
from typing import Iterator

import torch
import torch.nn as nn
from mmengine.optim import OptimWrapper

from ..registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Automatic mixed precision on CPUs, in bfloat16.

    MMEngine's ``AmpOptimWrapper`` refuses to run without an accelerator. On
    CPUs with bfloat16 instructions this halves the time of a training step;
    bfloat16 has the range of float32, so no loss is scaled. Takes the
    arguments of MMEngine's ``OptimWrapper``.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast(
                'cpu', dtype=torch.bfloat16):
            yield
