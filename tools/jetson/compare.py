# Copyright (c) mmbasis authors. All rights reserved.
"""Compares models across result files: separate runs, perhaps other days."""
import os

from . import device
from .backends import speed_settings
from .protocol import SCHEMA, SCHEMA_VERSION
from .report import aligned, number, ratio
from .stats import unpaired_ratio
from .summary import RATIOS
from .util import BenchError, read_json

RESULT_NAME = 'result.json'


def load_result(path):
    """Reads a result.

    Args:
        path (str): the file, or the folder of a run.

    Returns:
        dict: the result, of a schema version that is known here.

    Raises:
        BenchError: it is something else, or newer than this program.
    """
    if os.path.isdir(path):
        path = os.path.join(path, RESULT_NAME)
    result = read_json(path, 'result of jetson_bench')
    if not isinstance(result, dict) or result.get('schema') != SCHEMA or \
            not isinstance(result.get('schema_version'), int):
        raise BenchError('{} is not a result of jetson_bench'.format(path))
    if result['schema_version'] > SCHEMA_VERSION:
        raise BenchError('{} has schema version {}; this program knows up to '
                         '{}: use a newer jetson_bench'.format(
                             path, result['schema_version'], SCHEMA_VERSION))
    try:
        comparison_table(compare([result], ['x']))
    except BenchError:
        pass  # no finished window: another result may have some
    except Exception as e:  # whatever is missing or of another kind
        raise BenchError('{} is a damaged result ({}: {})'.format(
            path, type(e).__name__, e)) from e
    return result


def conditions(result, model):
    """Returns what must be equal for two figures to be comparable."""
    state = result['state_before'] or {}
    return {
        'board':
        result['device']['board'] or result['device']['cpu'],
        'L4T':
        result['device']['l4t'],
        'power mode': (state.get('mode') or [None])[0],
        'clock limits':
        device.limits(state) if state else {},
        'back end':
        '{} {}'.format(model['engine']['backend'],
                       model['engine'].get('version')),
        'precision':
        model['engine']['precision'],
        'engine settings':
        speed_settings(model['engine']),
        'batch':
        model['batch'],
        'rails of the total':
        result['power'].get('total'),
    }


def compare(results, labels, baseline=None):
    """Compares all models of several results with one of them.

    Within one result ratios are paired by block (see ``run``); here runs
    are separate, so Welch's interval on the logarithms is used, which is
    wider. It knows the noise within the runs, not what changed between them.

    Args:
        results (list[dict]): see :func:`load_result`.
        labels (list[str]): one per result, put before the model's name.
        baseline (str | None): ``LABEL/MODEL``; the first model by default.

    Returns:
        dict: ``baseline``, ``rows`` (``name``, ``summary``, ratios) and
        ``warnings`` (differing conditions, partial results).

    Raises:
        BenchError: no such baseline, or no model with a finished window.
    """
    found, warnings = {}, []
    for label, result in zip(labels, results):
        warnings += _doubts(label, result)
        for model in result['models']:
            if model['summary']:
                found['{}/{}'.format(label, model['name'])] = (result, model)
    if not found:
        raise BenchError('no model with a finished window in these results')
    baseline = baseline or list(found)[0]
    if baseline not in found:
        raise BenchError('no baseline {!r}; there are: {}'.format(
            baseline, ', '.join(found)))
    base = conditions(*found[baseline])
    rows = []
    for name, (result, model) in found.items():
        for key, value in conditions(result, model).items():
            if value != base[key]:
                warnings.append('{}: {} is {}, that of the baseline {}'.format(
                    name, key, value, base[key]))
        rows.append(
            dict(
                name=name,
                summary=model['summary'],
                **_ratios(model, found[baseline][1])))
    return dict(baseline=baseline, rows=rows, warnings=warnings)


def _doubts(label, result):
    doubts = []
    if result['status'] != 'complete':
        doubts.append('{} is {}: {}'.format(label, result['status'],
                                            result['reason']))
    if result['flags']:
        codes = sorted({f['code'] for f in result['flags']})
        doubts.append('{} has {} flag(s): {}'.format(label,
                                                     len(result['flags']),
                                                     ', '.join(codes)))
    return doubts


def _ratios(model, base):
    if model is base:
        return {name: None for name in RATIOS}
    ratios = {}
    for name, figure in RATIOS.items():
        values = [[figure(w) for w in m['windows']] for m in (model, base)]
        usable = all(v is not None and v > 0 for side in values for v in side)
        ratios[name] = unpaired_ratio(*values) if usable else None
    return ratios


def comparison_table(comparison):
    """Makes the table for people, warnings below."""
    rows = [[
        'model', 'FPS', 'p50 ms', 'W', 'J/image', 'FPS ratio', 'J/image ratio'
    ]]
    for row in comparison['rows']:
        s = row['summary']
        rows.append([
            row['name'],
            number(s['fps']),
            number(s['latency_ms']['p50']),
            number(s['mean_w']),
            number(s['joule_per_image']),
            ratio(row['fps']),
            ratio(row['energy_per_image'])
        ])
    lines = [
        aligned(rows), '', 'Ratios to {}, separate runs: 95 % '
        'intervals by Welch.'.format(comparison['baseline'])
    ]
    lines += ['WARNING ' + w for w in comparison['warnings']]
    return '\n'.join(lines)
