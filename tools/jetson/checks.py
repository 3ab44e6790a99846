# Copyright (c) mmbasis authors. All rights reserved.
"""What makes a figure doubtful.

Flags are added; nothing is removed.
"""
from .device import changes
from .summary import power_of

MAX_SPREAD = 0.03  # standard deviation of FPS between windows
MAX_CLOCK_CHANGE = 0.01  # within a window
MAX_CLOCK_DIFFERENCE = 0.02  # between windows
MAX_IDLE_DRIFT = 0.05


def flag(code, text, **where):
    """Makes a flag: a code for programs, a text for people."""
    return dict(code=code, text=text, **where)


def check_window(window, before, after, power_expected):
    """Looks at one window.

    Args:
        window (dict): without its flags.
        before, after (dict): states around it.
        power_expected (bool): a power source was chosen.

    Returns:
        list[dict]: flags.
    """
    flags = [flag(code, text) for code, text in changes(before, after)]
    for name, (low, high) in window['clocks'].items():
        # A CPU clock that wanders is normal; the GPU and memory decide.
        if not name.startswith('cpu') and low < high * (1 - MAX_CLOCK_CHANGE):
            flags.append(
                flag(
                    'clocks_moved', '{} moved between {} and {}; '
                    'fix the clocks (--jetson-clocks)'.format(name, low,
                                                              high)))
    power = window['power']
    if power_expected and not power['complete']:
        flags.append(
            flag(
                'samples_missing', 'power readings: {} in the '
                'window, longest gap {:.2f} s{}'.format(
                    power['samples'], power['longest_gap_s'],
                    '' if power['covered'] else
                    ', not up to both ends of the window')))
    return flags


def check_result(result):
    """Collects the flags of the windows and adds those of the whole run.

    Args:
        result (dict): summarised; its ``flags`` are replaced.
    """
    flags = []
    for model in result['models']:
        for window in model['windows']:
            flags += [
                dict(f, model=model['name'], repeat=window['repeat'])
                for f in window['flags']
            ]
        flags += _check_model(model)
    flags += _check_clocks(result) + _check_energy(result)
    if result['power'].get('source') and not result['power'].get('total') \
            and 'why' in result['power']:
        flags.append(
            flag('no_total', 'no total power: ' + result['power']['why']))
    if result['power'].get('error_count'):
        flags.append(
            flag(
                'sensor_errors', '{} power readings failed, the '
                'first: {}'.format(result['power']['error_count'],
                                   result['power']['errors'][0][1])))
    idle = [power_of(w) for w in result['idle']]
    if len(idle) == 2 and None not in idle and min(idle) > 0 and \
            max(idle) / min(idle) - 1 > MAX_IDLE_DRIFT:
        flags.append(
            flag('idle_drift', 'idle power went from {:.2f} to '
                 '{:.2f} W'.format(*idle)))
    result['flags'] = flags


def _check_model(model):
    flags, name = [], model['name']
    if model['warm_up'] and not model['warm_up']['settled']:
        flags.append(
            flag(
                'warm_up_unsettled',
                'latency had not settled '
                'after {:.0f} s of warm-up'.format(
                    model['warm_up']['seconds']),
                model=name))
    check = model.get('check')
    if check and not check['agrees']:
        flags.append(
            flag(
                'outputs_differ',
                'outputs differ from {}: {}'.format(
                    check['reference'], ', '.join(
                        '{} {}'.format(
                            n, 'cannot be compared' if e is None else
                            'by {:.2g}'.format(e))
                        for n, e in check['outputs'].items()) or 'none'),
                model=name))
    summary = model['summary']
    if summary and summary['fps_spread'] > MAX_SPREAD:
        flags.append(
            flag(
                'spread',
                'FPS varies by {:.1%} between windows'.format(
                    summary['fps_spread']),
                model=name))
    return flags


def _check_clocks(result):
    """All windows must have seen the same GPU clock."""
    tops = [
        w['clocks'][k][1] for m in result['models'] for w in m['windows']
        for k in w['clocks'] if k == 'gpu_hz'
    ]
    if tops and min(tops) < max(tops) * (1 - MAX_CLOCK_DIFFERENCE):
        return [
            flag(
                'clocks_differ', 'GPU clock differs between windows: {} '
                'to {} Hz'.format(min(tops), max(tops)))
        ]
    return []


def _check_energy(result):
    flags = []
    for entry in result['comparisons']:
        energy = entry['energy_per_image']
        if energy is None:
            continue
        if energy['low'] is None or energy['low'] <= 1 <= energy['high']:
            flags.append(
                flag(
                    'energy_below_noise',
                    'the energy difference to {} is below '
                    'the noise of the blocks'.format(entry['baseline']),
                    model=entry['model']))
    return flags
