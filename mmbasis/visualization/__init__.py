# Copyright (c) mmbasis authors. All rights reserved.
from .plots import (
    plot_curves,
    plot_losses,
    plot_ranks,
    plot_sensitivities,
    plot_spectra,
)

__all__ = [
    'plot_curves', 'plot_losses', 'plot_ranks', 'plot_sensitivities',
    'plot_spectra'
]
