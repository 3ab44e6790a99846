# Copyright (c) mmbasis authors. All rights reserved.
"""The state of the board: what it is, its mode, clocks, heat, throttling.

Sources: Jetson Linux Developer Guide (nvpmodel, devfreq, soctherm); Linux
``thermal/sysfs-api`` and ``cpufreq`` documents.
"""
import glob
import os
import platform
import re

from .util import find_tool, read_int, read_text, run_tool, under

# L4T release -> JetPack, for people.
_JETPACKS = {'32': '4', '34': '5', '35': '5', '36': '6', '38': '7', '39': '7'}
# Xavier's PMIC zone always reports 100 degrees: not a measurement.
_FAKE_ZONES = ('pmic', )


def describe(sysroot='/'):
    """Says what the device is; nothing here changes while it runs.

    Args:
        sysroot (str): root of the system.

    Returns:
        dict: ``board``, ``l4t``, ``jetpack`` (None off a Jetson), ``cpu``,
        ``cores``, ``memory_mb``, ``kernel``, ``python``.
    """
    board = read_text(under(sysroot, 'proc/device-tree/model'))
    l4t = _l4t(read_text(under(sysroot, 'etc/nv_tegra_release')))
    memory = re.search(r'MemTotal:\s+(\d+)',
                       read_text(under(sysroot, 'proc/meminfo')) or '')
    cpu = re.search(r'model name\s*:\s*(.+)',
                    read_text(under(sysroot, 'proc/cpuinfo')) or '')
    return dict(
        board=board,
        l4t=l4t,
        jetpack=l4t and _JETPACKS.get(l4t.split('.')[0]),
        cpu=cpu.group(1) if cpu else platform.machine(),
        cores=os.cpu_count(),
        memory_mb=int(memory.group(1)) // 1024 if memory else None,
        kernel=platform.release(),
        python=platform.python_version())


def _l4t(text):
    """``# R32 (release), REVISION: 7.1, …`` -> ``'32.7.1'``."""
    found = re.search(r'R(\d+)[^,]*, REVISION: ([\d.]+)', text or '')
    return '.'.join(found.groups()) if found else None


def power_mode(sysroot='/'):
    """Returns nvpmodel's (name, number), or (None, None)."""
    tool = find_tool('nvpmodel', sysroot)
    if tool is None:
        return None, None
    status, text = run_tool([tool, '-q'])
    name = re.search(r'Power Mode: *(.+)', text)
    number = re.search(r'^(\d+)\s*$', text, re.M)
    if status != 0 or not name:
        return None, None
    return name.group(1).strip(), int(number.group(1)) if number else None


def gpu_folder(sysroot='/'):
    """Returns the devfreq folder of the integrated GPU, or None.

    Its name is ``17000000.gv11b`` (Xavier), ``17000000.ga10b`` or
    ``17000000.gpu`` (Orin), ``57000000.gpu`` (Nano), ``17000000.gp10b``
    (TX2), ``gpu-gpc-0`` (Thor).
    """
    for path in sorted(glob.glob(under(sysroot, 'sys/class/devfreq/*'))):
        if re.search(r'\.(gpu|g[a-z]\d+b)$|^gpu-gpc-\d+$',
                     os.path.basename(path)):
            return path
    return None


def clock_files(sysroot='/'):
    """Returns name -> file of the clocks that the sampler watches."""
    files = {}
    gpu = gpu_folder(sysroot)
    if gpu:
        files['gpu_hz'] = os.path.join(gpu, 'cur_freq')
    for policy in _cpu_policies(sysroot):
        name = 'cpu_khz.' + os.path.basename(policy)
        files[name] = os.path.join(policy, 'scaling_cur_freq')
    # Root only; then Thor.
    for path in ('sys/kernel/debug/bpmp/debug/clk/emc/rate',
                 'sys/class/devfreq/bwmgr/cur_freq'):
        emc = under(sysroot, path)
        if 'emc_hz' not in files and read_int(emc) is not None:
            files['emc_hz'] = emc
    return files


def _cpu_policies(sysroot):
    return sorted(
        glob.glob(under(sysroot, 'sys/devices/system/cpu/cpufreq/policy*')))


def snapshot(sysroot='/'):
    """Reads the present state.

    Args:
        sysroot (str): root of the system.

    Returns:
        dict: ``mode`` (name, number), ``gpu`` and ``cpu`` (governor, limits,
        clock), ``temperature_c`` by zone, ``hottest_c``, ``cooling`` (state
        of every cooling device but fans; above 0 means throttled),
        ``over_current`` (event counters), ``fan``.
    """
    temperatures = _temperatures(sysroot)
    real = [
        v for k, v in temperatures.items()
        if not k.lower().startswith(_FAKE_ZONES)
    ]
    cooling, fan = _cooling(sysroot)
    return dict(
        mode=power_mode(sysroot),
        gpu=_gpu(sysroot),
        cpu=_cpus(sysroot),
        temperature_c=temperatures,
        hottest_c=max(real) if real else None,
        cooling=cooling,
        over_current=_over_current(sysroot),
        fan=fan)


