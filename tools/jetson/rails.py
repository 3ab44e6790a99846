# Copyright (c) mmbasis authors. All rights reserved.
"""Finds the power rails of a board and says which of them make the total.

Sources of the facts: NVIDIA's Jetson Linux Developer Guide, chapters on power
of each board; the Linux device trees ``tegra194-p2888.dtsi`` and
``tegra234-p3701.dtsi``; the kernel's ``hwmon/ina3221`` page.
"""
import glob
import os
import re

from .util import read_int, read_text, under

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
        if not set(parts) & set(live):
            continue
        missing = [p for p in parts if p not in live]
        if missing:
            return None, 'rails {} are missing, their sum would be too low' \
                .format(', '.join(missing))
        extra = set(live) - set(parts) - _NESTED
        if len(parts) > 1 and extra:
            return None, ('rails {} are not known on this board: adding or '
                          'leaving them out may both be wrong'.format(
                              ', '.join(sorted(extra))))
        return parts, reason
    return None, ('rails {} are not known: some may feed others, so their '
                  'sum means nothing'.format(', '.join(live)))


class Rail:
    """One channel of an INA3221, read through sysfs.

    Args:
        name (str): label of the rail.
        power (str | None): file with the power in mW (JetPack 4).
        voltage, current (str | None): files in mV and mA (JetPack 5 on).
    """

    def __init__(self, name, power=None, voltage=None, current=None):
        self.name = name
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
            return _number(self.power) * 1e-3
        return _number(self.voltage) * _number(self.current) * 1e-6


def _number(path):
    # Opened again every time, so that a rail that vanished is noticed; with
    # the calls of the system alone, because the sampler must cost little.
    handle = os.open(path, os.O_RDONLY)
    try:
        return float(os.read(handle, 64))
    finally:
        os.close(handle)


def find_rails(sysroot='/'):
    """Finds the rails of all INA3221 chips.

    JetPack 4: ``/sys/bus/i2c/drivers/ina3221x/1-0040/iio:device0`` with
    ``rail_name_0`` and ``in_power0_input`` (mW), channels 0 to 2; power is
    ready made. JetPack 5 on: ``/sys/bus/i2c/drivers/ina3221/1-0040/hwmon/
    hwmon3`` with ``in1_label``, ``in1_input`` (mV), ``curr1_input`` (mA),
    channels 1 to 3; ``in4`` to ``in7`` are shunt voltages, no rails.

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
