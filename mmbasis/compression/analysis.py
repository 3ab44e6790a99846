# Copyright (c) mmbasis authors. All rights reserved.
"""How well the predicted loss of truncation agrees with the measured one."""
import copy
import time
from statistics import median
from typing import Any, Dict, Iterator, List, Sequence

import torch
import torch.nn as nn

from ..layers import BasisLayer
from ..planning import LayerInfo
from ..running import adapter_of, evaluation
from .recalibration import output_error
from .surgery import replace_modules


def single_truncations(model: nn.Module, layers: Sequence[LayerInfo],
                       batches: Sequence[Any]) -> Iterator[Dict[str, Any]]:
    """Truncate one layer at a time to half its full rank, on the subspace of
    its spectrum.

    Args:
        model (nn.Module): The dense model; it is as before afterwards.
        layers (Sequence[LayerInfo]): Its layers, analysed.
        batches (Sequence): Held-out batches.

    Yields:
        dict: ``name``, ``rank``, ``predicted`` (increase of the loss by the
        layer's sensitivities; energy lost where there are none) and
        ``measured`` (distance of the outputs from the dense ones, see
        :func:`output_error`).
    """
    reference = copy.deepcopy(model)
    for layer in layers:
        rank = layer.full_rank // 2 if layer.compressible else 0
        if rank == 0:
            continue
        dense = layer.module
        basis: BasisLayer = layer.kind(dense, rank, bias=True)
        basis.project(dense, layer.spectrum.vectors, layer.mean)
        replace_modules(model, {dense: basis})
        try:
            measured = output_error(model, reference, batches)
        finally:
            replace_modules(model, {basis: dense})
        lost = (
            layer.spectrum.energy
            if layer.sensitivity is None else layer.sensitivity / 2)
        yield dict(
            name=layer.name,
            rank=rank,
            predicted=float(lost[rank:].sum()),
            measured=measured)


def forward_latency(model: nn.Module, data: Any, repeats: int = 10) -> float:
    """Median time of a forward pass on this machine, in milliseconds.

    Args:
        model (nn.Module): The model.
        data (Any): A batch.
        repeats (int): Passes that count, after two that do not.
    """
    adapter = adapter_of(model)
    times: List[float] = []
    device = next(model.parameters()).device
    with evaluation(model):
        for _ in range(repeats + 2):
            start = time.perf_counter()
            adapter.outputs(data)
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
    return median(times[2:])
