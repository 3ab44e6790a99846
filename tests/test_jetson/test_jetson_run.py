# Copyright (c) mmbasis authors. All rights reserved.
"""Whole runs on fake boards with the real ONNX Runtime."""
import csv
import json
import math
import os
import re
import sys

import jetson_helpers as helpers
import pytest
from jetson.probe import probe, probe_text
from jetson_boards import BOARDS, TOTALS, make_board

pytest.importorskip('onnxruntime')
ORT = ['--backend', 'onnxruntime', '--threads', '1']


@pytest.fixture
def models(tmp_path):
    dense = helpers.conv_model(tmp_path / 'd.onnx', 24, 32, 4)
    basis = helpers.conv_model(tmp_path / 'b.onnx', 8, 32, 2)
    return ['--model', 'dense=' + dense, '--model', 'basis=' + basis]


def power_log(path, period, seconds):
    """A log of Xavier's rails whose GPU follows a sine; returns P(t) in W."""

    def total(t):
        return 12 + 4 * math.sin(2 * t)

    with open(str(path), 'w') as f:
        for i in range(int(seconds / period)):
            gpu = 1000 * (total(i * period) - 7)
            f.write('GR3D_FREQ 9% GPU {:.0f}/1 CPU 1000/1 SOC 2000/1 CV 0/1 '
                    'VDDRQ 1000/1 SYS5V 3000/1\n'.format(gpu))
    return total


@pytest.mark.parametrize('board', sorted(BOARDS))
def test_boards_from_probe_to_result(tmp_path, models, board):
    root = make_board(tmp_path / 'root', board)
    text = probe_text(probe(root))
    assert BOARDS[board][1] in text and 'carrier board' in text
    assert 'are missing' not in text
    assert 'MODE_2 (2)' in text and '1377000000 Hz' in text
    status, out, err = helpers.program('run',
                                       *(models[:2] + ORT + helpers.QUICK),
                                       '--sysroot', root, '--min-seconds',
                                       '.6', '--repeats', '1', '--out',
                                       tmp_path / 'out')
    assert status == 0, err
    result = helpers.result_of(tmp_path / 'out')
    summary = result['models'][0]['summary']
    assert summary['mean_w'] == pytest.approx(TOTALS[board], rel=1e-3)
    assert summary['idle_w'] == pytest.approx(TOTALS[board], rel=1e-3)
    assert summary['joule_per_image'] == pytest.approx(
        summary['mean_w'] / summary['fps'], rel=1e-3)
    assert summary['fps_per_watt'] == pytest.approx(1 /
                                                    summary['joule_per_image'])
    assert result['models'][0]['windows'][0]['clocks']['gpu_hz'] == \
        [1377000000] * 2


def test_everything_that_a_run_writes(tmp_path, models):
    log = tmp_path / 'power.log'
    power_log(log, 0.02, 60)
    out = tmp_path / 'out'
    status, table, err = helpers.program(
        'run', *(models + ORT + helpers.QUICK), '--power',
        'replay:{}:0.02'.format(log), '--baseline', 'dense', '--raw',
        '--repeats', '2', '--sample-hz', '50', '--out', out)
    assert status == 0, err
    result = helpers.result_of(out)
    assert result['schema'] == 'mmbasis.jetson_bench'
    assert result['schema_version'] == 1 and result['status'] == 'complete'
    order = sorted((w['start'], m['name']) for m in result['models']
                   for w in m['windows'])
    order = [n for _, n in order]
    assert order[:4] in (['dense', 'basis', 'basis', 'dense'],
                         ['basis', 'dense', 'dense', 'basis'])
    assert order[4:] == order[2:4] + order[:2]
    # Energy of every window against the integral of the known function.
    with open(str(out / 'raw.json')) as f:
        raw = json.load(f)
    epoch = raw['power']['times'][0]
    for model in result['models']:
        for w in model['windows']:
            a, b = w['start'] - epoch, w['end'] - epoch
            want = 12 * (b - a) + 2 * (math.cos(2 * a) - math.cos(2 * b))
            assert w['power']['energy_j']['total'] == pytest.approx(
                want, rel=.01)
            assert w['power']['complete']
            assert w['seconds'] >= 0.3 and w['count'] >= 5
    for key in ('Readings: ', 'FPS', 'p50 ms', 'p90 ms', 'p99 ms', 'idle W',
                'marg. J/image', 'FPS/W', 'VDDRQ', 'carrier board'):
        assert key in table
    ratio = result['comparisons'][0]['fps']
    assert ratio['low'] <= ratio['ratio'] <= ratio['high']
    assert ratio['ratio'] > 1.5
    with open(str(out / 'result.csv')) as f:
        rows = list(csv.DictReader(f))
    assert [r['model'] for r in rows] == ['dense', 'basis']
    assert float(rows[1]['ratio_fps']) == pytest.approx(ratio['ratio'])
    assert len(raw['latencies_s']) == 8
    assert os.path.getsize(str(out / 'power.png')) > 5000
    assert 'left]' in err


