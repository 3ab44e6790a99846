# Copyright (c) mmbasis authors. All rights reserved.
from typing import List, Tuple, Union

import torch
import torch.nn as nn
from mmengine.model import BaseModule

from mmbasis.registry import MODELS

from .cifar_resnet import HE_NORMAL


@MODELS.register_module()
class CifarVGG(BaseModule):
    """VGG with BatchNorm for 32x32 images.

    The convolutions of `Very Deep Convolutional Networks for Large-Scale
    Image Recognition <https://arxiv.org/abs/1409.1556>`_ (configurations A,
    B, D, E); as usual on CIFAR, BatchNorm follows each of them and one linear
    layer takes the place of the three large ones.

    Args:
        depth (int): 11, 13, 16 or 19. Defaults to 16.
        in_channels (int): Channels of the image. Defaults to 3.
        init_cfg (dict or list[dict], optional): Initialisation. Defaults to
            ``HE_NORMAL``.
    """

    # convolutions in each of the five stages
    arch_settings = {
        11: (1, 1, 2, 2, 2),
        13: (2, 2, 2, 2, 2),
        16: (2, 2, 3, 3, 3),
        19: (2, 2, 4, 4, 4)
    }
    stage_channels = (64, 128, 256, 512, 512)

    def __init__(self,
                 depth: int = 16,
                 in_channels: int = 3,
                 init_cfg: Union[dict, List[dict], None] = None) -> None:
        super().__init__(HE_NORMAL if init_cfg is None else init_cfg)
        if depth not in self.arch_settings:
            raise ValueError(f'depth of CifarVGG must be one of '
                             f'{sorted(self.arch_settings)}, but got {depth}')
        channels = in_channels
        stages = zip(self.arch_settings[depth], self.stage_channels)
        for i, (num_convs, out_channels) in enumerate(stages):
            layers: List[nn.Module] = []
            for _ in range(num_convs):
                # no bias: the BatchNorm behind it would cancel it
                layers += [
                    nn.Conv2d(
                        channels, out_channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True)
                ]
                channels = out_channels
            layers.append(nn.MaxPool2d(2))
            self.add_module(f'stage{i + 1}', nn.Sequential(*layers))

    def forward(self, x: torch.Tensor) -> Tuple[torch.Tensor]:
        """Map images ``(N, in_channels, H, W)``, ``H`` and ``W`` at least 32,
        to one feature map ``(N, 512, H/32, W/32)``."""
        for stage in self.children():
            x = stage(x)
        return (x, )
