# Copyright (c) mmbasis authors. All rights reserved.
from .backbones import CifarDenseNet, CifarResNet, CifarVGG
from .basis_model import BasisModel, unwrap
from .builder import (
                      build_compressed,
                      build_dense,
                      dense_architecture,
                      load_compressed,
                      standalone_config,
)

__all__ = [
    'CifarDenseNet', 'CifarResNet', 'CifarVGG', 'BasisModel', 'unwrap',
    'build_compressed', 'build_dense', 'dense_architecture', 'load_compressed',
    'standalone_config'
]
