# Copyright (c) mmbasis authors. All rights reserved.
from .compression_hook import BasisCompressionHook
from .epoch_seed_hook import EpochSeedHook
from .orthogonality_hook import OrthogonalityHook
from .progressive_truncation_hook import ProgressiveTruncationHook
from .recalibration_hook import RecalibrationHook
from .spectrum_hook import SpectrumHook

__all__ = [
    'BasisCompressionHook', 'EpochSeedHook', 'OrthogonalityHook',
    'ProgressiveTruncationHook', 'RecalibrationHook', 'SpectrumHook'
]
