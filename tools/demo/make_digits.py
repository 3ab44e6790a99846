# Copyright (c) mmbasis authors. All rights reserved.
"""Write scikit-learn's handwritten digits as an image folder.

They come with scikit-learn, so nothing is downloaded: 1797 images of 8x8
pixels, from the UCI set "Optical Recognition of Handwritten Digits". Of every
ten images of a class two go to ``test``, one to ``holdout`` (for choices,
calibration included) and seven to ``train``. The writers are the same in all
three, so the accuracy says nothing about digits of other people.
"""
import argparse
import os
import shutil
import tempfile
from collections import Counter

import cv2
import numpy as np
from sklearn.datasets import load_digits

SPLITS = ('test', 'train', 'train', 'holdout', 'train', 'test', 'train',
          'train', 'train', 'train')


def write_digits(root: str) -> Counter:
    """Write all images below a folder.

    Args:
        root (str): The new folder; gets ``<split>/<digit>/<number>.png``.

    Returns:
        Counter: Number of images of each split.
    """
    digits = load_digits()
    seen, counts = Counter(), Counter()
    for number, (image, label) in enumerate(zip(digits.images, digits.target)):
        split = SPLITS[seen[label] % len(SPLITS)]
        seen[label] += 1
        counts[split] += 1
        folder = os.path.join(root, split, str(label))
        os.makedirs(folder, exist_ok=True)
        # the source has 17 grey levels, 0 to 16
        grey = np.round(image * (255 / 16)).astype(np.uint8)
        path = os.path.join(folder, f'{number:04d}.png')
        if not cv2.imwrite(path, grey):
            raise OSError(f'cannot write {path}')
    return counts


def main() -> None:
    """Write the folder, whole or not at all."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    data = os.environ.get('MMBASIS_DATA', 'data')
    parser.add_argument(
        'dst',
        nargs='?',
        default=os.path.join(data, 'digits'),
        help='folder to make (default: $MMBASIS_DATA/digits, data/digits)')
    args = parser.parse_args()
    if os.path.exists(args.dst):
        print(f'{args.dst} exists already')
        return
    parent = os.path.dirname(os.path.abspath(args.dst))
    os.makedirs(parent, exist_ok=True)
    temporary = tempfile.mkdtemp(dir=parent)
    try:
        counts = write_digits(temporary)
        os.chmod(temporary, 0o755)
        os.rename(temporary, args.dst)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    print(f'wrote {args.dst}: {dict(counts)}')


if __name__ == '__main__':
    main()