def test_plot_without_matplotlib(tmp_path, models):
    helpers.write(tmp_path, 'hide/matplotlib/__init__.py',
                  'raise ImportError("hidden")')
    root = make_board(tmp_path / 'root', 'nx_jp4')
    status, _, err = helpers.program(
        'run',
        *(models + ORT + helpers.QUICK),
        '--sysroot',
        root,
        '--out',
        tmp_path / 'out',
        env=dict(PYTHONPATH=str(tmp_path / 'hide')))
    assert status == 0, err
    svg = (tmp_path / 'out' / 'power.svg').read_text()
    assert svg.count('class="window"') == 2 + 2 * 2  # idle, timed
    assert '<polyline' in svg and 'http' not in svg.replace(
        'http://www.w3.org/2000/svg', '')
    from xml.etree import ElementTree
    ElementTree.fromstring(svg)


def test_settings_are_applied_and_restored(tmp_path, models):
    root = make_board(tmp_path / 'root', 'xavier_jp5')
    status, _, err = helpers.program('run',
                                     *(models[:2] + ORT + helpers.QUICK),
                                     '--sysroot', root, '--set-nvpmodel', '0',
                                     '--jetson-clocks', '--out',
                                     tmp_path / 'out')
    assert status == 0, err
    assert helpers.result_of(tmp_path /
                             'out')['state_before']['mode'] == ['MODE_0', 0]
    state = tmp_path / 'root' / 'state'
    assert (state / 'mode').read_text().strip() == '2'
    assert (state / 'clocks').read_text().strip() == 'free'
    log = [
        n for n in (state / 'log').read_text().splitlines() if '-q' not in n
    ]
    assert [re.sub(r' /\S+', '', n).strip() for n in log] == [
        'nvpmodel -m 0', 'jetson_clocks --store', 'jetson_clocks',
        'jetson_clocks --restore', 'nvpmodel -m 2'
    ]


def test_mode_that_does_not_switch_changes_nothing(tmp_path, models):
    root = make_board(tmp_path / 'root', 'xavier_jp5')
    helpers.script(root, 'usr/sbin/nvpmodel',
                   'printf "NV Power Mode: 15W\\n2\\n"')
    status, _, err = helpers.program('run', *(models + ORT), '--sysroot', root,
                                     '--set-nvpmodel', '0', '--out',
                                     tmp_path / 'out')
    assert status == 1 and 'did not switch to mode 0' in err


@pytest.mark.parametrize('path, value, code', [
    ('sys/class/thermal/cooling_device1/cur_state', '2', 'throttled'),
    ('sys/class/hwmon/hwmon9/oc1_event_cnt', '3', 'throttled'),
    ('sys/class/devfreq/17000000.gv11b/max_freq', '5', 'limits_changed'),
    ('sys/class/devfreq/17000000.gv11b/cur_freq', '9', 'clocks_moved'),
    ('state/mode', '6', 'mode_changed'),
])
def test_what_spoils_a_window_is_flagged(tmp_path, monkeypatch, path, value,
                                         code):
    from jetson.backends import Options, Session
    from jetson.protocol import Run, Settings
    from jetson.util import now, wait_until
    root = make_board(tmp_path / 'root', 'xavier_jp4')
    begin = now()

    class Changing(Session):
        """Its load changes the device in the middle of a window."""

        def infer(self):
            wait_until(now() + 0.01)
            if self.inside and now() > self.inside + 0.7:
                helpers.write(root, path, value)

        def window(self, *args):
            self.inside = now()
            return Session.window(self, *args)

        inside = None

    session = Changing(dict(x=(1, 3)), dict(backend='own', precision='fp32'))
    monkeypatch.setattr('jetson.protocol.open_session', lambda *args: session)
    model = helpers.write(tmp_path, 'm.onnx', 'x')
    run = Run([('m', model)], 'm', 'own', Options(),
              Settings(1, 1.5, 1, 0, 0.1, 0, 0.1, 20), 'sysfs',
              str(tmp_path / 'r.json'), root)
    result = run.execute()
    assert code in [f['code'] for f in result['flags']]
    assert result['status'] == 'complete' and now() > begin


