# Copyright (c) mmbasis authors. All rights reserved.
"""Pictures of spectra and plans, each written to a PNG at ``path``. They need
matplotlib, as the extra ``mmbasis[plots]`` installs it."""
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Sequence

import numpy as np
from torch import Tensor

from .planning import Analysis, CompressionPlan
from .utils.io import whole_file

#: colours of the forms that a layer may have
FORM_COLORS = dict(output='tab:blue', input='tab:green', both='tab:purple',
                   spatial='tab:red')


@contextmanager
def _axes(path: str, width: float, height: float, rows: int = 1,
          **labels: Any) -> Iterator[Any]:
    """Axes outside pyplot, which has global state; then writes the PNG."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width, height), layout='constrained')
    yield figure.subplots(rows, sharex=True, subplot_kw=labels)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format='png')


def _lost(energy: Tensor) -> np.ndarray:
    """What each rank loses, from rank 0 to the full one."""
    return np.append(energy.cpu().numpy()[::-1].cumsum()[::-1], 0)


def plot_spectra(analysis: Analysis, plan: CompressionPlan,
                 path: str) -> None:
    """Draw what each rank would lose, and the ranks that were chosen, of the
    layers in a plan; the analysis has their spectra."""
    energies = {}
    for name, entry in plan.layers.items():
        known = analysis.statistics[name]
        if entry.spatial and known.columns is not None:
            energies[name] = known.columns.values.sum(0)[:entry.full_rank]
        elif entry.rank is not None and known.spectrum is not None:
            energies[name] = known.spectrum.energy
    title = 'Spectra (dark: first layers, bright: last) and chosen ranks'
    with _axes(path, 7, 4.5, yscale='log', xlabel='rank / full rank',
               ylabel='energy lost', title=title) as axes:
        import matplotlib
        colors = matplotlib.colormaps['viridis'](
            np.linspace(0, 1, len(energies)))
        for color, (name, energy) in zip(colors, energies.items()):
            lost = _lost(energy)
            lost = np.maximum(lost / max(lost[0], 1e-300), 1e-6)
            axes.plot(
                np.linspace(0, 1, len(lost)), lost, 'o-', color=color,
                markevery=[plan.layers[name].rank], markersize=4, linewidth=.8)
        axes.grid(alpha=.3)


def plot_ranks(plan: CompressionPlan, path: str) -> None:
    """Draw the ranks of each layer in a colour by its form, against full rank,
    and its MACs before and after."""
    entries = plan.layers.values()
    x = range(len(entries))
    with _axes(path, max(6, .18 * len(x)), 6, 2) as (top, bottom):
        top.bar(x, [e.full_rank for e in entries], color='lightgray')
        for form, color in FORM_COLORS.items():
            ranks = {i: e.rank or e.full_rank
                     for i, e in enumerate(entries) if e.form == form}
            top.bar([*ranks], [*ranks.values()], color=color, label=form)
        top.plot(x, [e.input_rank or np.nan for e in entries], 'k_',
                 label='input channels of the basis')
        top.set(ylabel='filters', title='Rank (colour) of full rank (gray)')
        top.legend(title='form', fontsize=7)
        bottom.bar(x, [e.macs[0] / 1e6 for e in entries], color='lightgray')
        bottom.bar(x, [e.macs[1] / 1e6 for e in entries], color='tab:orange')
        bottom.set(ylabel='MACs / M', title='MACs before (gray) and after')
        bottom.set_xticks(x, [*plan.layers], rotation=90, fontsize=6)


def plot_sensitivities(analysis: Analysis, plan: CompressionPlan,
                       path: str) -> None:
    """Draw what each rank of a layer costs: the increase of the loss, or the
    energy where that is unknown. The plan's ranks are marked, as far as they
    are of outputs."""
    losses = {
        name: _lost(known.spectrum.energy if known.sensitivity is None else
                    known.sensitivity / 2)
        for name, known in analysis.statistics.items()
        if known.spectrum is not None
    }
    longest = max(len(x) for x in losses.values())
    grid = np.full((longest, len(losses)), np.nan)
    with _axes(path, max(6, .18 * len(losses)), 5, ylabel='rank',
               title='Loss by rank, and the ranks of the plan') as axes:
        for column, (name, lost) in enumerate(losses.items()):
            grid[:len(lost), column] = np.log10(np.maximum(lost, 1e-6))
            entry = plan.layers.get(name)
            if entry is not None and entry.form in ('output', 'both'):
                axes.plot(column, entry.rank, 'r_')
        image = axes.imshow(
            grid, aspect='auto', origin='lower', cmap='viridis')
        axes.figure.colorbar(image, label='log10 of what is lost')
        axes.set_xticks(
            range(len(losses)), [*losses], rotation=90, fontsize=6)


def plot_losses(rows: Sequence[Dict[str, Any]], path: str) -> None:
    """Draw predicted against measured loss of single layers: the rows hold
    ``name``, ``predicted`` and ``measured``."""
    predicted = np.maximum([row['predicted'] for row in rows], 1e-8)
    measured = np.maximum([row['measured'] for row in rows], 1e-8)
    with _axes(path, 5, 5, xlabel='predicted increase of the loss',
               ylabel='measured distance from the dense outputs',
               title='Each layer alone at half its rank') as axes:
        axes.loglog(predicted, measured, 'o', markersize=4)
        for row, x, y in zip(rows, predicted, measured):
            axes.annotate(row['name'], (x, y), fontsize=4)
        ends = [min(*predicted, *measured), max(*predicted, *measured)]
        axes.plot(ends, ends, color='gray', linewidth=.8)
        axes.grid(alpha=.3)


def plot_curves(curves: Dict[str, Dict[float, float]], path: str, xlabel: str,
                ylabel: str) -> None:
    """Draw one curve, y by x, for each method."""
    with _axes(path, 7, 4.5, xlabel=xlabel, ylabel=ylabel) as axes:
        for name, points in curves.items():
            axes.plot(list(points), list(points.values()), 'o-', label=name)
        axes.grid(alpha=.3)
        axes.legend(fontsize=8)
