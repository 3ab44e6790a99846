# Copyright (c) mmbasis authors. All rights reserved.
"""The CIFAR networks of the paper."""
from .cifar_densenet import CifarDenseNet
from .cifar_resnet import CifarResNet
from .cifar_vgg import CifarVGG

__all__ = ['CifarDenseNet', 'CifarResNet', 'CifarVGG']
