# Copyright (c) mmbasis authors. All rights reserved.
from .compression_hook import BasisCompressionHook, ProgressiveTruncationHook
from .quantization_hook import QuantizationHook
from .training_hooks import (
    EpochSeedHook,
    OrthogonalityHook,
    RecalibrationHook,
    SpectrumHook,
)

__all__ = [
    'BasisCompressionHook', 'EpochSeedHook', 'OrthogonalityHook',
    'ProgressiveTruncationHook', 'QuantizationHook', 'RecalibrationHook',
    'SpectrumHook'
]
