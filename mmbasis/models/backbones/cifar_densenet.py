# Copyright (c) mmbasis authors. All rights reserved.
from typing import List, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule

from mmbasis.registry import MODELS

from .cifar_resnet import HE_NORMAL


class CifarDenseLayer(BaseModule):
    """BatchNorm, ReLU and a 3x3 convolution whose output, after dropout, is
    appended to the input."""

    def __init__(self, in_channels: int, growth_rate: int,
                 drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(
            in_channels, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C + growth_rate, H, W)``."""
        new = self.conv1(F.relu(self.bn1(x)))
        if self.drop_rate:
            new = F.dropout(new, self.drop_rate, self.training)
        return torch.cat((x, new), dim=1)


class CifarTransition(BaseModule):
    """BatchNorm, ReLU, a 1x1 convolution and 2x2 average pooling."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C, H/2, W/2)``."""
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


@MODELS.register_module()
class CifarDenseNet(BaseModule):
    """Basic DenseNet (no bottleneck, no compression) for 32x32 images.

    `Densely Connected Convolutional Networks
    <https://arxiv.org/abs/1608.06993>`_, section 3: a 3x3 convolution with
    16 channels, three dense blocks of ``(depth - 4) / 3`` layers with
    transitions between them.

    Args:
        depth (int): 3n + 4, the number of weighted layers, classifier
            included. Defaults to 40.
        growth_rate (int): Channels that each layer adds (k of the source).
            Defaults to 12.
        drop_rate (float): Dropout rate behind each 3x3 convolution of the
            blocks; the source uses 0.2 without data augmentation. Defaults
            to 0.
        in_channels (int): Channels of the image. Defaults to 3.
        init_cfg (dict or list[dict], optional): Defaults to the source's
            initialisation, ``HE_NORMAL``.

    Attributes:
        out_channels (int): Channels of the output: what the head needs as
            ``in_channels`` (448 for depth 40, growth rate 12).
    """

    def __init__(self,
                 depth: int = 40,
                 growth_rate: int = 12,
                 drop_rate: float = 0.,
                 in_channels: int = 3,
                 init_cfg: Union[dict, List[dict], None] = None) -> None:
        super().__init__(HE_NORMAL if init_cfg is None else init_cfg)
        if depth < 7 or (depth - 4) % 3:
            raise ValueError(f'depth of CifarDenseNet must be 3n + 4 with '
                             f'n >= 1 (40, 100, ...), but got {depth}')
        channels = 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        for i in range(1, 4):
            block = nn.Sequential()
            for _ in range((depth - 4) // 3):
                block.append(CifarDenseLayer(channels, growth_rate, drop_rate))
                channels += growth_rate
            self.add_module(f'block{i}', block)
            if i < 3:
                self.add_module(f'transition{i}', CifarTransition(channels))
        self.bn1 = nn.BatchNorm2d(channels)
        self.out_channels = channels

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor]:
        """Map images ``(N, in_channels, H, W)`` to one feature map
        ``(N, out_channels, H/4, W/4)``."""
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.transition2(self.block2(x))
        return (F.relu(self.bn1(self.block3(x))), )
