# Copyright (c) mmbasis authors. All rights reserved.
"""Reads what NVIDIA's ``tegrastats`` prints: lines, and recorded logs.

A power entry is ``NAME current/average`` in mW. The second value averages
since tegrastats was started, so after any change of load it is wrong for
minutes: only the first value is used. JetPack 7 adds a third value (maximum),
and gives temperatures as pairs.
"""
import re

from .util import BenchError

# NAME 1234/1200, NAME 1234mW/1200mW, NAME 1234mW/1200mW/1300mW; a rail that is
# off may be read as a little less than nothing (Thor). The name begins with a
# letter; RAM and SWAP have MB or kB behind their slash.
_POWER = re.compile(r'(?<![\w@%/])([A-Z][A-Z0-9_]*) (-?\d{1,9})(?:mW)?/'
                    r'(-?\d{1,9})(?:mW)?(?:/(-?\d{1,9})(?:mW)?)?(?![\w/])')
_TEMPERATURE = re.compile(r'(?<!\S)([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C')
_RAM = re.compile(r'(?<!\w)RAM (\d{1,9})/(\d{1,9})MB')
_GPU_LOAD = re.compile(r'GR3D_FREQ (\d{1,9})%')
# Thor leaves out loads, and has one clock for all cores behind the bracket.
_GPU_CLOCK = re.compile(r'GR3D_FREQ (?:\d+%)?@\[?(\d{1,9})')
_EMC = re.compile(r'EMC_FREQ (\d{1,9})%')
_CORE = re.compile(r'(\d{1,9})%(?:@(\d{1,9}))?|off')
_CPUS = re.compile(r'\[((?:\d+%|off)[^\]]*)\](?:@(\d{1,9}))?')

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
        (load in %, MHz), None for a core that is off, or for an MHz that is
        not shown).

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
    load, ram = _GPU_LOAD.search(line), _RAM.search(line)
    if load is None and ram is None and not power:
        raise BenchError('not a line of tegrastats: {!r}'.format(line[:120]))
    clock = _GPU_CLOCK.search(line)
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
    shared = block.group(2)
    cores = []
    for load, clock in _CORE.findall(block.group(1)):
        clock = clock or shared
        cores.append((int(load), int(clock) if clock else None)
                     if load else None)
    return cores


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
        with open(path, encoding='utf-8', errors='replace') as f:
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
