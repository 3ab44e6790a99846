# Copyright (c) mmbasis authors. All rights reserved.
"""Whether MMEngine counts what a plan says is saved."""
from typing import Any, Dict, Optional, Set

import torch
import torch.nn as nn

from mmbasis.planning import Analysis, CompressionPlan
from mmbasis.planning.statistics import LayerRecorder
from mmbasis.running import model_complexity

from .compare import forward


class MacCounter:
    """The MACs of a model before compression.

    Args:
        model (nn.Module): The dense model.
        image (Any): A batch of one image.
        analysis (Analysis): What was measured of its layers.

    Raises:
        Exception: If MMEngine cannot count it.
    """

    def __init__(self, model: nn.Module, image: Any,
                 analysis: Analysis) -> None:
        self.image = image
        self.before = model_complexity(model, image)['macs']
        with torch.no_grad(), LayerRecorder(analysis.layers) as recorder:
            forward(model, image, 'tensor')
            recorder.images = recorder.passes = 1
        traced = recorder.finish()
        #: how much more often layers run in mode tensor, which is counted,
        #: than in a test: heads of DETR and CondInst do
        self.times: Dict[str, float] = {
            name: traced[name].weight_positions /
            max(known.weight_positions, 1)
            for name, known in analysis.statistics.items()
        }

    def check(self, model: nn.Module, plan: CompressionPlan,
              unused: Set[str]) -> Dict[str, Optional[float]]:
        """Compare what is saved with what is planned.

        Args:
            model (nn.Module): The compressed model.
            plan (CompressionPlan): What was done.
            unused (set[str]): Layers that nobody makes use of, which may be
                missing in the trace.

        Returns:
            dict: MACs before and after, and how many were to be saved.

        Raises:
            AssertionError: If they differ, or the counter fails.
        """
        try:
            after = model_complexity(model, self.image)['macs']
        except Exception as error:
            raise AssertionError(f'the counter fails: {error}') from error
        saved = self.before - after
        planned, used = (
            sum((x.macs[0] - x.macs[1]) * self.times[name]
                for name, x in plan.layers.items() if name not in left_out)
            for left_out in ((), unused))
        # the number of proposals depends on the weights
        loose = hasattr(model, 'roi_head')
        # deformable convolutions of MMCV pad what is smaller than the kernel
        if not (loose and saved > 0 or any(-.01 <= (saved - x) / planned <= .05
                                           for x in (planned, used))):
            raise AssertionError(f'{saved} MACs are saved, {planned} planned')
        return dict(before=self.before, after=after, planned=planned)
