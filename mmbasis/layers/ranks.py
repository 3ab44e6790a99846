# Copyright (c) mmbasis authors. All rights reserved.
"""Which ranks and forms a basis layer can have."""
from typing import Optional, Type

import torch.nn as nn

from .kinds import DenseKind


def check_ranks(dense: nn.Module, kind: Type[DenseKind], rank: Optional[int],
                norm: bool, input_rank: Optional[int], spatial: bool) -> int:
    """Check arguments of a basis layer, see there.

    Returns:
        int: Weights of each basis filter.

    Raises:
        ValueError: If a rank is out of range, or the layer cannot have the
            form.
    """
    _, outputs, in_size = kind.matrix_shape(dense)
    inputs = kind.in_channels(dense)
    if spatial:
        _check_spatial(dense, kind, norm, input_rank)
        height, width = dense.weight.shape[2:]
        _check_rank('rank', rank, dense, min(height * inputs, width * outputs))
        return height * inputs
    if input_rank is not None:
        _check_rank('input rank', input_rank, dense,
                    0 if kind.why_one_sided(dense) else inputs)
        in_size = in_size // inputs * input_rank
    if rank is not None or input_rank is None:
        _check_rank('rank', rank, dense, min(outputs, in_size))
    return in_size


def _check_spatial(dense: nn.Module, kind: Type[DenseKind], norm: bool,
                   input_rank: Optional[int]) -> None:
    why_not = kind.why_not_spatial(dense)
    if norm or input_rank is not None:
        why_not = ('there is no normalization (padding would not be zero '
                   'behind it) and no input basis in it')
    if why_not:
        raise ValueError(f'a {type(dense).__name__} with weights of shape '
                         f'{tuple(dense.weight.shape)} cannot have this '
                         f'spatial form: {why_not}')


def _check_rank(name: str, rank: Optional[int], dense: nn.Module,
                largest: int) -> None:
    if rank is None or not 1 <= rank <= largest:
        raise ValueError(
            f'the {name} of a {type(dense).__name__} with weights of shape '
            f'{tuple(dense.weight.shape)} must be in [1, {largest}], but got '
            f'{rank}')
