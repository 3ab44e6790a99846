# Copyright (c) mmbasis authors. All rights reserved.
from .calibration import calibration_dataloader
from .image_folder import ImageFolder

__all__ = ['ImageFolder', 'calibration_dataloader']
