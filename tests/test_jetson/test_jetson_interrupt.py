# Copyright (c) mmbasis authors. All rights reserved.
"""Runs that are stopped at any moment: settings, files and messages."""
import os
import shutil
import signal
import subprocess
import sys
import time

import jetson_helpers as helpers
import pytest
from jetson_boards import make_board

pytest.importorskip('onnxruntime')


def start(tmp_path, *more):
    root = make_board(tmp_path / 'root', 'xavier_jp4')
    model = helpers.conv_model(tmp_path / 'm.onnx')
    process = subprocess.Popen(
        [
            sys.executable, helpers.PROGRAM, 'run', '--model', 'a=' + model,
            '--backend', 'onnxruntime', '--threads', '1', '--sysroot', root,
            '--set-nvpmodel', '0', '--jetson-clocks', '--out',
            str(tmp_path / 'out')
        ] + helpers.QUICK + ['--repeats', '500'] + list(more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True)
    return process, tmp_path / 'root' / 'state'


def wait_for(condition, seconds=30):
    limit = time.time() + seconds
    while not condition():
        assert time.time() < limit, 'waited in vain'
        time.sleep(0.02)


def windows(tmp_path):
    try:
        result = helpers.result_of(tmp_path / 'out')
        return len(result['models'][0]['windows'])
    except (OSError, IndexError):
        return 0


def restored(state):
    return ((state / 'mode').read_text().strip() == '2'
            and (state / 'clocks').read_text().strip() == 'free')


def finish(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signal_in_a_window(tmp_path, number):
    process, state = start(tmp_path)
    wait_for(lambda: windows(tmp_path) >= 2)
    assert not restored(state)
    # As a terminal does for Ctrl-C: to the whole group of processes.
    os.killpg(process.pid, number)
    status, out, err = finish(process)
    assert status == 130 and 'stopped by ' + number.name in err
    assert 'PARTIAL RESULT' in out and 'Traceback' not in err
    result = helpers.result_of(tmp_path / 'out')
    assert result['status'] == 'partial' and number.name in result['reason']
    assert result['models'][0]['summary']['windows'] >= 2
    assert result['power']['load']['readings'] > 0
    assert restored(state)


@pytest.mark.parametrize('sign', ['loading a', 'idle power', 'warming up'])
def test_signal_before_the_first_window(tmp_path, sign):
    process, state = start(tmp_path, '--idle-seconds', '2', '--warm-seconds',
                           '2', '--max-warm-seconds', '3')
    seen = b''
    while sign.encode() not in seen:
        line = process.stderr.readline()
        assert line, seen
        seen += line
    process.send_signal(signal.SIGINT)
    status, out, err = finish(process)
    assert status == 130 and 'Traceback' not in err, err
    assert helpers.result_of(tmp_path / 'out')['status'] == 'partial'
    assert restored(state)


def test_killed_outright(tmp_path):
    process, state = start(tmp_path)
    wait_for(lambda: windows(tmp_path) >= 1)
    process.kill()
    status, _, err = finish(process)
    assert status == -9
    assert 'the benchmark process died; settings are being restored' in err
    wait_for(lambda: restored(state))
    wait_for(
        lambda: helpers.result_of(tmp_path / 'out')['status'] == 'partial')
    assert len(helpers.result_of(tmp_path / 'out')['models'][0]['windows'])


@pytest.mark.parametrize('unreadable', [False, True])
def test_power_files_that_vanish(tmp_path, unreadable):
    process, state = start(tmp_path, '--repeats', '2')
    wait_for(lambda: windows(tmp_path) >= 1)
    chips = str(tmp_path / 'root' / 'sys' / 'bus' / 'i2c')
    if unreadable:
        folder = os.path.join(chips, 'drivers', 'ina3221x', '1-0041',
                              'iio:device1')
        path = os.path.join(folder, 'in_power1_input')
        os.remove(path)
        os.mkdir(path)  # reading it fails, for root too
    else:
        shutil.rmtree(chips)
    status, out, err = finish(process)
    assert status == 0, err
    result = helpers.result_of(tmp_path / 'out')
    codes = {f['code'] for f in result['flags']}
    assert {'samples_missing', 'sensor_errors'} <= codes
    assert 'FLAG samples_missing' in out
    assert result['models'][0]['summary']['fps'] > 0
    assert restored(state)


def test_undoing_that_fails_is_said(tmp_path):
    process, state = start(tmp_path, '--repeats', '1')
    wait_for(lambda: (state / 'clocks').read_text().strip() == 'fixed')
    helpers.script(tmp_path / 'root', 'usr/bin/jetson_clocks', 'exit 3')
    status, _, err = finish(process)
    assert status == 1 and 'COULD NOT RESTORE' in err
    assert (state / 'mode').read_text().strip() == '2'
