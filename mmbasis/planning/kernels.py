# Copyright (c) mmbasis authors. All rights reserved.
"""What a layer runs on a device: one kernel, or a few in one of its forms."""
from dataclasses import dataclass, replace
from typing import Optional, Tuple, Union

import numpy as np

Number = Union[int, float, np.ndarray]


@dataclass(frozen=True)
class Kernel:
    """One launched kernel. Fields are numbers or arrays that broadcast.

    Args:
        inputs (int | array): Input channels of a group.
        outputs (int | array): Output channels of a group.
        read_positions (float): Positions of the tensor that it reads, of all
            images.
        write_positions (float): Positions of the tensor that it writes.
        window (int): Weights for a pair of channels, 9 for 3x3; 0 for a
            kernel without weights (activation, pooling).
        groups (int): Groups of channels. Defaults to 1.
        weight_positions (float, optional): How often its weights are applied,
            as a transposed convolution does where it reads. Defaults to
            ``write_positions``.
        adds (bool): Whether it adds a tensor as large as its output, which it
            reads: a shortcut. Defaults to False.
    """
    inputs: Number
    outputs: Number
    read_positions: float
    write_positions: float
    window: int = 1
    groups: int = 1
    weight_positions: Optional[float] = None
    adds: bool = False

    @property
    def weights(self) -> Number:
        """Number of weights."""
        return self.groups * self.inputs * self.outputs * self.window

    @property
    def macs(self) -> Number:
        """Multiply-accumulates."""
        return self.weights * (
            self.write_positions
            if self.weight_positions is None else self.weight_positions)

    @property
    def read(self) -> Number:
        """Numbers of the tensor that it reads."""
        return self.groups * self.inputs * self.read_positions

    @property
    def written(self) -> Number:
        """Numbers of the tensor that it writes."""
        return self.groups * self.outputs * self.write_positions


@dataclass(frozen=True)
class Convolution:
    """A dense layer, as far as its MACs and its time depend on it.

    Args:
        in_channels (int): Input channels, of all groups.
        out_channels (int): Output channels, of all groups.
        window (int): Weights for a pair of channels; 1 for a linear layer.
        in_positions (float): Positions of an image (or tokens) at its input;
            images may differ.
        out_positions (float): The same at its output.
        groups (int): Groups of channels. Defaults to 1.
        batch (float): Images at once; a fraction is one of several calls for
            an image. Defaults to 1.
        weight_positions (float, optional): How often the weights are applied
            for an image, as at the input of a transposed convolution. Defaults
            to ``out_positions``.
        adds (bool): Whether a shortcut is added to its output. Defaults to
            False.
        sides (tuple[int, ...]): Of the window, for the spatial form.
        middle_positions (float, optional): Positions of an image behind the
            first half of the spatial form: as high as the output, as wide as
            the input.
    """
    in_channels: int
    out_channels: int
    window: int
    in_positions: float
    out_positions: float
    groups: int = 1
    batch: float = 1
    weight_positions: Optional[float] = None
    adds: bool = False
    sides: Tuple[int, ...] = ()
    middle_positions: Optional[float] = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ('adds', 'sides', 'middle_positions'):
                continue
            if value is not None and value <= 0:
                raise ValueError(f'{name} must be positive, got {value}')
        for name in ('in_channels', 'out_channels'):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f'{name}={getattr(self, name)} cannot be divided into '
                    f'{self.groups} groups')

    def kernels(self,
                rank: Optional[Number] = None,
                input_rank: Optional[Number] = None,
                spatial: bool = False) -> Tuple[Kernel, ...]:
        """The kernels of a form of the layer.

        Args:
            rank (int | array, optional): Basis filters of a group, followed
                by 1x1 coefficients; None for no output basis.
            input_rank (int | array, optional): Input basis of a group, a 1x1
                convolution in front at the resolution of the input; None for
                no input basis. Both None: the dense layer. Arrays of both
                broadcast, ``rank[:, None]`` and ``input_rank`` give a grid.
            spatial (bool): Whether basis and coefficients have a side each.

        Returns:
            tuple[Kernel]: One to three kernels, in the order they run;
            ValueError if a rank is below 1.
        """
        rank, input_rank = _ranks(rank), _ranks(input_rank)
        before = self.batch * self.in_positions
        after = self.batch * self.out_positions
        inputs: Number = self.in_channels // self.groups
        outputs: Number = self.out_channels // self.groups
        kernels = []
        if spatial:
            return self._lines(rank)
        if input_rank is not None:
            kernels.append(
                Kernel(inputs, input_rank, before, before, 1, self.groups))
            inputs = input_rank
        kernels.append(
            Kernel(inputs, outputs if rank is None else rank, before, after,
                   self.window, self.groups, self._at_weights))
        if rank is not None:
            kernels.append(
                Kernel(rank, outputs, after, after, 1, self.groups))
        kernels[-1] = replace(kernels[-1], adds=self.adds)
        return tuple(kernels)

    def _lines(self, rank: Optional[Number]) -> Tuple[Kernel, ...]:
        assert rank is not None and self.middle_positions
        middle = self.batch * self.middle_positions
        return (
            Kernel(self.in_channels // self.groups, rank,
                   self.batch * self.in_positions, middle, self.sides[0],
                   self.groups),
            Kernel(rank, self.out_channels // self.groups, middle,
                   self.batch * self.out_positions, self.sides[1], self.groups,
                   adds=self.adds))

    @property
    def _at_weights(self) -> Optional[float]:
        if self.weight_positions is None:
            return None
        return self.batch * self.weight_positions


def _ranks(ranks: Optional[Number]) -> Optional[Number]:
    """Arrays in 64 bits: in 32, the MACs of a grid overflow."""
    if ranks is None:
        return None
    wide = ranks if isinstance(ranks, int) else np.asarray(ranks, np.int64)
    if np.less(wide, 1).any():
        raise ValueError(f'ranks must be at least 1, got {np.min(wide)}')
    return wide
