# Copyright (c) mmbasis authors. All rights reserved.
"""Turn the ResNet-56 weights of the paper's authors into a checkpoint for
``configs/mmpretrain/resnet56_cifar10.py``.

Source: https://github.com/mtayyab454/CNN-compression-ICIP2021
"""
import argparse
import os
import pickle
import tempfile
from collections import OrderedDict

import torch

from mmbasis.models.backbones import CifarResNet

# the order of the source's outputs: also that of sorted folder names
CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog',
           'horse', 'ship', 'truck')


def read_weights(path: str) -> dict:
    """Read a state dict, bare or under ``state_dict``.

    Args:
        path (str): Source file.

    Returns:
        dict[str, Tensor]: Weights, without a ``module.`` in front of keys.

    Raises:
        ValueError: If the file does not hold a state dict.
    """
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f'{path} is not a readable file of weights (truncated, or not '
            f'written by torch.save): {error}') from error
    if isinstance(content, dict):
        content = content.get('state_dict', content)
    if not isinstance(content, dict) or not all(
            isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(
            f'{path} must hold a state dict, but holds {type(content)}')
    return {
        key[len('module.'):] if key.startswith('module.') else key: value
        for key, value in content.items()
    }


def convert(weights: dict, depth: int = 56) -> OrderedDict:
    """Rename the keys and check that they fit the network.

    Args:
        weights (dict[str, Tensor]): Weights with the source's keys.
        depth (int): Depth of the network. Defaults to 56.

    Returns:
        OrderedDict: Weights with mmpretrain's keys.

    Raises:
        ValueError: If keys or shapes are not those of the network.
    """
    expected = {
        f'backbone.{key}': value.shape
        for key, value in CifarResNet(depth).state_dict().items()
    }
    expected['head.fc.weight'] = torch.Size([len(CLASSES), 64])
    expected['head.fc.bias'] = torch.Size([len(CLASSES)])
    state_dict = OrderedDict()
    for key, value in weights.items():
        if key.startswith('linear.'):
            key = key.replace('linear.', 'head.fc.', 1)
        else:
            key = f'backbone.{key}'
        state_dict[key] = value
    missing = sorted(set(expected) - set(state_dict))
    surplus = sorted(set(state_dict) - set(expected))
    if missing or surplus:
        raise ValueError(
            f'not the weights of ResNet-{depth}: {len(missing)} keys missing '
            f'{missing[:3]}, {len(surplus)} keys unknown {surplus[:3]} '
            f'(names after conversion)')
    for key, shape in expected.items():
        if state_dict[key].shape != shape:
            raise ValueError(
                f'not the weights of ResNet-{depth}: {key} has shape '
                f'{tuple(state_dict[key].shape)}, expected {tuple(shape)}')
    return state_dict


def save(checkpoint: dict, path: str) -> None:
    """Write the checkpoint whole or not at all."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, suffix='.tmp')
    os.close(handle)
    try:
        torch.save(checkpoint, temporary)
        os.replace(temporary, path)
    except BaseException:
        os.remove(temporary)
        raise


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='weights of the authors')
    parser.add_argument('dst', help='checkpoint to write')
    args = parser.parse_args()
    try:
        if not os.path.isfile(args.src):
            raise ValueError(f'{args.src} does not exist')
        state_dict = convert(read_weights(args.src))
    except ValueError as error:
        parser.error(str(error))
    meta = dict(dataset_meta=dict(classes=CLASSES), source=args.src)
    save(dict(meta=meta, state_dict=state_dict), args.dst)
    print(f'wrote {args.dst}: {len(state_dict)} tensors')


if __name__ == '__main__':
    main()
