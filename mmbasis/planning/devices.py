# Copyright (c) mmbasis authors. All rights reserved.
"""How long a layer takes on a device, from data sheets.

A roofline: a kernel takes the longer of its arithmetic and its memory traffic,
and its launch on top. Numbers may be arrays that broadcast: one call times a
whole grid of ranks. It is not a measurement. What it assumes:

- A convolution, its bias, BatchNorm, activation and the sum with a shortcut
  are one kernel, which reads the shortcut, too. In a form these are its last
  kernel's: nothing stands between its parts. All else in a network (other
  activations, pooling, concatenation) only moves data, and takes as long as
  before: see :class:`~mmbasis.running.TrafficWatch`.
- Each kernel of a form reads what the one before wrote: behind an input basis,
  the k x k one reads its few channels, and so on.
- Channels fill whole blocks: outputs are computed in multiples of
  ``Device.tile``, inputs in multiples of ``Device.alignment``. Grouped
  convolutions have kernels of their own, with blocks of ``alignment``;
  depthwise ones pad nothing.
- A tensor with a misaligned number of channels is now and then copied to a
  padded one before it is read (``COPIES`` times on average).
- Few outputs do not fill the machine: see ``HALF_FULL``. On a CPU, few output
  channels use what is loaded too little: see ``Device.half_wide``.
- ONNX Runtime on a CPU (``Device.blocked``) has blocks of channels. Inputs
  fill whole blocks, fewer than one are copied. Each core takes whole spans of
  ``SPAN`` blocks of outputs, where there are several: 80 outputs on two cores
  take as long as 128 (measured: 160 and 260 GMAC/s). Each span reads the
  tensor again. Weights move during arithmetic, tensors do not.
- A tensor smaller than half the last cache stays there for the next kernel and
  moves at ``CACHE_SPEED``; from the whole cache on it goes through memory.
  This holds for the tensor between two parts of a layer as for the layer's
  input and output. Weights always come from memory.
- 3x3 convolutions of stride 1 need ``Device.winograd`` times less arithmetic,
  1x1 parts of a form never do: there, half the MACs are not half the time.
"""
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Dict, Iterable, Optional, Tuple, Union

import numpy as np
import torch

from .kernels import Kernel, Number

# Shares of a data sheet's figures that large layers reach (cuDNN, TensorRT,
# oneDNN): half of tensor cores, 0.7 of ordinary ones and of the memory.
TENSOR_CORES, ORDINARY, MEMORY = 0.5, 0.7, 0.7
# L2 against memory bandwidth: 2 to 4 on the GPUs below
CACHE_SPEED = 3.0
# Outputs per processor (SM or core) at which arithmetic runs at half speed:
# four warps of 32 threads with 4 outputs each
HALF_FULL = 512.0
# Copy kernels per misaligned tensor: TensorRT built 13 for a ResNet-50 with 35
# arbitrary ranks, none for multiples of 8
COPIES = 0.4
# Blocks of outputs that a core of a CPU computes together (MLAS)
SPAN = 4
# A product of 4x4 tiles needs 16 multiplications where 2x2 outputs of a 3x3
# window need 36: F(2x2, 3x3) of Lavin and Gray, arXiv 1509.09308
WINOGRAD = 2.25
MIN_WINOGRAD_INPUTS = 16