@pytest.mark.parametrize('faster', [1.0, 1.25])
def test_a_whole_run_under_drift(tmp_path, monkeypatch, faster):
    """Each window is half a percent slower than the one before."""
    from jetson.backends import Options, Session
    from jetson.protocol import Run, Settings
    count, opened = [0], []

    class Drifting(Session):

        def warm_up(self, *args):
            return dict(settled=True, seconds=0, count=1, median_ms=1)

        def window(self, *args):
            each = .01 * 1.005**count[0] / self.speed
            count[0] += 1
            return dict(start=0, end=50 * each, latencies=[each] * 50,
                        count=50, notes=[])

    def open_session(*args):
        opened.append(
            Drifting(dict(x=(1, 3)), dict(backend='own', precision='fp32')))
        opened[-1].speed = faster if len(opened) == 2 else 1.0
        return opened[-1]

    monkeypatch.setattr('jetson.protocol.open_session', open_session)
    model = helpers.write(tmp_path, 'm.onnx', 'x')
    result = Run([('a', model), ('b', model)], 'a', 'own', Options(),
                 Settings(), None, str(tmp_path / 'r.json'),
                 str(tmp_path)).execute()
    assert count == [2 * 14]
    for name, want in (('fps', faster), ('latency_p50', 1 / faster)):
        found = result['comparisons'][0][name]
        assert found['low'] <= want <= found['high']
        assert found['ratio'] == pytest.approx(want)
        assert 'signed ranks' in found['method'] and '7' in found['method']


def test_compare(tmp_path, models):
    for name, board in (('one', 'xavier_jp4'), ('two', 'xavier_jp5')):
        root = make_board(tmp_path / (name + '-root'), board)
        status, _, err = helpers.program('run',
                                         *(models + ORT + helpers.QUICK),
                                         '--sysroot', root, '--out',
                                         tmp_path / name)
        assert status == 0, err
    status, out, err = helpers.program('compare', tmp_path / 'one',
                                       tmp_path / 'two' / 'result.json',
                                       '--baseline', 'one/dense', '--json',
                                       tmp_path / 'c.json')
    assert status == 0, err
    assert 'two/basis' in out and 'L4T is 35.4.1' in out
    found = json.loads((tmp_path / 'c.json').read_text())
    assert len(found['rows']) == 4
    assert found['rows'][1]['fps']['ratio'] > 1.5
    assert 'separate runs' in found['rows'][1]['fps']['method']
    status, _, err = helpers.program('compare', tmp_path / 'one', '--baseline',
                                     'none')
    assert status == 1 and 'one/dense, one/basis' in err
    bad = helpers.write(tmp_path, 'bad.json', '{"a": 1}')
    status, _, err = helpers.program('compare', bad)
    assert status == 1 and 'is not a result' in err
    newer = helpers.result_of(tmp_path / 'one')
    newer['schema_version'] = 99
    helpers.write(tmp_path, 'new.json', json.dumps(newer))
    status, _, err = helpers.program('compare', tmp_path / 'new.json')
    assert status == 1 and 'newer jetson_bench' in err
    other = helpers.result_of(tmp_path / 'one')
    other['models'][0]['engine']['threads'] = 4
    other['state_before']['cpu']['policy0']['governor'] = 'powersave'
    helpers.write(tmp_path, 'other.json', json.dumps(other))
    status, out, err = helpers.program('compare', tmp_path / 'one',
                                       tmp_path / 'other.json')
    assert status == 0, err
    assert "other/dense: engine settings is {'threads': 4" in out
    assert 'powersave' in out and 'other/dense: power mode' not in out


