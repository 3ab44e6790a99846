# Copyright (c) mmbasis authors. All rights reserved.
"""Inputs of a model: random data, or the images of a folder."""
import os
import re
import zlib

from .util import BenchError

_MOST_NUMBERS = 1 << 28  # 1 GiB of fp32
_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.ppm')


def parse_shapes(texts):
    """Reads ``--input-shape`` values.

    Args:
        texts (list[str]): ``'1x3x224x224'`` (for a model with one input) or
            ``'name:1x3x224x224'``.

    Returns:
        dict[str, tuple[int]]: shapes by name; ``''`` for the nameless one.

    Raises:
        BenchError: a text has another form.
    """
    shapes = {}
    for text in texts or []:
        name, _, sizes = text.rpartition(':')
        shape = ()
        if re.match('[0-9]{1,9}(x[0-9]{1,9})*$', sizes.lower()):
            shape = tuple(int(s) for s in sizes.lower().split('x'))
        if not shape or min(shape) < 1:
            raise BenchError('--input-shape {}: expected NAME:1x3x224x224 or '
                             '1x3x224x224'.format(text))
        if name in shapes:
            raise BenchError('--input-shape {}: this input was given '
                             'before'.format(text))
        shapes[name] = shape
    return shapes


def resolve_shape(name, declared, shapes):
    """Fixes the open sizes of an input.

    Args:
        name (str): the input.
        declared (list): sizes; anything but a positive int is open.
        shapes (dict): see :func:`parse_shapes`.

    Returns:
        tuple[int]: an open first size (the batch) becomes 1.

    Raises:
        BenchError: another size is open and no shape is given, or the given
        shape contradicts the model.
    """
    given = shapes.get(name, shapes.get(''))
    fixed = [s if isinstance(s, int) and s > 0 else None for s in declared]
    if given:
        if len(given) != len(fixed) or any(
                f not in (None, g) for f, g in zip(fixed, given)):
            raise BenchError(
                'input {} has shape {}, which {} does not fit'.format(
                    name, declared, given))
        return given
    if fixed and fixed[0] is None:
        fixed[0] = 1
    if None in fixed:
        raise BenchError('input {} has open sizes {}: give --input-shape '
                         '{}:1x3x224x224'.format(name, declared, name))
    return tuple(fixed)


def takes_images(shape):
    """Tells whether an input takes pictures: N x 3 x H x W."""
    return len(shape) == 4 and shape[1] == 3


def make_input(name, shape, dtype, folder=None):
    """Makes the array for one input.

    Args:
        name (str): the input; its name seeds the random numbers, so that all
            back ends get the same data.
        shape (tuple[int]): full shape.
        dtype: numpy type.
        folder (str | None): images, for inputs of shape N x 3 x H x W; they
            are resized, scaled to zero mean and unit variance, and repeated
            to fill the batch. Timing does not depend on exact normalisation.

    Returns:
        numpy.ndarray: contiguous.

    Raises:
        BenchError: the folder has no readable images.
    """
    import numpy as np
    count = 1
    for size in shape:
        count *= size
    if count > _MOST_NUMBERS:
        raise BenchError('input {} of shape {} has {} numbers, more than this '
                         'tool makes ({}): is the shape right?'.format(
                             name, 'x'.join(map(str, shape)), count,
                             _MOST_NUMBERS))
    if folder and takes_images(shape):
        data = read_images(image_paths(folder, shape[0]), shape)
    else:
        seed = np.random.RandomState(zlib.crc32(name.encode()))
        if np.issubdtype(dtype, np.integer) or dtype == np.bool_:
            data = seed.randint(0, 2, shape)
        else:
            data = seed.standard_normal(shape)
    return np.ascontiguousarray(data, dtype=dtype)


def image_paths(folder, count):
    """Returns the first images of a folder, in order of their paths.

    Raises:
        BenchError: there is no such folder, or no image in it.
    """
    if not os.path.isdir(folder):
        raise BenchError('--images {}: no such folder'.format(folder))
    paths = sorted(
        os.path.join(root, f) for root, _, files in os.walk(folder)
        for f in files if f.lower().endswith(_SUFFIXES))[:count]
    if not paths:
        raise BenchError('--images {}: no {} files'.format(
            folder, ', '.join(_SUFFIXES)))
    return paths


def read_images(paths, shape):
    """Reads, resizes and normalises images; repeats them to fill the batch.

    Args:
        paths (list[str]): one or more.
        shape (tuple[int]): N x 3 x H x W.

    Returns:
        numpy.ndarray: fp32, each image of zero mean and unit variance.

    Raises:
        BenchError: no Pillow, or an image that cannot be read.
    """
    import numpy as np
    try:
        from PIL import Image
    except ImportError:
        raise BenchError('--images needs Pillow on the device: pip3 install '
                         'Pillow, or leave it out for random data') from None
    loaded = []
    for path in paths:
        try:
            image = Image.open(path).convert('RGB')
        except Exception as e:  # each format raises errors of its own
            raise BenchError('cannot read image {}: {}'.format(
                path, e)) from e
        pixels = np.asarray(image.resize((shape[3], shape[2])), np.float32)
        pixels = (pixels - pixels.mean()) / (pixels.std() + 1e-6)
        loaded.append(pixels.transpose(2, 0, 1))
    return np.stack([loaded[i % len(loaded)] for i in range(shape[0])])
