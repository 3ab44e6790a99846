# Copyright (c) mmbasis authors. All rights reserved.
"""Pictures of spectra and plans, each written to a PNG at ``path``."""
import os
from typing import Any, Dict, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .planning import Analysis, CompressionPlan


def _figure(width: float, height: float) -> Figure:
    """A figure outside pyplot: no window, no global state."""
    return Figure(figsize=(width, height), layout='constrained')


def _save(figure: Figure, path: str) -> None:
    """Write a PNG, whole or not at all."""
    temporary = f'{path}.tmp{os.getpid()}'
    figure.savefig(temporary, dpi=120, format='png')
    os.replace(temporary, path)


def plot_spectra(analysis: Analysis, plan: CompressionPlan,
                 path: str) -> None:
    """Draw what each rank would lose, and the ranks that were chosen, of the
    layers in a plan; the analysis has their spectra."""
    energies = {
        name: known.spectrum.energy.cpu().numpy()
        for name, known in analysis.statistics.items()
        if known.spectrum is not None and name in plan.layers
    }
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    colors = matplotlib.colormaps['viridis']
    for index, (name, energy) in enumerate(energies.items()):
        lost = 1 - np.cumsum(energy) / max(energy.sum(), 1e-300)
        lost = np.maximum(np.concatenate([[1.], lost]), 1e-6)
        fraction = np.arange(len(lost)) / (len(lost) - 1)
        color = colors(index / max(len(energies) - 1, 1))
        axes.plot(fraction, lost, color=color, linewidth=.8)
        rank = plan.layers[name].rank
        axes.plot(fraction[rank], lost[rank], 'o', color=color, markersize=4)
    axes.set(
        yscale='log',
        xlabel='rank / full rank',
        ylabel='energy lost',
        title='Spectra (dark: first layers, bright: last) and chosen ranks')
    axes.grid(alpha=.3)
    _save(figure, path)


def plot_ranks(plan: CompressionPlan, path: str) -> None:
    """Draw rank and full rank of each layer, and its MACs before and after."""
    names = list(plan.layers)
    entries = list(plan.layers.values())
    x = range(len(names))
    figure = _figure(max(6, .18 * len(names)), 6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.bar(x, [e.full_rank for e in entries], color='lightgray')
    top.bar(x, [e.rank for e in entries], color='tab:blue')
    top.set(ylabel='basis filters', title='Rank (blue) of full rank (gray)')
    bottom.bar(x, [e.macs[0] / 1e6 for e in entries], color='lightgray')
    bottom.bar(x, [e.macs[1] / 1e6 for e in entries], color='tab:orange')
    bottom.set(ylabel='MACs / M', title='MACs before (gray) and after')
    bottom.set_xticks(x, names, rotation=90, fontsize=6)
    _save(figure, path)


def plot_sensitivities(analysis: Analysis, plan: CompressionPlan,
                       path: str) -> None:
    """Draw for each layer what its truncation costs by rank: the increase of
    the loss, or the energy where that is unknown. The plan's ranks are marked.
    """
    losses = {
        name: known.spectrum.energy
        if known.sensitivity is None else known.sensitivity / 2
        for name, known in analysis.statistics.items()
        if known.spectrum is not None
    }
    longest = max(len(x) for x in losses.values())
    grid = np.full((longest + 1, len(losses)), np.nan)
    figure = _figure(max(6, .18 * len(losses)), 5)
    axes = figure.add_subplot()
    for column, (name, loss) in enumerate(losses.items()):
        lost = np.append(loss.cpu().numpy()[::-1].cumsum()[::-1], 0)
        grid[:len(lost), column] = np.log10(np.maximum(lost, 1e-6))
        if name in plan.layers:
            axes.plot(column, plan.layers[name].rank, 'r_')
    image = axes.imshow(grid, aspect='auto', origin='lower', cmap='viridis')
    figure.colorbar(image, label='log10 of what is lost')
    axes.set(ylabel='rank', title='Loss by rank, and the ranks of the plan')
    axes.set_xticks(range(len(losses)), [*losses], rotation=90, fontsize=6)
    _save(figure, path)


def plot_losses(rows: Sequence[Dict[str, Any]], path: str) -> None:
    """Draw predicted against measured loss of single layers.

    Args:
        rows (Sequence[dict]): ``name``, ``predicted`` and ``measured``.
        path (str): The PNG.
    """
    figure = _figure(5, 5)
    axes = figure.add_subplot()
    predicted = np.maximum([row['predicted'] for row in rows], 1e-8)
    measured = np.maximum([row['measured'] for row in rows], 1e-8)
    axes.loglog(predicted, measured, 'o', markersize=4)
    for row, x, y in zip(rows, predicted, measured):
        axes.annotate(row['name'], (x, y), fontsize=4)
    ends = [min(*predicted, *measured), max(*predicted, *measured)]
    axes.plot(ends, ends, color='gray', linewidth=.8)
    axes.set(
        xlabel='predicted increase of the loss',
        ylabel='measured distance from the dense outputs',
        title='Each layer alone at half its rank')
    axes.grid(alpha=.3)
    _save(figure, path)


def plot_curves(curves: Dict[str, Dict[float, float]], path: str, xlabel: str,
                ylabel: str) -> None:
    """Draw one curve per method, accuracy against cost for example.

    Args:
        curves (dict[str, dict[float, float]]): y by x, by method.
        path (str): The PNG.
        xlabel (str): What x is.
        ylabel (str): What y is.
    """
    figure = _figure(7, 4.5)
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(list(points), list(points.values()), 'o-', label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=.3)
    axes.legend(fontsize=8)
    _save(figure, path)