def _gpu(sysroot):
    folder = gpu_folder(sysroot)
    if folder is None:
        return None
    return dict(
        governor=read_text(os.path.join(folder, 'governor')),
        min_hz=read_int(os.path.join(folder, 'min_freq')),
        max_hz=read_int(os.path.join(folder, 'max_freq')),
        hz=read_int(os.path.join(folder, 'cur_freq')))


def _cpus(sysroot):
    cpus = {}
    for policy in _cpu_policies(sysroot):
        cpus[os.path.basename(policy)] = dict(
            governor=read_text(os.path.join(policy, 'scaling_governor')),
            min_khz=read_int(os.path.join(policy, 'scaling_min_freq')),
            max_khz=read_int(os.path.join(policy, 'scaling_max_freq')),
            khz=read_int(os.path.join(policy, 'scaling_cur_freq')))
    return cpus


def _temperatures(sysroot):
    zones = {}
    for zone in sorted(
            glob.glob(under(sysroot, 'sys/class/thermal/thermal_zone*'))):
        name = read_text(os.path.join(zone, 'type'))
        value = read_int(os.path.join(zone, 'temp'))
        # Blocks that are powered down answer -256000 or an error.
        if name and value is not None and value > -200000:
            zones[name] = value / 1000.0
    return zones


def _cooling(sysroot):
    states, fan = {}, None
    for folder in sorted(
            glob.glob(under(sysroot, 'sys/class/thermal/cooling_device*'))):
        name = read_text(os.path.join(folder, 'type')) or 'unknown'
        state = read_int(os.path.join(folder, 'cur_state'))
        if 'fan' in name.lower():
            fan = state
        elif state is not None and not name.startswith('intel_powerclamp'):
            states['{} ({})'.format(name, os.path.basename(folder))] = state
    return states, fan


def _over_current(sysroot):
    counters = {}
    for path in glob.glob(
            under(sysroot, 'sys/class/hwmon/hwmon*/oc*_event_cnt')):
        counters[os.path.basename(path)] = read_int(path)
    return counters


def locked(state):
    """Tells whether the GPU's clock is held (limits equal), or None."""
    gpu = state['gpu']
    if not gpu or gpu['min_hz'] is None:
        return None
    return gpu['min_hz'] == gpu['max_hz']


def limits(state):
    """Returns what a snapshot says about the clocks but their present value.

    Args:
        state (dict): see :func:`snapshot`.

    Returns:
        dict[str, str]: ``gpu`` and each CPU policy that is there -> governor
        and limits.
    """
    found = {}
    for name, clock in [('gpu', state['gpu'])] + sorted(state['cpu'].items()):
        if clock:
            unit = 'hz' if name == 'gpu' else 'khz'
            found[name] = '{} {} to {} {}'.format(
                clock['governor'], clock['min_' + unit], clock['max_' + unit],
                unit)
    return found


def changes(before, after):
    """Compares two snapshots.

    Args:
        before, after (dict): see :func:`snapshot`.

    Returns:
        list[tuple[str, str]]: (code, text) of what spoils a comparison:
        ``mode_changed``, ``limits_changed``, ``throttled``.
    """
    found = []
    if list(before['mode']) != list(after['mode']):
        found.append(
            ('mode_changed',
             'power mode went from {} to {}'.format(before['mode'][0],
                                                    after['mode'][0])))
    pairs = [('GPU', before['gpu'], after['gpu'], 'hz')]
    pairs += [(k, before['cpu'][k], after['cpu'].get(k), 'khz')
              for k in before['cpu']]
    for name, old, new, clock in pairs:
        for key in old or {}:
            if key != clock and new and old[key] != new[key]:
                found.append(
                    ('limits_changed',
                     '{} {} went from {} to {}'.format(name, key, old[key],
                                                       new[key])))
    for name, state in after['cooling'].items():
        if state > before['cooling'].get(name, 0):
            found.append(('throttled', '{} throttles: state {} -> {}'.format(
                name, before['cooling'].get(name, 0), state)))
    for name, count in after['over_current'].items():
        old = before['over_current'].get(name)
        if None not in (old, count) and count > old:
            found.append(('throttled', '{} rose by {}: over-current or '
                          'under-voltage'.format(name, count - old)))
    return found
