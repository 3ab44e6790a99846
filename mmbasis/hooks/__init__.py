# Copyright (c) mmbasis authors. All rights reserved.
from .compression_hook import BasisCompressionHook, ProgressiveTruncationHook
from .integrity_hook import IntegrityHook
from .quantization_hook import QuantizationHook
from .training_hooks import (
    EpochSeedHook,
    OrthogonalityHook,
    RecalibrationHook,
    SpectrumHook,
)

__all__ = [
    'BasisCompressionHook', 'EpochSeedHook', 'IntegrityHook',
    'OrthogonalityHook', 'ProgressiveTruncationHook', 'QuantizationHook',
    'RecalibrationHook', 'SpectrumHook'
]
