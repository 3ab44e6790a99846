# Copyright (c) mmbasis authors. All rights reserved.
from typing import List, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule

from mmbasis.registry import MODELS

#: initialisation of He et al., 2015, and BatchNorm scales of 1
HE_NORMAL = [
    dict(type='Kaiming', layer='Conv2d', mode='fan_in'),
    dict(type='Constant', layer='_BatchNorm', val=1)
]


class CifarBasicBlock(BaseModule):
    """Two 3x3 convolutions with the parameter-free shortcut (option A).

    Where the shapes differ, the shortcut takes every second pixel and pads
    the new channels with zeros, half of them on either side.

    Args:
        in_channels (int): Channels of the input.
        out_channels (int): Channels of the output.
        stride (int): Stride of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(
            in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(
            out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C_out, H/stride, W/stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride != 1:
            x = x[:, :, ::self.stride, ::self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + x)


@MODELS.register_module()
class CifarResNet(BaseModule):
    """ResNet for 32x32 images with option-A shortcuts.

    Section 4.2 of `Deep Residual Learning for Image Recognition
    <https://arxiv.org/abs/1512.03385>`_: one 3x3 convolution, then three
    stages of ``(depth - 2) / 6`` blocks with 16, 32 and 64 channels on maps
    of 32, 16 and 8 pixels.

    Args:
        depth (int): 6n + 2, the number of weighted layers, classifier
            included: 20, 32, 44, 56 or 110 in the source.
        in_channels (int): Channels of the image. Defaults to 3.
        init_cfg (dict or list[dict], optional): Defaults to the source's
            initialisation, ``HE_NORMAL``.
    """

    def __init__(self,
                 depth: int,
                 in_channels: int = 3,
                 init_cfg: Union[dict, List[dict], None] = None) -> None:
        super().__init__(HE_NORMAL if init_cfg is None else init_cfg)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(
                f'depth of CifarResNet must be 6n + 2 with n >= 1 '
                f'(20, 32, 44, 56, 110, ...), but got {depth}')
        channels = 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        for i, out_channels in enumerate((16, 32, 64)):
            blocks = []
            for j in range((depth - 2) // 6):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(CifarBasicBlock(channels, out_channels, stride))
                channels = out_channels
            self.add_module(f'layer{i + 1}', nn.Sequential(*blocks))

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor]:
        """Map images ``(N, in_channels, H, W)`` to one feature map
        ``(N, 64, H/4, W/4)``."""
        x = F.relu(self.bn1(self.conv1(x)))
        return (self.layer3(self.layer2(self.layer1(x))), )
