# Copyright (c) mmbasis authors. All rights reserved.
"""The CIFAR networks of the paper."""
from collections import OrderedDict
from functools import partial
from typing import Any, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import Sequential
from torch import Tensor

from ..registry import MODELS
from ..utils.schema import COUNT, is_integer

#: initialisation of He et al., 2015, and BatchNorm scales of 1
HE_NORMAL = [
    dict(type='Kaiming', layer='Conv2d', mode='fan_in'),
    dict(type='Constant', layer='_BatchNorm', val=1)
]
#: without a bias, which a BatchNorm would cancel
_conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)


class CifarBackbone(Sequential):
    """Base of the networks, for images of 32x32 pixels: a chain of modules.

    Args:
        init_cfg (dict or list[dict], optional): Defaults to the
            initialisation of the sources, ``HE_NORMAL``.
    """

    def __init__(self, init_cfg: Any = None) -> None:
        super().__init__(init_cfg=HE_NORMAL if init_cfg is None else init_cfg)

    def _repeats(self, depth: int, step: int, fixed: int) -> int:
        """How often a network of ``step * n + fixed`` layers repeats."""
        COUNT.check(f'depth of {type(self).__name__}', depth)
        repeats, rest = divmod(depth - fixed, step)
        if repeats < 1 or rest:
            raise ValueError(
                f'depth of {type(self).__name__} must be {step}n + {fixed} '
                f'with n >= 1, but got {depth}')
        return repeats

    def forward(self, x: Tensor) -> Tuple[Tensor]:
        """Map images ``(N, in_channels, H, W)`` to one feature map."""
        return (super().forward(x), )


class CifarBasicBlock(nn.Sequential):
    """Two 3x3 convolutions with the parameter-free shortcut (option A).

    Where the shapes differ, the shortcut takes every second pixel and pads
    the new channels with zeros, half of them on either side.
    """

    def __init__(self, in_channels: int, out_channels: int,
                 stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        new = out_channels - in_channels
        self.padding = (0, 0, 0, 0, new // 2, new - new // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C_out, H/stride, W/stride)``."""
        out = super().forward(x)
        if x.shape != out.shape:
            x = F.pad(x[:, :, ::self.stride, ::self.stride], self.padding)
        return F.relu(out + x)


@MODELS.register_module()
class CifarResNet(CifarBackbone):
    """ResNet with option-A shortcuts, section 4.2 of `Deep Residual Learning
    for Image Recognition <https://arxiv.org/abs/1512.03385>`_; its output is
    ``(N, 64, H/4, W/4)``.

    Args:
        depth (int): 6n + 2, the number of weighted layers, classifier
            included: 20, 32, 44, 56 or 110 in the source.
        in_channels (int): Channels of the image. Defaults to 3.
        **kwargs: See :class:`CifarBackbone`.
    """

    def __init__(self, depth: int, in_channels: int = 3, **kwargs) -> None:
        super().__init__(**kwargs)
        repeats = self._repeats(depth, 6, 2)
        channels = 16
        self.conv1 = _conv3x3(in_channels, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        for i, out_channels in enumerate((16, 32, 64)):
            blocks = nn.Sequential()
            for j in range(repeats):
                stride = 2 if i > 0 and j == 0 else 1
                blocks.append(CifarBasicBlock(channels, out_channels, stride))
                channels = out_channels
            self.add_module(f'layer{i + 1}', blocks)


@MODELS.register_module()
class CifarVGG(CifarBackbone):
    """VGG, configurations A, B, D, E of `Very Deep Convolutional Networks for
    Large-Scale Image Recognition <https://arxiv.org/abs/1409.1556>`_, with
    BatchNorm and, as usual on CIFAR, one linear layer instead of the three
    large ones; its output is ``(N, 512, H/32, W/32)``.

    Args:
        depth (int): 11, 13, 16 or 19. Defaults to 16.
        in_channels (int): Channels of the image. Defaults to 3.
        **kwargs: See :class:`CifarBackbone`.
    """

    #: convolutions in each of the first two stages and of the other three
    arch_settings = {11: (1, 2), 13: (2, 2), 16: (2, 3), 19: (2, 4)}

    def __init__(self, depth: int = 16, in_channels: int = 3,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        if not is_integer(depth) or depth not in self.arch_settings:
            raise ValueError(f'depth of CifarVGG must be one of '
                             f'{sorted(self.arch_settings)}, but got {depth}')
        for i, channels in enumerate((64, 128, 256, 512, 512)):
            stage = nn.Sequential()
            for _ in range(self.arch_settings[depth][i > 1]):
                stage.append(_conv3x3(in_channels, channels))
                stage.append(nn.BatchNorm2d(channels))
                stage.append(nn.ReLU(inplace=True))
                in_channels = channels
            self.add_module(f'stage{i + 1}', stage.append(nn.MaxPool2d(2)))


class CifarDenseLayer(nn.Sequential):
    """BatchNorm, ReLU and a 3x3 convolution whose output, after dropout, is
    appended to the input."""

    def __init__(self, in_channels: int, growth_rate: int,
                 drop_rate: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU()
        self.conv1 = _conv3x3(in_channels, growth_rate)
        self.dropout = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to ``(N, C + growth_rate, H, W)``."""
        return torch.cat((x, super().forward(x)), dim=1)


@MODELS.register_module()
class CifarDenseNet(CifarBackbone):
    """Basic DenseNet (no bottleneck, no compression), section 3 of `Densely
    Connected Convolutional Networks <https://arxiv.org/abs/1608.06993>`_; its
    output is ``(N, out_channels, H/4, W/4)``.

    Args:
        depth (int): 3n + 4, the number of weighted layers, classifier
            included. Defaults to 40.
        growth_rate (int): Channels that each layer adds (k of the source).
            Defaults to 12.
        drop_rate (float): Dropout behind each convolution of the blocks; 0.2
            in the source without data augmentation. Defaults to 0.
        in_channels (int): Channels of the image. Defaults to 3.
        **kwargs: See :class:`CifarBackbone`.

    Attributes:
        out_channels (int): What the head needs as ``in_channels``.
    """

    def __init__(self, depth: int = 40, growth_rate: int = 12,
                 drop_rate: float = 0., in_channels: int = 3,
                 **kwargs) -> None:
        super().__init__(**kwargs)
        COUNT.check('growth_rate of CifarDenseNet', growth_rate)
        repeats = self._repeats(depth, 3, 4)
        channels = 16
        self.conv1 = _conv3x3(in_channels, channels)
        for i in range(1, 4):
            block = nn.Sequential()
            for _ in range(repeats):
                block.append(CifarDenseLayer(channels, growth_rate, drop_rate))
                channels += growth_rate
            self.add_module(f'block{i}', block)
            if i < 3:
                transition = OrderedDict(
                    bn1=nn.BatchNorm2d(channels),
                    relu=nn.ReLU(),
                    conv1=nn.Conv2d(channels, channels, 1, bias=False),
                    pool=nn.AvgPool2d(2))
                self.add_module(f'transition{i}', nn.Sequential(transition))
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.out_channels = channels