@dataclass(frozen=True)
class Device:
    """What a device can do, with one precision.

    Args:
        name (str): Name of the preset, ``'xavier-fp16'``.
        peak (float): Multiply-accumulates per second (half the FLOP/s),
            without sparsity.
        bandwidth (float): Bytes per second of its memory.
        launch (float): Seconds from one kernel to the next.
        number_bytes (int): Bytes of a number.
        cache (float): Bytes of the last cache before the memory.
        processors (int): Streaming multiprocessors of a GPU, cores of a CPU.
        tile (int): Output channels are computed in multiples of this.
        alignment (int): Channels should be multiples of this, 1 for any.
        achieved (float): Share of ``peak`` that large layers reach.
        winograd (float): By how much 3x3 convolutions of stride 1 need less
            arithmetic. Defaults to 1.0.
        half_wide (float): Output channels at which arithmetic runs at half
            its speed, because what is loaded is used for few of them.
            Defaults to 0.0.
        misaligned (float): How much longer arithmetic on misaligned inputs
            takes, beside the copies. Defaults to 1.0.
        blocked (bool): Whether tensors lie in blocks of ``tile`` channels, as
            ONNX Runtime's on a CPU: see the assumptions. Defaults to False.
        overlaps (bool): Whether tensors move during arithmetic, as weights
            always do. Defaults to True.
    """
    name: str
    peak: float
    bandwidth: float
    launch: float
    number_bytes: int
    cache: float
    processors: int
    tile: int
    alignment: int
    achieved: float
    winograd: float = 1.0
    half_wide: float = 0.0
    misaligned: float = 1.0
    blocked: bool = False
    overlaps: bool = True

    def time(self, kernels: Iterable[Kernel]) -> Number:
        """Seconds of some kernels, one after the other."""
        return reduce(add, map(self.kernel_time, kernels), 0.0)

    def kernel_time(self, kernel: Kernel) -> Number:
        """Seconds of one kernel, its launch included."""
        work, speed = self._arithmetic(kernel), self.bandwidth * MEMORY
        weights = kernel.weights * self.number_bytes / speed
        tensors = (
            self._moved(kernel.read) * self._reads(kernel)
            + self._moved(kernel.written) * (1 + kernel.adds)) / speed
        seconds = np.maximum(work, weights + tensors * self.overlaps)
        return (seconds + tensors * (not self.overlaps) + self.launch
                + self._copy(kernel))

    def _arithmetic(self, kernel: Kernel) -> Number:
        """Seconds of the arithmetic, with padding and idle processors."""
        if kernel.window == 0:
            return 0.0
        inputs, outputs = self._computed(kernel)
        share = (
            kernel.groups * outputs * kernel.write_positions / self.processors)
        speed = self.peak * self.achieved * share / (share + HALF_FULL)
        speed = speed * outputs / (outputs + self.half_wide)
        if (kernel.window == 9 and kernel.groups == 1
                and kernel.read_positions == kernel.write_positions):
            # the image's three channels are not worth the transforms
            inputs = np.minimum(
                inputs,
                np.maximum(inputs, MIN_WINOGRAD_INPUTS) / self.winograd)
        slower = np.where(self._misaligned(kernel), self.misaligned, 1.0)
        padding = inputs * outputs / (kernel.inputs * kernel.outputs)
        return kernel.macs * padding * slower / speed

    def _computed(self, kernel: Kernel) -> Tuple[Number, Number]:
        """Inputs and outputs of a group with what pads them."""
        tile = self.tile if kernel.groups == 1 else self.alignment
        depthwise = np.logical_and(kernel.groups > 1, kernel.inputs == 1)
        inputs = _padded(kernel.inputs, self.alignment)
        outputs = _padded(kernel.outputs, tile)
        if self.blocked and kernel.groups == 1:
            inputs = np.where(inputs < tile, inputs, _padded(inputs, tile))
            if self.processors > 1:  # one gets a whole span
                span = SPAN * tile
                outputs = np.where(
                    outputs < span, outputs, _padded(outputs, span))
        return (np.where(depthwise, 1, inputs),
                np.where(depthwise, kernel.outputs, outputs))

    def _reads(self, kernel: Kernel) -> Number:
        """How often a tensor is read: for each span of outputs."""
        if not self.blocked or kernel.groups > 1 or kernel.window == 0:
            return 1
        return -(-kernel.outputs // (SPAN * self.tile))

    def _moved(self, numbers: Number) -> Number:
        """Bytes of a tensor that count as memory traffic."""
        size = numbers * self.number_bytes
        cached = np.clip(2 - size / (self.cache / 2), 0, 1)
        return size * (1 - cached * (1 - 1 / CACHE_SPEED))

    def _copy(self, kernel: Kernel) -> Number:
        """Seconds for copies of a tensor whose channels are misaligned."""
        moved = 2 * self._moved(kernel.read)
        copy = self.launch + moved / (self.bandwidth * MEMORY)
        channels = kernel.groups * kernel.inputs
        narrow = self.blocked & (channels > self.alignment) & (
            channels < self.tile)
        copies = np.where(self._misaligned(kernel), COPIES, 0.0)
        return copy * np.where(narrow, 1.0, copies)

    def _misaligned(self, kernel: Kernel) -> Union[bool, np.ndarray]:
        """Whether it reads a number of channels that the device dislikes; an
        image's three have kernels of their own."""
        channels = kernel.groups * kernel.inputs
        return np.logical_and(
            channels > self.alignment, channels % self.alignment != 0)


def _padded(number: Number, multiple: int) -> Number:
    return -(-number // multiple) * multiple


def _gpu(name: str, tera_macs: float, gigabytes: float, microseconds: float,
         cache_mb: float, processors: int) -> Device:
    """A GPU that computes on tensor cores in half precision."""
    return Device(
        name, tera_macs * 1e12, gigabytes * 1e9, microseconds * 1e-6, 2,
        cache_mb * 2**20, processors, tile=32, alignment=8,
        achieved=TENSOR_CORES)


# Peaks are dense (no sparsity), in the full power mode. Launches (in an engine
# or a CUDA graph) are in no data sheet: estimates.
_PRESETS = (
    # Jetson AGX Xavier series data sheet: 8 SMs, 64 tensor cores at 1377 MHz
    # (11.3 TFLOP/s), LPDDR4x 137 GB/s; L2 of 512 KB by deviceQuery
    _gpu('xavier-fp16', 5.64, 137, 8, 0.5, 8),
    # the same board: 512 cores at 1377 MHz (1.41 TFLOP/s); cuDNN and TensorRT
    # run volta_scudnn_winograd for its 3x3 convolutions
    Device(
        'xavier-fp32', 0.705e12, 137e9, 8e-6, 4, 2**19, 8, tile=32,
        alignment=1, achieved=ORDINARY, winograd=WINOGRAD),
    # Jetson Orin NX series data sheet, 16 GB: 8 SMs, 32 tensor cores at
    # 918 MHz (60 sparse INT8 TOP/s are 15 fp16 TFLOP/s), 102 GB/s; L2 assumed
    _gpu('orin-nx-fp16', 7.5, 102.4, 5, 2, 8),
    # Jetson AGX Orin technical brief, 64 GB: 16 SMs, 64 tensor cores at
    # 1.3 GHz (170 sparse INT8 TOP/s are 42 fp16 TFLOP/s), 205 GB/s, L2 4 MB
    _gpu('orin-agx-fp16', 21.2, 204.8, 5, 4, 16),
    # T4 data sheet and Turing white paper: 65 TFLOP/s, 320 GB/s, 40 SMs, 4 MB
    _gpu('t4-fp16', 32.5, 320, 4, 4, 40),
    # GA102 white paper: 71 TFLOP/s with fp32 accumulation, 936 GB/s, 82 SMs,
    # 6 MB
    _gpu('rtx3090-fp16', 35.6, 936, 3, 6, 82),
    # A100 data sheet, SXM 40 GB: 312 TFLOP/s, 1555 GB/s, 108 SMs, 40 MB
    _gpu('a100-fp16', 156, 1555, 3, 40, 108),
    # H100 data sheet, SXM: 989 TFLOP/s, 3.35 TB/s, 132 SMs, 50 MB
    _gpu('h100-fp16', 495, 3350, 2.5, 50, 132),
    # two cores at 4 GHz with two AVX-512 multiply-adds a cycle (16 numbers
    # each), two channels of DDR5 (77 GB/s), partly used by others, 32 MB of
    # the last cache; ONNX Runtime, whose layout has blocks of 16 channels
    # (NCHWc), reaches the peak; some microseconds a node. Measured:
    # docs/results/roofline.md
    Device(
        'cpu', 256e9, 60e9, 5e-6, 4, 2**25, 2, tile=16, alignment=4,
        achieved=1., half_wide=1, misaligned=1.5, blocked=True,
        overlaps=False),
)
DEVICES: Dict[str, Device] = {preset.name: preset for preset in _PRESETS}


def device(name: str) -> Device:
    """A preset by its name; a ValueError lists the names there are."""
    try:
        return DEVICES[name]
    except KeyError:
        raise ValueError(
            f'no device model is named {name!r}; there are: '
            + ', '.join(DEVICES)) from None


def device_at_hand() -> Optional[Device]:
    """The preset of the machine that this runs on.

    Returns:
        Device | None: ``'cpu'`` without CUDA. Else the first preset with the
        name and the number of processors of PyTorch's current GPU; None if
        there is none.
    """
    if not torch.cuda.is_available():
        return DEVICES['cpu']
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = found.name.lower().replace(' ', '')
    # a Jetson's name is that of its family only: 'Xavier', 'Orin'
    return next(
        (x for x in _PRESETS if x.name.split('-')[0] in name
         and x.processors == found.multi_processor_count), None)
