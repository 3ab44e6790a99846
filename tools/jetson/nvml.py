# Copyright (c) mmbasis authors. All rights reserved.
"""Power of a desktop or server GPU through NVIDIA's management library.

``libnvidia-ml`` is called through ctypes. Newer GPUs have an energy counter,
which is used where it answers; older ones only give a power value that the
driver itself averages (over up to a second on some).
"""
import ctypes

from .util import BenchError, now

_SUCCESS = 0


class NvmlSource:
    """One GPU, by its index in NVML's order (that of the PCI bus).

    Raises:
        BenchError: no driver, no such GPU, or no power reading.
    """
    paced = False
    scope = ('power of the whole graphics card by NVML; the host computer '
             'is not measured')

    def __init__(self, index=0):
        try:
            self._lib = ctypes.CDLL('libnvidia-ml.so.1')
        except OSError:
            raise BenchError('libnvidia-ml.so.1 is not installed: no driver '
                             'of a desktop GPU') from None
        self._call('nvmlInit_v2')
        self._handle = ctypes.c_void_p()
        self._call('nvmlDeviceGetHandleByIndex_v2', ctypes.c_uint(index),
                   ctypes.byref(self._handle))
        try:
            self._energy()
            self.kind = 'energy'
        except BenchError:
            self._power()
            self.kind = 'power'
        self.rails = ['gpu{}'.format(index)]
        self.total, self.why = self.rails, 'the whole card'

    def _call(self, name, *args):
        status = getattr(self._lib, name)(*args)
        if status != _SUCCESS:
            text = self._lib.nvmlErrorString
            text.restype = ctypes.c_char_p
            raise BenchError('{} failed: {}'.format(
                name,
                text(status).decode('utf-8', 'replace')))

    def _energy(self):
        value = ctypes.c_ulonglong()
        self._call('nvmlDeviceGetTotalEnergyConsumption', self._handle,
                   ctypes.byref(value))
        return value.value * 1e-3

    def _power(self):
        value = ctypes.c_uint()
        self._call('nvmlDeviceGetPowerUsage', self._handle,
                   ctypes.byref(value))
        return value.value * 1e-3

    def read(self):
        """Returns the time, and J since the driver was loaded, or W."""
        value = self._energy() if self.kind == 'energy' else self._power()
        return now(), [value]

    def close(self):
        """Leaves the library."""
        self._lib.nvmlShutdown()
