# Copyright (c) mmbasis authors. All rights reserved.
"""Temporary settings: the power mode and fixed clocks, by NVIDIA's tools."""
import os
import sys
import tempfile

from .device import power_mode
from .util import BenchError, check_number, find_tool, run_tool


def _need(name, sysroot):
    tool = find_tool(name, sysroot)
    if tool is None:
        raise BenchError('{} is not installed here: this option works on a '
                         'Jetson only'.format(name))
    if sysroot == '/' and os.geteuid() != 0:
        raise BenchError(
            '{} may only be used by root: run again with sudo'.format(name))
    return tool


def set_mode(guard, number, sysroot='/'):
    """Sets nvpmodel's mode; the guard returns to the present one.

    Args:
        guard (guard.Guard): told how to undo it, before it is done.
        number (int): the mode, as in /etc/nvpmodel.conf.
        sysroot (str): root of the system.

    Returns:
        bool: False if this mode was set already.

    Raises:
        BenchError: no tool, no right, or the mode did not change (some modes
        need a restart of the board).
    """
    check_number('set_nvpmodel', number, 0, 1000, True)
    tool = _need('nvpmodel', sysroot)
    before = power_mode(sysroot)[1]
    if before is None:
        raise BenchError('`nvpmodel -q` does not tell the present mode, so '
                         'it could not be restored: nothing was changed')
    if before == number:
        return False
    guard.tell(undo=[tool, '-m', str(before)])
    status, text = run_tool([tool, '-m', str(number)])
    if power_mode(sysroot)[1] != number:
        raise BenchError(
            'nvpmodel did not switch to mode {} (status {}): {}. A mode that '
            'needs a restart must be set by hand'.format(
                number, status, text.strip()))
    return True


def lock_clocks(guard, sysroot='/'):
    """Fixes all clocks at their maximum by jetson_clocks.

    Args:
        guard (guard.Guard): told how to undo it, before it is done.
        sysroot (str): root of the system.

    Raises:
        BenchError: no tool, no right, or it failed.
    """
    tool = _need('jetson_clocks', sysroot)
    folder = tempfile.mkdtemp(prefix='jetson_clocks_')
    stored = os.path.join(folder, 'clocks')
    status, text = run_tool([tool, '--store', stored])
    if status != 0 or not os.path.exists(stored):
        os.rmdir(folder)
        raise BenchError('jetson_clocks could not store the present clocks, '
                         'so nothing was changed: ' + text.strip())
    # Undone last first: restore the clocks, then delete what was stored.
    guard.tell(undo=[
        sys.executable, '-c', 'import shutil, sys; shutil.rmtree(sys.argv[1])',
        folder
    ])
    guard.tell(undo=[tool, '--restore', stored])
    status, text = run_tool([tool])
    if status != 0:
        raise BenchError('jetson_clocks failed (status {}): {}'.format(
            status, text.strip()))
