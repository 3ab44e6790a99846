# Copyright (c) mmbasis authors. All rights reserved.
"""Finds the power rails of a board and says which of them make the total.

Sources of the facts: NVIDIA's Jetson Linux Developer Guide, chapters on power
of each board; the Linux device trees ``tegra194-p2888.dtsi`` and
``tegra234-p3701.dtsi``; the kernel's ``hwmon/ina3221`` and ``hwmon/ina238``
pages; NVIDIA's forum (topic 366461: the INA238 of Thor).
"""
import glob
import math
import os
import re

from .util import read_int, read_text, under

# The INA238 on the carrier board of Thor.
_BOARD_INPUT = 'VIN'
# Rails that a total is the sum of, the first rule that fits wins. A rail that
# feeds others is the total alone: adding what it feeds would count it twice.
_RULES = [
    (['VDD_IN'], 'VDD_IN is the input of the module; the other rails are '
     'parts of it'),
    (['POM_5V_IN'], 'POM_5V_IN is the input of the module; the other rails '
     'are parts of it'),
    (['GPU', 'CPU', 'SOC', 'CV', 'VDDRQ',
      'SYS5V'], 'AGX Xavier: six rails side by side'),
    (['VDD_GPU_SOC', 'VDD_CPU_CV', 'VIN_SYS_5V0'],
     'AGX Orin: three rails side by side; VDDQ_VDD2_1V8AO is fed from '
     'VIN_SYS_5V0'),
    ([_BOARD_INPUT], 'VIN is the input of the whole board; the other rails '
     'are parts of it'),
    (['VDD_GPU', 'VDD_CPU_SOC_MSS', 'VIN_SYS_5V0'],
     'AGX Thor: three rails side by side'),
]
# Rails that are known to lie inside one of those summed above.
_NESTED = {'VDDQ_VDD2_1V8AO'}


def choose_total(names):
    """Chooses the rails whose sum is the power of the module.

    Args:
        names (list[str]): the rails that can be read.

    Returns:
        tuple[list[str] | None, str]: the rails to add (None if unknown) and
        the reason, for people.
    """
    live = [n for n in names if n.split('#')[0] != 'NC']
    if not live:
        return None, 'no power rail can be read'
    for parts, reason in _RULES:
        if not set(parts) <= set(live):
            continue
        extra = set(live) - set(parts) - _NESTED
        if len(parts) > 1 and extra:
            return None, ('rails {} are not known on this board: adding or '
                          'leaving them out may both be wrong'.format(
                              ', '.join(sorted(extra))))
        return parts, reason
    # Boards share names of rails: one is missing only where no other board
    # has what is there.
    fitting = [p for p, _ in _RULES if set(live) - _NESTED <= set(p)]
    if len(fitting) == 1 and len(live) > 1:
        return None, 'rails {} are missing, their sum would be too low'.format(
            ', '.join(p for p in fitting[0] if p not in live))
    return None, ('rails {} are not known: some may feed others, so their '
                  'sum means nothing'.format(', '.join(live)))


def scope(total):
    """Says what a total covers and what it leaves out, for people.

    Args:
        total (list[str] | None): of :func:`choose_total`.
    """
    if total == [_BOARD_INPUT]:
        return ('power of the whole board at its input: module, carrier '
                'board, fan and USB devices')
    return ('power of the Jetson module; the carrier board (fan, USB, '
            'Ethernet, losses of its regulators) is not measured')


class Rail:
    """One channel of a power monitor, read through sysfs.

    Args:
        name (str): label of the rail.
        power (str | None): file with the power.
        voltage, current (str | None): files in mV and mA, instead.
        unit (float): W of one unit of ``power``.
    """

    def __init__(self, name, power=None, voltage=None, current=None,
                 unit=1e-3):
        self.name = name
        self.unit = unit
        self.power = power
        self.voltage = voltage
        self.current = current

    def files(self):
        """Returns the files that a reading needs."""
        return [self.power] if self.power else [self.voltage, self.current]

    def read(self):
        """Returns the power at this moment in W.

        Raises:
            OSError: a file vanished or cannot be read.
            ValueError: a file holds no number.
        """
        if self.power:
            return _number(self.power) * self.unit
        return _number(self.voltage) * _number(self.current) * 1e-6


def _number(path):
    # Opened again every time, so that a rail that vanished is noticed; with
    # the calls of the system alone, because the sampler must cost little.
    handle = os.open(path, os.O_RDONLY)
    try:
        value = float(os.read(handle, 64))
    finally:
        os.close(handle)
    if not math.isfinite(value):
        raise ValueError('{} holds {}'.format(path, value))
    return value


def find_rails(sysroot='/'):
    """Finds the rails of all INA3221 and INA238 chips.

    JetPack 4: ``/sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0`` with
    ``rail_name_0`` and ``in_power0_input`` (mW), channels 0 to 2; power is
    ready made. JetPack 5 on: ``/sys/bus/i2c/drivers/ina3221/1-0040/hwmon/
    hwmon3`` with ``in1_label``, ``in1_input`` (mV), ``curr1_input`` (mA),
    channels 1 to 3; ``in4`` to ``in7`` are shunt voltages, no rails. JetPack 7
    on Thor also: ``/sys/bus/i2c/drivers/ina238/*/hwmon/*`` with
    ``power1_input`` (uW), the input of the whole board.

    Args:
        sysroot (str): root of the system.

    Returns:
        list[Rail]: in the order of chips and channels; channels that are not
        connected (``NC`` or without a label) are left out.
    """
    base = under(sysroot, 'sys/bus/i2c/drivers')
    rails = []
    # Some kernels show a chip as iio:device0 and, linked, as iio_device.
    for chip in sorted(glob.glob(os.path.join(base, 'ina3221x', '*-*'))):
        folders = sorted(glob.glob(os.path.join(chip, 'iio:device*')))
        folders = folders or glob.glob(os.path.join(chip, 'iio_device'))
        for folder in folders[:1]:
            rails += _iio_rails(folder)
    for folder in sorted(
            glob.glob(os.path.join(base, 'ina3221', '*-*', 'hwmon', '*'))):
        rails += _hwmon_rails(folder)
    for folder in sorted(
            glob.glob(os.path.join(base, 'ina238', '*-*', 'hwmon', '*'))):
        label = read_text(os.path.join(folder, 'in1_label')) or read_text(
            os.path.join(folder, 'label')) or _BOARD_INPUT
        power = os.path.join(folder, 'power1_input')
        if os.path.exists(power):
            rails.append(Rail(label, power, unit=1e-6))
    return rails


def _named(label):
    return bool(label) and re.match(r'(NC|N/A)$', label) is None


def _iio_rails(folder):
    rails = []
    for i in range(3):
        label = read_text(os.path.join(folder, 'rail_name_%d' % i))
        if _named(label):
            power = os.path.join(folder, 'in_power%d_input' % i)
            rails.append(Rail(label, power=power))
    return rails


def _hwmon_rails(folder):
    rails = []
    for i in (1, 2, 3):
        label = read_text(os.path.join(folder, 'in%d_label' % i))
        # A disabled channel answers -ENODATA to every reading.
        off = read_int(os.path.join(folder, 'in%d_enable' % i)) == 0
        if _named(label) and not off:
            rails.append(
                Rail(
                    label,
                    voltage=os.path.join(folder, 'in%d_input' % i),
                    current=os.path.join(folder, 'curr%d_input' % i)))
    return rails