@pytest.mark.parametrize('args, message', [
    (['--model', 'gone.onnx'], 'no such file'),
    (['--model', 'a=x.onnx', '--model', 'a=y.onnx'], 'two models are called'),
    (['--model', 'a=x.onnx', '--baseline', 'b'], 'the models are a'),
    (['--model', 'a=MODEL', '--precision', 'fp16'], 'export such a file'),
    (['--model', 'a=MODEL', '--input-shape', '3xa'], 'expected NAME:'),
    (['--model', 'a=MODEL', '--images', 'gone'], 'no such folder'),
    (['--model', 'a=MODEL', '--power', 'nvml:x'], 'not the index'),
])
def test_errors(tmp_path, models, args, message):
    model = models[1].split('=')[1]
    status, _, err = helpers.program(
        'run', *([a.replace('MODEL', model) for a in args] + ORT),
        *([] if '--power' in args else ['--power', 'none']), '--out',
        tmp_path / 'out')
    assert status == 1 and message in err and 'Traceback' not in err


def test_images_and_open_batch(tmp_path):
    image = pytest.importorskip('PIL.Image')
    os.makedirs(str(tmp_path / 'images'))
    image.new('RGB', (40, 30),
              (200, 10, 10)).save(str(tmp_path / 'images' / 'a.png'))
    model = helpers.conv_model(tmp_path / 'm.onnx', dynamic=True)
    status, _, err = helpers.program('run', '--model', model,
                                     *(ORT + helpers.QUICK), '--power', 'none',
                                     '--images', tmp_path / 'images',
                                     '--input-shape', 'x:3x3x16x16', '--out',
                                     tmp_path / 'out')
    assert status == 0, err
    model = helpers.result_of(tmp_path / 'out')['models'][0]
    assert model['batch'] == 3
    assert model['windows'][0]['images'] == 3 * model['windows'][0]['count']


def test_torchscript(tmp_path):
    torch = pytest.importorskip('torch')
    path = str(tmp_path / 'm.pt')
    torch.jit.trace(torch.nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8,
                                                         8)).save(path)
    args = [
        'run', '--model', path, '--threads', '1', '--power', 'none', '--out',
        tmp_path / 'out'
    ] + helpers.QUICK
    status, _, err = helpers.program(*args)
    assert status == 1 and 'give one --input-shape' in err
    (tmp_path / 'out' / 'result.json').unlink()
    status, out, err = helpers.program(*args, '--input-shape', '2x3x8x8')
    assert status == 0, err
    model = helpers.result_of(tmp_path / 'out')['models'][0]
    assert model['engine']['backend'] == 'torch' and model['batch'] == 2


def test_no_total_is_said(tmp_path, models):
    root = make_board(tmp_path / 'root', 'nano_jp4')
    folder = 'sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/'
    for i in range(3):
        helpers.write(root, folder + 'rail_name_%d' % i, 'RAIL%d' % i)
    status, out, err = helpers.program('run',
                                       *(models[:2] + ORT + helpers.QUICK),
                                       '--sysroot', root, '--out',
                                       tmp_path / 'out')
    assert status == 0, err
    assert 'FLAG no_total' in out and 'RAIL0, RAIL1, RAIL2' in out
    summary = helpers.result_of(tmp_path / 'out')['models'][0]['summary']
    assert summary['mean_w'] is None
    assert summary['mean_w_by_rail']['RAIL1'] == pytest.approx(1.0)


def test_selftest_and_help():
    for args in (['--help'], ['run', '--help']):
        status, out, _ = helpers.program(*args, python=sys.executable)
        assert status == 0 and 'usage' in out
    status, out, err = helpers.program('selftest')
    # A busy machine may fail the loop that is timed; the rest is exact.
    assert out.count('ok  ') >= 3, out + err


@pytest.mark.parametrize('old, kind', [({}, 'energy'),
                                       (dict(FAKE_NVML_OLD='1'), 'power')])
def test_graphics_cards(tmp_path, models, nvml_env, old, kind):
    status, out, err = helpers.program(
        'run',
        *(models[:2] + ORT + helpers.QUICK),
        '--power',
        'nvml',
        '--sample-hz',
        '50',
        '--out',
        tmp_path / 'out',
        env=dict(nvml_env, **old))
    assert status == 0, err
    result = helpers.result_of(tmp_path / 'out')
    assert result['power']['kind'] == kind and 'host computer' in out
    for window in result['models'][0]['windows']:
        assert window['power']['mean_w']['total'] == pytest.approx(75, .01)
    status, _, err = helpers.program(
        'run', *models, '--power', 'nvml:1', env=nvml_env)
    assert status == 1 and 'Invalid Argument' in err
