# Copyright (c) mmbasis authors. All rights reserved.
"""Figures of a model over all its windows, and ratios to the baseline."""
import math

from .stats import deviation, mean, paired_ratio

#: windows of each model in a block: one there, one back
TURNS = 2

# What is compared with the baseline: name -> figure of a window.
RATIOS = {
    'fps': lambda w: w['fps'],
    'latency_p50': lambda w: w['latency_ms']['p50'],
    'power': lambda w: power_of(w),
    'energy_per_image': lambda w: energy_per_image(w),
}


def power_of(window, key='mean_w', rail='total'):
    """Returns a power figure of a window, or None if it was not measured."""
    power = window.get('power') or {}
    return power.get(key, {}).get(rail)


def energy_per_image(window):
    """Returns J per image of a window, or None."""
    joules = power_of(window, 'energy_j')
    return None if joules is None else joules / window['images']


def idle_power(result, rail='total'):
    """Returns mean idle W over the idle windows of a result, or None."""
    values = [power_of(w, 'mean_w', rail) for w in result['idle']]
    values = [v for v in values if v is not None]
    return mean(values) if values else None


def summarise(result):
    """Fills in ``summary`` of every model that has a window.

    FPS is all images over all timed seconds; latencies are means over the
    windows of each window's figure; W is all energy over all seconds; J per
    image is all energy over all images; marginal J per image is the same
    after subtracting idle power. Windows without power readings (flagged)
    count for FPS and latency only; ``power_windows`` says how many have them.

    Args:
        result (dict): see ``protocol``; changed in place.
    """
    for model in result['models']:
        windows = model['windows']
        if not windows:
            continue
        seconds = sum(w['seconds'] for w in windows)
        images = sum(w['images'] for w in windows)
        rates = [w['fps'] for w in windows]
        summary = dict(
            windows=len(windows),
            images=images,
            seconds=seconds,
            fps=images / seconds,
            fps_spread=deviation(rates) / mean(rates),
            latency_ms=_mean_latency(windows))
        summary.update(_power(windows, idle_power(result)))
        model['summary'] = summary


def _mean_latency(windows):
    merged = {}
    for key in windows[0]['latency_ms']:
        values = [w['latency_ms'].get(key) for w in windows]
        merged[key] = None if None in values else mean(values)
    return merged


def _power(windows, idle):
    windows = [w for w in windows if w['power'] and w['power']['energy_j']]
    figures = dict(
        power_windows=len(windows),
        mean_w=None,
        mean_w_by_rail={},
        idle_w=idle,
        joule_per_image=None,
        marginal_joule_per_image=None,
        fps_per_watt=None)
    if not windows:
        return figures
    seconds = sum(w['seconds'] for w in windows)
    images = sum(w['images'] for w in windows)
    joules = {
        rail: sum(w['power']['energy_j'][rail] for w in windows)
        for rail in windows[0]['power']['energy_j']
    }
    total = joules.pop('total', None)
    figures['mean_w_by_rail'] = {k: v / seconds for k, v in joules.items()}
    if total is not None:
        figures.update(mean_w=total / seconds, joule_per_image=total / images)
        if idle is not None:
            figures['marginal_joule_per_image'] = \
                (total - idle * seconds) / images
        if total > 0:
            figures['fps_per_watt'] = images / total
    return figures


def add_comparisons(result):
    """Adds the ratios of every other model to the baseline.

    Args:
        result (dict): changed in place; only blocks that both models have
            finished are used.
    """
    models = {m['name']: m for m in result['models']}
    base = models.get(result['baseline'])
    result['comparisons'] = []
    for model in result['models']:
        if base is None or model is base:
            continue
        entry = dict(model=model['name'], baseline=base['name'])
        for name, figure in RATIOS.items():
            ours, theirs = _blocks(model, figure), _blocks(base, figure)
            both = sorted(set(ours) & set(theirs))
            entry[name] = paired_ratio([ours[i] for i in both],
                                       [theirs[i]
                                        for i in both]) if both else None
        if entry['fps']:
            result['comparisons'].append(entry)


def _blocks(model, figure):
    """Returns block -> geometric mean of a figure over its windows."""
    logs = {}
    for window in model['windows']:
        value = figure(window)
        if value is not None and value > 0:
            logs.setdefault(window['block'], []).append(math.log(value))
    return {
        block: math.exp(mean(found))
        for block, found in logs.items() if len(found) == TURNS
    }
