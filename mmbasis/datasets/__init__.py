# Copyright (c) mmbasis authors. All rights reserved.
from .image_folder import ImageFolder

__all__ = ['ImageFolder']
