# Copyright (c) mmbasis authors. All rights reserved.
"""Functions of torch that MMDeploy's rewriters make plugins of, in ONNX's own
operators. Importing this file registers them."""
from typing import Optional

import torch
from mmdeploy.core import FUNCTION_REWRITER
from mmdeploy.utils import IR
from torch import Tensor


@FUNCTION_REWRITER.register_rewriter(
    'torch.nn.functional.group_norm', backend='tensorrt', ir=IR.ONNX)
def group_norm__plain(input: Tensor, num_groups: int,
                      weight: Optional[Tensor] = None,
                      bias: Optional[Tensor] = None,
                      eps: float = 1e-5) -> Tensor:
    """Means over groups: MMDeploy's symbolic is a plugin."""
    x = input.reshape(input.shape[0], num_groups, -1)
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)
    x = x.reshape(input.shape)
    size = (1, -1, *[1] * (input.dim() - 2))
    if weight is not None:
        x = x * weight.reshape(size)
    return x if bias is None else x + bias.reshape(size)
