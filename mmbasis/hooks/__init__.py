# Copyright (c) mmbasis authors. All rights reserved.
from .basis_hooks import OrthogonalityHook, SpectrumHook
from .compression_hook import BasisCompressionHook, ProgressiveTruncationHook
from .epoch_seed_hook import EpochSeedHook
from .recalibration_hook import RecalibrationHook

__all__ = [
    'BasisCompressionHook', 'EpochSeedHook', 'OrthogonalityHook',
    'ProgressiveTruncationHook', 'RecalibrationHook', 'SpectrumHook'
]
