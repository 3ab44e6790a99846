# Copyright (c) mmbasis authors. All rights reserved.
"""Stand-ins for operators that mmcv knows on accelerators only.

They compute the same from tensors, slowly. Dense and compressed model run with
them, so that models with such operators can be checked on a CPU, too.
"""
import importlib
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmcv.ops import roi_align
from torch import Tensor

#: modules that call them
MODULES = ('CARAFEPack', 'DeformRoIPoolPack', 'MaskedConv2d',
           'ModulatedDeformRoIPoolPack')


def install() -> None:
    """Let mmcv's modules call the stand-ins, in this process."""
    for module, function in (('carafe', carafe), ('deform_roi_pool',
                                                  deform_roi_pool),
                             ('masked_conv', masked_conv2d)):
        setattr(
            importlib.import_module(f'mmcv.ops.{module}'), function.__name__,
            function)


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


def deform_roi_pool(features: Tensor,
                    rois: Tensor,
                    offset: Optional[Tensor],
                    output_size: Tuple[int, int],
                    spatial_scale: float = 1.,
                    sampling_ratio: int = 0,
                    gamma: float = .1) -> Tensor:
    """Mean of each bin of a region, with bins that are moved; the offsets get
    no gradient.

    Dai et al., *Deformable Convolutional Networks*, ICCV 2017, equation 5.

    Args:
        features (Tensor): Shape ``(N, C, H, W)``.
        rois (Tensor): Index, left, top, right, bottom, shape ``(R, 5)``.
        offset (Tensor, optional): By how much, across and down, shape
            ``(R, 2, K, L)``. Defaults to zero.
        output_size (tuple[int, int]): ``(K, L)``.
        spatial_scale (float): Of the features. Defaults to 1.
        sampling_ratio (int): As of RoIAlign. Defaults to 0.
        gamma (float): Offsets are in units of this times the region's size.
            Defaults to 0.1.

    Returns:
        Tensor: Shape ``(R, C, K, L)``.
    """
    rows, columns = output_size
    size = (rois[:, 3:] - rois[:, 1:3])[..., None, None]
    down, across = torch.meshgrid(
        torch.arange(rows), torch.arange(columns), indexing='ij')
    shift = torch.stack([across / columns, down / rows]).to(rois)
    if offset is not None:
        shift = shift + gamma * offset
    starts = rois[:, 1:3, None, None] + size * shift
    bin_size = size / rois.new_tensor([columns, rows]).view(2, 1, 1)
    boxes = torch.cat([starts, starts + bin_size], 1)
    boxes = boxes.permute(0, 2, 3, 1).flatten(0, 2)
    index = rois[:, :1].repeat_interleave(rows * columns, 0)
    bins = roi_align(features, torch.cat([index, boxes], 1), 1, spatial_scale,
                     sampling_ratio)
    bins = bins.view(len(rois), rows, columns, -1)
    return bins.permute(0, 3, 1, 2).contiguous()


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
