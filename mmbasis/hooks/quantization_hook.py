# Copyright (c) mmbasis authors. All rights reserved.
from typing import Optional

from mmengine.hooks import Hook
from mmengine.runner import Runner

from ..compression import basis_layers, take_batches
from ..datasets import calibration_dataloader
from ..models import unwrap
from ..models.int8 import (
    INT8_KEY,
    FakeQuantization,
    InputScales,
    measure_scales,
)
from ..optim import bare_model
from ..registry import HOOKS
from ..utils.collectives import shared_errors
from ..utils.schema import COUNT
from .compression_hook import ProgressiveTruncationHook


@HOOKS.register_module()
class QuantizationHook(Hook):
    """Fine-tune for int8, the last step before the export.

    Before the first iteration the inputs of all convolutions and linear
    layers, bases and coefficients among them, are calibrated on training
    images with the transforms of testing. From then on these layers compute
    with int8's values, in training, validation and test:
    :class:`mmbasis.models.int8.FakeQuantization`. Weights are rounded per
    output channel, inputs per tensor, symmetrically.

    The steps stay as they were calibrated. They are all the state that there
    is: :attr:`scales`, which every checkpoint carries in its ``meta``. A run
    that loads such a checkpoint, to resume, to train or to test, takes them
    from there; ``tools/deploy.py --precision int8`` writes them into the
    graph.

    A RuntimeError is raised for normalisations between basis and coefficients,
    and beside ProgressiveTruncationHook.

    Args:
        num_batches (int): Training batches for calibration, at least 1, or a
            ValueError is raised. Defaults to 32.
    """

    # after BasisCompressionHook has compressed the model
    priority = 'LOW'

    def __init__(self, num_batches: int = 32) -> None:
        COUNT.check('QuantizationHook: num_batches', num_batches)
        self.num_batches = num_batches
        #: of the checkpoint, or calibrated; None before either
        self.scales: Optional[InputScales] = None
        self._active: Optional[FakeQuantization] = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the scales of a checkpoint."""
        self.scales = InputScales.of(checkpoint) or self.scales

    def before_train(self, runner: Runner) -> None:
        """Calibrate, unless the checkpoint did, and begin to round."""
        if any(isinstance(x, ProgressiveTruncationHook)
               for x in runner.hooks):
            raise RuntimeError(
                'QuantizationHook trains layers that stay: lower the ranks by '
                'ProgressiveTruncationHook in a run before')
        if any(x.norm is not None for _, x in basis_layers(runner.model)):
            raise RuntimeError(
                'the model has normalisations between basis and coefficients '
                '(norm=True), which the export folds into the coefficients: '
                'their inputs on the device are not those of training. '
                'Compress with norm=False for int8')
        if self.scales is None:
            with shared_errors('calibration of int8'):
                batches, _ = take_batches(
                    calibration_dataloader(runner, runner.seed),
                    self.num_batches)
                self.scales = measure_scales(
                    unwrap(bare_model(runner)), batches)
        runner.logger.info('Int8: %d layers are trained with rounded inputs '
                           'and weights', len(self.scales.layers))
        self._begin(runner, self.scales)

    def before_test(self, runner: Runner) -> None:
        """Round in a test, too; an error if nothing says how."""
        if self.scales is None:
            raise RuntimeError(
                'QuantizationHook tests in int8, but the checkpoint carries '
                'no scales: train with this hook first, or drop it')
        self._begin(runner, self.scales)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Put the scales into ``meta``."""
        if self.scales is not None:
            checkpoint['meta'][INT8_KEY] = self.scales.to_dict()

    def _begin(self, runner: Runner, scales: InputScales) -> None:
        if self._active is not None:
            self._active.remove()
        self._active = FakeQuantization(unwrap(bare_model(runner)), scales)
