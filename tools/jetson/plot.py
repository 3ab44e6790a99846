# Copyright (c) mmbasis authors. All rights reserved.
"""Power over time with the timed windows marked: matplotlib, or plain SVG."""
import os

from .util import BenchError, write_atomic

_COLOURS = ['#4c72b0', '#dd8452', '#55a868', '#c44e52', '#8172b3', '#937860']
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 1000, 420, 60, 45, 40
_MOST_POINTS = 4000


def windows_of(result):
    """Returns (start, end, name, colour) of idle and timed windows."""
    found = [(w['start'], w['end'], 'idle', '#bbbbbb') for w in result['idle']]
    for i, model in enumerate(result['models']):
        found += [(w['start'], w['end'], model['name'],
                   _COLOURS[i % len(_COLOURS)]) for w in model['windows']]
    return found


def curves_of(trace):
    """Returns (name, times, W); the total alone where there is one."""
    names = ['total'] if trace.total else trace.rails
    return [(n, ) + tuple(trace.power_curve(n)) for n in names]


def draw(result, trace, stem):
    """Draws a run.

    Args:
        result (dict): of ``protocol.Run``.
        trace (energy.Trace): all readings.
        stem (str): path without suffix.

    Returns:
        str: the file, ``.png`` with matplotlib, else ``.svg``.

    Raises:
        BenchError: fewer than two readings.
    """
    if len(trace.times) < 2:
        raise BenchError('too few power readings for a plot')
    try:
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot
    except ImportError:
        return draw_svg(result, trace, stem + '.svg')
    origin = trace.times[0]
    figure, axes = pyplot.subplots(figsize=(10, 4.2))
    labelled = set()
    for start, end, name, colour in windows_of(result):
        axes.axvspan(
            start - origin,
            end - origin,
            color=colour,
            alpha=.25,
            label=None if name in labelled else name)
        labelled.add(name)
    for name, times, watts in curves_of(trace):
        axes.plot([t - origin for t in times], watts, lw=.8, label=name)
    axes.set_xlabel('time (s)')
    axes.set_ylabel('power (W)')
    axes.set_ylim(bottom=0)
    axes.legend(loc='best', fontsize='small')
    figure.tight_layout()
    temp = '{}.{}.tmp.png'.format(stem, os.getpid())
    figure.savefig(temp, dpi=120)
    pyplot.close(figure)
    os.replace(temp, stem + '.png')
    return stem + '.png'


def draw_svg(result, trace, path):
    """Draws the same without matplotlib; returns the path."""
    curves = curves_of(trace)
    first, last = trace.times[0], trace.times[-1]
    top = max(0, max(max(w) for _, _, w in curves)) * 1.05 or 1.0
    x_scale = (_WIDTH - _LEFT - 20) / (last - first)
    y_scale = (_HEIGHT - _BOTTOM - _TOP) / top

    def x(t):
        return _LEFT + (min(max(t, first), last) - first) * x_scale

    def y(w):
        return _HEIGHT - _BOTTOM - w * y_scale

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {0} {1}" '
        'font-family="sans-serif" font-size="12">'.format(_WIDTH, _HEIGHT),
        '<rect width="100%" height="100%" fill="white"/>'
    ]
    parts += _svg_windows(windows_of(result), x, y(0))
    for i, (name, times, watts) in enumerate(curves):
        step = max(1, len(times) // _MOST_POINTS)
        points = ' '.join('{:.1f},{:.1f}'.format(x(t), y(w))
                          for t, w in zip(times[::step], watts[::step]))
        parts.append(
            '<polyline fill="none" stroke="{}" points="{}"><title>'
            '{}</title></polyline>'.format(
                '#222222' if len(curves) == 1 else _COLOURS[i % len(_COLOURS)],
                points, escape(name)))
    parts += _svg_axes(x, y, first, last, top)
    write_atomic(path, '\n'.join(parts + ['</svg>', '']))
    return path


def escape(text):
    """Makes a text safe inside XML."""
    for a, b in (('&', '&amp;'), ('<', '&lt;'), ('"', '&quot;')):
        text = text.replace(a, b)
    return text


def _svg_windows(windows, x, bottom):
    parts, names = [], {}
    for start, end, name, colour in windows:
        names[name] = colour
        parts.append(
            '<rect class="window" x="{:.1f}" y="{}" width="{:.1f}" '
            'height="{:.1f}" fill="{}" fill-opacity="0.25"><title>{}</title>'
            '</rect>'.format(
                x(start), _TOP, max(.5,
                                    x(end) - x(start)), bottom - _TOP, colour,
                escape(name)))
    for i, (name, colour) in enumerate(names.items()):
        left = _LEFT + 150 * i
        parts.append(
            '<rect x="{}" y="12" width="12" height="12" fill="{}" '
            'fill-opacity="0.5"/><text x="{}" y="22">{}</text>'.format(
                left, colour, left + 18, escape(name)))
    return parts


def _svg_axes(x, y, first, last, top):
    parts = [
        '<path d="M{0} {1}V{2}H{3}" fill="none" stroke="black"/>'.format(
            _LEFT, _TOP, y(0), x(last))
    ]
    for i in range(6):
        t, w = (last - first) * i / 5, top * i / 5
        parts.append('<text x="{:.0f}" y="{}" text-anchor="middle">{:.4g}'
                     '</text>'.format(x(first + t), _HEIGHT - 28, t))
        parts.append('<text x="{}" y="{:.0f}" text-anchor="end">{:.3g}'
                     '</text>'.format(_LEFT - 6,
                                      y(w) + 4, w))
    parts.append(
        '<text x="{}" y="{}" text-anchor="middle">time (s)</text>'.format(
            _WIDTH // 2, _HEIGHT - 8))
    parts.append('<text x="14" y="{0}" transform="rotate(-90 14 {0})">power '
                 '(W)</text>'.format(_HEIGHT // 2))
    return parts
