# Copyright (c) mmbasis authors. All rights reserved.
"""Pure tensor mathematics: spectra, basis and coefficients, orthogonality.

Everything here works on stacks of matrices: a layer with ``G`` groups, ``P``
output channels and ``D`` weights per output channel is a tensor ``H`` of
shape ``(G, P / G, D)``. Nothing here knows a module, a registry or a runner.
"""
from .basis import factorize, merge, orthonormalize
from .orthogonality import orthogonality_error, orthogonality_penalty
from .regression import reduced_rank_regression
from .spectrum import Spectrum, spectrum_of_factor, spectrum_of_moment

__all__ = [
    'factorize', 'merge', 'orthonormalize', 'orthogonality_error',
    'orthogonality_penalty', 'reduced_rank_regression', 'Spectrum',
    'spectrum_of_factor', 'spectrum_of_moment'
]
