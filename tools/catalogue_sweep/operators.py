# Copyright (c) mmbasis authors. All rights reserved.
"""Stand-ins for operators that mmcv knows on accelerators only.

They compute the same from tensors, slowly. Dense and compressed model run with
them, so that models with such operators can be checked on a CPU, too.
"""
import importlib
from typing import List, Optional

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

#: modules that call them
MODULES = ('CARAFEPack', 'MaskedConv2d')


def install() -> None:
    """Let mmcv's modules call the stand-ins, in this process."""
    importlib.import_module('mmcv.ops.carafe').carafe = carafe
    importlib.import_module('mmcv.ops.masked_conv').masked_conv2d = (
        masked_conv2d)


def standing_in(model: nn.Module) -> List[str]:
    """Types of modules in a model that use stand-ins."""
    return sorted({type(x).__name__ for x in model.modules()} & {*MODULES})


def carafe(features: Tensor, masks: Tensor, kernel_size: int, group_size: int,
           scale_factor: int) -> Tensor:
    """Upsample by a kernel of its own at each output.

    Wang et al., *CARAFE: Content-Aware ReAssembly of FEatures*, ICCV 2019,
    equation 3.

    Args:
        features (Tensor): Shape ``(N, C, H, W)``.
        masks (Tensor): The kernels, shape ``(N, G * K * K, S * H, S * W)``.
        kernel_size (int): ``K``, odd.
        group_size (int): ``G``, the groups of channels.
        scale_factor (int): ``S``.

    Returns:
        Tensor: Shape ``(N, C, S * H, S * W)``.
    """
    count, channels = features.shape[:2]
    size = masks.shape[-2:]
    windows = F.unfold(features, kernel_size, padding=kernel_size // 2)
    windows = windows.view(count, -1, *features.shape[2:])
    windows = F.interpolate(windows, scale_factor=scale_factor)
    windows = windows.view(count, group_size, channels // group_size,
                           kernel_size**2, *size)
    masks = masks.view(count, group_size, 1, kernel_size**2, *size)
    return (windows * masks).sum(3).view(count, channels, *size)


def masked_conv2d(features: Tensor,
                  mask: Tensor,
                  weight: Tensor,
                  bias: Optional[Tensor],
                  padding: int = 0,
                  stride: int = 1) -> Tensor:
    """A convolution that is zero where a mask is not above zero.

    Args:
        features (Tensor): Shape ``(1, C, H, W)``.
        mask (Tensor): Shape ``(1, H, W)``.
        weight (Tensor): Shape ``(P, C, K, K)``.
        bias (Tensor, optional): Shape ``(P, )``.
        padding (int): As of a convolution. Defaults to 0.
        stride (int): As of a convolution. Defaults to 1.

    Returns:
        Tensor: Shape ``(1, P, H, W)``.
    """
    return F.conv2d(features, weight, bias, stride, padding) * (mask > 0)
