# Copyright (c) mmbasis authors. All rights reserved.
"""Reads what NVIDIA's ``tegrastats`` prints: lines, and recorded logs.

A power entry is ``NAME current/average`` in mW. The second value averages
since tegrastats was started, so after any change of load it is wrong for
minutes: only the first value is used. JetPack 7 adds a third value (maximum),
and gives temperatures as pairs.
"""
import re

from .util import BenchError

# NAME 1234/1200, NAME 1234mW/1200mW, NAME 1234mW/1200mW/1300mW. The name
# begins with a letter; RAM and SWAP have MB or kB behind their slash.
_POWER = re.compile(r'(?<![\w@%/])([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/(\d+)(?:mW)?'
                    r'(?:/(\d+)(?:mW)?)?(?![\w/])')
_TEMPERATURE = re.compile(r'(?<!\S)([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C')
_RAM = re.compile(r'(?<!\w)RAM (\d+)/(\d+)MB')
_GPU_LOAD = re.compile(r'GR3D_FREQ (\d+)%')
_GPU_CLOCK = re.compile(r'GR3D_FREQ \d+%@\[?(\d+)')
_EMC = re.compile(r'EMC_FREQ (\d+)%(?:@(\d+))?')
_CORE = re.compile(r'(\d+)%@(\d+)|off')
_CPUS = re.compile(r'\[([^\]]*)\](?= EMC_FREQ| IRAM|\s+EMC)')

# tegrastats prints this for a sensor in a block that is powered down.
ABSENT_TEMPERATURE = -256.0


def parse_line(line):
    """Reads one line of tegrastats.

    Args:
        line (str): the line, of any JetPack from 4 to 7.

    Returns:
        dict: ``power_mw`` (rail -> current mW; a name that stands twice, such
        as the unconnected ``NC``, gets ``NC#2``), ``average_mw`` (the running
        average, kept for comparison only), ``temperature_c``,
        ``ram_mb`` (used, total) or None, ``gpu_load`` in % or None,
        ``gpu_mhz`` or None, ``emc_load`` or None, ``cpu`` (a list of
        (load in %, MHz), None for a core that is off).

    Raises:
        BenchError: the line has none of tegrastats' entries.
    """
    power, average = {}, {}
    for match in _POWER.finditer(line):
        name = match.group(1)
        if name in ('RAM', 'SWAP', 'IRAM'):
            continue
        copies = sum(k.split('#')[0] == name for k in power)
        key = name if not copies else '{}#{}'.format(name, copies + 1)
        power[key] = int(match.group(2))
        average[key] = int(match.group(3))
    temperature = {
        name: float(value)
        for name, value in _TEMPERATURE.findall(line)
        if float(value) != ABSENT_TEMPERATURE
    }
    load = _GPU_LOAD.search(line)
    if load is None and not power:
        raise BenchError('not a line of tegrastats: {!r}'.format(line[:120]))
    clock = _GPU_CLOCK.search(line)
    ram = _RAM.search(line)
    emc = _EMC.search(line)
    return dict(
        power_mw=power,
        average_mw=average,
        temperature_c=temperature,
        ram_mb=tuple(int(v) for v in ram.groups()) if ram else None,
        gpu_load=int(load.group(1)) if load else None,
        gpu_mhz=int(clock.group(1)) if clock else None,
        emc_load=int(emc.group(1)) if emc else None,
        cpu=_parse_cpus(line))


def _parse_cpus(line):
    block = _CPUS.search(line)
    if block is None:
        return []
    return [
        None if core.group(1) is None else
        (int(core.group(1)), int(core.group(2)))
        for core in _CORE.finditer(block.group(1))
    ]


def read_log(path):
    """Reads a recorded log; lines that tegrastats did not print are skipped.

    Args:
        path (str): a file of tegrastats output.

    Returns:
        list[dict]: see :func:`parse_line`, in order.

    Raises:
        BenchError: the file cannot be read or has no line of tegrastats.
    """
    try:
        with open(path) as f:
            lines = f.read().splitlines()
    except OSError as e:
        raise BenchError('cannot read the tegrastats log {}: {}'.format(
            path, e.strerror)) from e
    records = []
    for line in lines:
        try:
            records.append(parse_line(line))
        except BenchError:
            continue
    if not records:
        raise BenchError('{} holds no line of tegrastats'.format(path))
    return records
