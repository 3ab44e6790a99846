# Copyright (c) mmbasis authors. All rights reserved.
"""Says what is here, what is missing, and how to fix it."""
from . import device
from .backends import NAMES, why_not
from .sources import SourceEnded, choose_source, open_source
from .util import BenchError, find_tool

_HINTS = {
    'tensorrt': 'on JetPack: sudo apt install python3-libnvinfer; in a '
    'virtual environment: python3 -m venv --system-site-packages',
    'trtexec': 'on JetPack: sudo apt install libnvinfer-bin',
    'onnxruntime': 'pip3 install onnxruntime',
    'torch': 'only needed for TorchScript files',
}


def probe(sysroot='/', power='auto'):
    """Looks at the device.

    Args:
        sysroot (str): root of the system.
        power (str): a power source, or ``auto``.

    Returns:
        dict: ``device``, ``state``, ``backends`` (name -> None or why not),
        ``versions``, ``power`` and ``advice`` (list of str).
    """
    state = device.snapshot(sysroot)
    found = dict(
        device=device.describe(sysroot),
        state=state,
        backends={n: why_not(n, sysroot)
                  for n in NAMES},
        versions=_versions(),
        power=_power(power, sysroot))
    found['advice'] = _advice(found, sysroot)
    return found


def _versions():
    versions = {}
    for name in ('tensorrt', 'onnxruntime', 'torch', 'numpy'):
        try:
            versions[name] = __import__(name).__version__
        except Exception:  # a broken installation raises anything
            versions[name] = None
    try:
        from .cudart import Cuda
        versions['cuda'] = Cuda().version()
    except (BenchError, AttributeError):
        versions['cuda'] = None
    return versions


def _power(spec, sysroot):
    try:
        chosen, passed_over = choose_source(spec, sysroot)
    except BenchError as e:
        chosen, passed_over = None, [str(e)]
    result = dict(
        source=chosen,
        passed_over=passed_over,
        rails=[],
        total=None,
        why=None,
        scope=None,
        now_w={})
    if chosen is None:
        return result
    source = open_source(chosen, sysroot)
    try:
        result.update(
            rails=source.rails,
            total=source.total,
            why=source.why,
            scope=source.scope)
        if source.kind == 'power':
            result['now_w'] = dict(zip(source.rails, source.read()[1]))
    except (OSError, ValueError, SourceEnded) as e:
        result['why'] = 'the first reading failed: {}'.format(e)
    finally:
        source.close()
    return result


def _advice(found, sysroot):
    advice = [
        '{}: {} ({})'.format(n, why, _HINTS[n])
        for n, why in found['backends'].items() if why
    ]
    if found['power']['source'] is None:
        advice.append('no power: ' + '; '.join(found['power']['passed_over']))
    elif found['power']['total'] is None:
        advice.append('no total power: ' + found['power']['why'])
    if found['device']['l4t'] or found['device']['board']:
        if device.locked(found['state']) is False:
            advice.append('the GPU clock is free to move: use '
                          '--jetson-clocks, or figures will scatter')
        for tool in ('nvpmodel', 'jetson_clocks'):
            if find_tool(tool, sysroot) is None:
                advice.append('{} is missing: sudo apt install '
                              'nvidia-l4t-tools'.format(tool))
    throttled = [k for k, v in found['state']['cooling'].items() if v]
    if throttled:
        advice.append('throttled right now: {}; let it cool'.format(
            ', '.join(throttled)))
    return advice


def probe_text(found):
    """Makes the text for people."""
    info, state, power = found['device'], found['state'], found['power']
    gpu = state['gpu'] or {}
    lines = [
        'board          {}'.format(info['board']
                                   or 'not a Jetson ({})'.format(info['cpu'])),
        'L4T / JetPack  {} / {}'.format(info['l4t'] or '-', info['jetpack']
                                        or '-'),
        'versions       ' + ', '.join('{} {}'.format(k, v or '-')
                                      for k, v in found['versions'].items()),
        'back ends      ' +
        (', '.join(n for n, why in found['backends'].items() if not why)
         or 'none'),
        'power mode     {} ({})'.format(*state['mode']),
        'GPU clock      {} Hz, limits {} to {}, {}'.format(
            gpu.get('hz', '-'), gpu.get('min_hz', '-'), gpu.get('max_hz', '-'),
            gpu.get('governor', '-')),
        'temperatures   ' +
        (', '.join('{} {:.1f}'.format(k, v)
                   for k, v in state['temperature_c'].items()) or '-'),
        'power source   {}'.format(power['source'] or 'none'),
        'rails          ' + (', '.join('{} {}'.format(
            r, '{:.3f} W'.format(power['now_w'][r]) if r in
            power['now_w'] else '') for r in power['rails']) or '-'),
        'total          {}{}'.format(
            ' + '.join(power['total'] or []) or 'none',
            ' ({})'.format(power['why']) if power['why'] else ''),
        'left out       {}'.format(power['scope'] or '-'),
    ]
    lines += ['TO DO          ' + a for a in found['advice']]
    return '\n'.join(lines)
