# Copyright (c) mmbasis authors. All rights reserved.
"""How well the predicted loss of truncation agrees with the measured one."""
import copy
import time
from statistics import median
from typing import Any, Dict, Iterator, List, Sequence

import torch
import torch.nn as nn

from ..layers import BasisLayer
from ..planning import Analysis
from ..running import adapter_of, evaluation
from .recalibration import output_error
from .surgery import replace_modules


def single_truncations(model: nn.Module, analysis: Analysis,
                       batches: Sequence[Any]) -> Iterator[Dict[str, Any]]:
    """Truncate one layer at a time to half its full rank, on the subspace of
    its spectrum.

    Args:
        model (nn.Module): The dense model; it is as before afterwards.
        analysis (Analysis): What was measured of its layers.
        batches (Sequence): Held-out batches.

    Yields:
        dict: ``name``, ``rank``, ``predicted`` (increase of the loss; energy
        lost where no sensitivity is known) and ``measured`` (see
        :func:`output_error`).
    """
    reference = copy.deepcopy(model)
    for layer in analysis.selection.chosen:
        rank, dense = layer.full_rank // 2, layer.module
        known = analysis.statistics[layer.name]
        if rank == 0 or known.spectrum is None:
            continue
        basis = BasisLayer(dense, rank, bias=True)
        basis.project(dense, known.spectrum.vectors, known.mean)
        replace_modules(model, {dense: basis})
        try:
            measured = output_error(model, reference, batches)
        finally:
            replace_modules(model, {basis: dense})
        lost = known.spectrum.energy
        if known.sensitivity is not None:
            lost = known.sensitivity / 2
        yield dict(
            name=layer.name,
            rank=rank,
            predicted=float(lost[rank:].sum()),
            measured=measured)


def forward_latency(model: nn.Module, data: Any, repeats: int = 10) -> float:
    """Median time of a forward pass of a batch on this machine, in
    milliseconds, over ``repeats`` passes after two that do not count."""
    times: List[float] = []
    device = next(model.parameters()).device
    adapter = adapter_of(model)
    with evaluation(model):
        for _ in range(repeats + 2):
            start = time.perf_counter()
            adapter.outputs(data)
            if device.type == 'cuda':
                torch.cuda.synchronize(device)
            times.append(1e3 * (time.perf_counter() - start))
    return median(times[2:])
