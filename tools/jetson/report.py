# Copyright (c) mmbasis authors. All rights reserved.
"""Turns a result into a table for people, and CSV."""
import csv
import io

from .extras import summary_lines
from .summary import TURNS
from .util import write_atomic

NOT_MEASURED = '-'
_COLUMNS = [
    ('model', lambda m, c: m['name']),
    ('FPS', lambda m, c: number(m['summary']['fps'])),
    ('mean ms', lambda m, c: number(m['summary']['latency_ms']['mean'])),
    ('p50 ms', lambda m, c: number(m['summary']['latency_ms']['p50'])),
    ('p90 ms', lambda m, c: number(m['summary']['latency_ms']['p90'])),
    ('p99 ms', lambda m, c: number(m['summary']['latency_ms']['p99'])),
    ('W', lambda m, c: number(m['summary']['mean_w'])),
    ('idle W', lambda m, c: number(m['summary']['idle_w'])),
    ('J/image', lambda m, c: number(m['summary']['joule_per_image'])),
    ('marg. J/image',
     lambda m, c: number(m['summary']['marginal_joule_per_image'])),
    ('FPS/W', lambda m, c: number(m['summary']['fps_per_watt'])),
    ('FPS ratio', lambda m, c: ratio(c.get('fps'))),
    ('J/image ratio', lambda m, c: ratio(c.get('energy_per_image'))),
]


def number(value):
    """Returns four significant digits, or a dash."""
    if value is None:
        return NOT_MEASURED
    text = '{:.4g}'.format(value)
    return '{:.0f}'.format(value) if 'e+' in text else text


def ratio(value):
    """Returns a ratio with its 95 % interval, such as ``1.34 [1.32, 1.36]``"""
    if not value:
        return NOT_MEASURED
    if value['low'] is None:
        return '{:.3f}'.format(value['ratio'])
    return '{ratio:.3f} [{low:.3f}, {high:.3f}]'.format(**value)


def aligned(rows):
    """Sets rows of text in columns; the first is flush left, others right."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [c.rjust(w) for c, w in zip(row[1:], widths[1:])]
        lines.append('  '.join(cells).rstrip())
    lines.insert(1, '-' * max(len(n) for n in lines))
    return '\n'.join(lines)


def table(result):
    """Makes the table for people.

    Args:
        result (dict): of ``protocol.Run``, complete or partial.

    Returns:
        str: device, figures per model, power per rail, what the total leaves
        out, and all flags.
    """
    parts = [_heading(result)]
    done = [m for m in result['models'] if m['summary']]
    ratios = {c['model']: c for c in result['comparisons']}
    if done:
        rows = [[title for title, _ in _COLUMNS]]
        rows += [[cell(m, ratios.get(m['name'], {})) for _, cell in _COLUMNS]
                 for m in done]
        parts.append(aligned(rows))
        rails = list(done[0]['summary']['mean_w_by_rail'])
        if rails:
            rows = [['mean W per rail'] + rails]
            rows += [
                [m['name']] +
                [number(m['summary']['mean_w_by_rail'].get(r)) for r in rails]
                for m in done
            ]
            parts.append(aligned(rows))
        lines = [n for m in done for n in summary_lines(m)]
        if lines:
            parts.append('\n'.join(lines))
    else:
        parts.append('No window was completed.')
    parts.append(_notes(result))
    return '\n\n'.join(parts)


def _heading(result):
    info, protocol = result['device'], result['protocol']
    engine = result['models'][0]['engine'] if result['models'] else {}
    state = result['state_before'] or {}
    mode = (state.get('mode') or [None])[0]
    lines = [
        '{}{}{}'.format(info['board'] or info['cpu'],
                        ', L4T ' + info['l4t'] if info['l4t'] else '',
                        ', mode ' + mode if mode else ''),
        '{} {}, {}; {} x {:g} s per model, {}'.format(
            engine.get('backend', ''), engine.get('version', ''),
            engine.get('precision', ''), TURNS * protocol['repeats'],
            protocol['min_seconds'], result['status']),
    ]
    if result['status'] != 'complete':
        lines.append('PARTIAL RESULT: {}'.format(result['reason']))
    return '\n'.join(lines)


def _sampling(result):
    power = [
        w['power'] for m in result['models'] for w in m['windows']
        if w['power']
    ]
    load = result['power'].get('load')
    if not power or not load:
        return []
    return [
        'Readings: {:.1f} per second, longest gap {:.2f} s; the sampler used '
        '{:.2%} of a core.'.format(
            sum(p['samples']
                for p in power) / sum(w['seconds'] for m in result['models']
                                      for w in m['windows'] if w['power']),
            max(p['longest_gap_s'] for p in power),
            load['cpu_s'] / max(load['seconds'], 1e-9))
    ]


def _notes(result):
    power = result['power']
    lines = []
    if power.get('scope'):
        lines.append('Power by {}: {}.'.format(power['source'],
                                               power['scope']))
        lines.append('Total: {} ({}).'.format(
            ' + '.join(power['total'] or []) or 'none', power['why']))
        lines += _sampling(result)
    else:
        lines.append('Power was not measured.')
    if result['comparisons']:
        lines.append('Ratios to {} with 95 % intervals: {}.'.format(
            result['baseline'], result['comparisons'][0]['fps']['method']))
    notes = {
        n
        for m in result['models']
        for w in m['windows']
        for n in w['notes']
    }
    lines += sorted('Note: ' + n for n in notes)
    for item in result['flags']:
        where = ' '.join(
            str(v) for v in (item.get('model'),
                             None if 'repeat' not in item else '#%d' %
                             (item['repeat'] + 1)) if v is not None)
        lines.append('FLAG {}{}: {}'.format(
            item['code'], ' ({})'.format(where) if where else '',
            item['text']))
    if not result['flags']:
        lines.append('No flags.')
    return '\n'.join(lines)


def to_csv(result):
    """Makes CSV, one line per model with full digits.

    Args:
        result (dict): of ``protocol.Run``.

    Returns:
        str: with a header; empty cells for what was not measured.
    """
    rows = []
    ratios = {c['model']: c for c in result['comparisons']}
    for model in result['models']:
        summary = model['summary']
        if not summary:
            continue
        row = [('model', model['name']), ('file', model['path']),
               ('backend', model['engine']['backend']),
               ('precision', model['engine']['precision']),
               ('batch', model['batch'])]
        row += [(k, v) for k, v in summary.items() if not isinstance(v, dict)]
        row += [('latency_%s_ms' % k, v)
                for k, v in summary['latency_ms'].items()]
        row += [('mean_w_' + k, v)
                for k, v in summary['mean_w_by_rail'].items()]
        for name in ('fps', 'latency_p50', 'power', 'energy_per_image'):
            value = ratios.get(model['name'], {}).get(name) or {}
            row += [('ratio_%s%s' % (name, s), value.get(k))
                    for k, s in (('ratio', ''), ('low', '_low'), ('high',
                                                                  '_high'))]
        flags = {
            f['code']
            for f in result['flags'] if f.get('model') in (None, model['name'])
        }
        rows.append(dict(row + [('flags', ' '.join(sorted(flags)))]))
    if not rows:
        return ''
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def write_csv(path, result):
    """Writes :func:`to_csv` to a file."""
    write_atomic(path, to_csv(result))
