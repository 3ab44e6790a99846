# Copyright (c) mmbasis authors. All rights reserved.
from __future__ import annotations

import os
from pathlib import Path

from mmengine.dataset import BaseDataset

from mmbasis.registry import DATASETS

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.ppm', '.bmp', '.pgm', '.tif')


@DATASETS.register_module()
class ImageFolder(BaseDataset):
    """Images in one folder per class: ``data_root/<class>/*.jpg``.

    Classes (sorted folder names) and samples (``img_path``, ``gt_label``) are
    those of mmpretrain's ``CustomDataset``. In addition it can hold out a part
    of the training images: nothing may be chosen on the test images.

    Args:
        data_root (str): Folder that holds one folder per class.
        part (str): ``'all'`` images; or ``'holdout'``, spread evenly over the
            sorted files of each class; or ``'train'``, the rest. Defaults to
            ``'all'``.
        holdout (float): Fraction held out, between 0 and 1. Defaults to 0.1.
        hint (str): How to get the images; ends the error for a missing
            folder. Defaults to ''.
        **kwargs: Other arguments of :class:`mmengine.dataset.BaseDataset`,
            such as ``pipeline`` and ``test_mode``.

    Raises:
        FileNotFoundError: If the folder is missing or holds no images.
        ValueError: If ``part`` or ``holdout`` is out of range.
    """

    def __init__(self,
                 data_root: str,
                 part: str = 'all',
                 holdout: float = 0.1,
                 hint: str = '',
                 **kwargs) -> None:
        if part not in ('all', 'train', 'holdout'):
            raise ValueError(f"part of ImageFolder must be 'all', 'train' or "
                             f"'holdout', but got {part!r}")
        if not 0 < holdout < 1:
            raise ValueError(f'holdout of ImageFolder is a fraction between '
                             f'0 and 1, but got {holdout!r}')
        self.part, self.holdout, self.hint = part, holdout, hint
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        """List ``img_path`` (str) and ``gt_label`` (int) of each image."""
        root = Path(self.data_root)
        folders = sorted(x for x in root.glob('*') if x.is_dir())
        data_list = []
        for label, folder in enumerate(folders):
            files = sorted(
                x for x in folder.iterdir() if x.suffix.lower() in EXTENSIONS)
            # one in every 1 / holdout files
            bounds = [int(i * self.holdout) for i in range(len(files) + 1)]
            data_list += [
                dict(img_path=str(file), gt_label=label)
                for file, a, b in zip(files, bounds, bounds[1:])
                if self.part in ('all', 'holdout' if b > a else 'train')
            ]
        if not data_list:
            found = ('it holds no images'
                     if root.is_dir() else 'there is no such folder')
            data = os.environ.get('MMBASIS_DATA', "not set, so it is 'data'")
            raise FileNotFoundError(
                f'No images in {root.absolute()}: {found}. Expected one '
                'folder of images per class there. The configs look below the '
                'folder that an environment variable names: MMBASIS_DATA is '
                f'{data}. {self.hint}'.rstrip())
        classes = tuple(x.name for x in folders)
        named = self._metainfo.setdefault('classes', classes)
        if len(named) != len(classes):
            raise ValueError(
                f'metainfo names {len(named)} classes, but {root} holds '
                f'{len(classes)} folders: {", ".join(classes)}')
        return data_list
