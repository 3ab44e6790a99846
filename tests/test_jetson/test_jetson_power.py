# Copyright (c) mmbasis authors. All rights reserved.
"""Rails, totals, sources, the sampling process, energy of windows."""
import math
import os
import shutil
import signal
import threading
import time

import jetson_helpers as helpers
import pytest
from jetson.device import clock_files
from jetson.energy import Trace, integrate, window_energy
from jetson.rails import choose_total, find_rails, scope
from jetson.sampler import Sampler
from jetson.sources import choose_source, open_source
from jetson.util import BenchError, now
from jetson_boards import BOARDS, TOTALS, make_board, rail_file


@pytest.mark.parametrize('name', sorted(BOARDS))
def test_boards(tmp_path, name):
    root = make_board(tmp_path, name)
    source = open_source('sysfs', root)
    power = dict(zip(source.rails, source.read()[1]))
    assert sum(power[r] for r in source.total) == pytest.approx(TOTALS[name])
    assert 'NC' not in power and 'carrier board' in source.scope


def test_unconnected_and_sum_channels_are_no_rails(tmp_path):
    rails = find_rails(make_board(tmp_path, 'orin_jp6'))
    assert [r.name for r in rails] == [
        'VDD_GPU_SOC', 'VDD_CPU_CV', 'VIN_SYS_5V0', 'VDDQ_VDD2_1V8AO'
    ]


@pytest.mark.parametrize('names, why', [
    (['FOO', 'BAR'], 'not known'),
    (['GPU', 'CPU', 'SOC', 'CV', 'VDDRQ'], 'SYS5V are missing'),
    (['GPU', 'CPU', 'SOC', 'CV', 'VDDRQ', 'SYS5V', 'X'], 'X are not known'),
    ([], 'no power rail'),
    (['VDD_GPU', 'VIN_SYS_5V0'], 'rails VDD_CPU_SOC_MSS are missing'),
    (['VDD_GPU_SOC', 'VDD_CPU_CV'], 'rails VIN_SYS_5V0 are missing'),
    # Orin and Thor have it: nothing is known to be missing
    (['VIN_SYS_5V0'], 'rails VIN_SYS_5V0 are not known'),
    (['VIN_SYS_5V0', 'NEW'], 'rails VIN_SYS_5V0, NEW are not known'),
    (['GPU', 'VDD_SOC'], 'rails GPU, VDD_SOC are not known'),
])
def test_no_total_where_it_would_be_wrong(names, why):
    total, reason = choose_total(names)
    assert total is None and why in reason


THOR = ['VDD_GPU', 'VDD_CPU_SOC_MSS', 'VIN_SYS_5V0']


def test_totals_of_thor():
    assert choose_total(THOR)[0] == THOR
    assert 'carrier board (fan' in scope(THOR)
    assert choose_total(THOR + ['VIN'])[0] == ['VIN']
    assert 'whole board' in scope(['VIN'])


def test_thor_through_sysfs(tmp_path):
    root = make_board(tmp_path, 'thor_jp7')
    source = open_source('sysfs', root)
    power = dict(zip(source.rails, source.read()[1]))
    assert power == dict(
        VDD_GPU=pytest.approx(-.39), VDD_CPU_SOC_MSS=pytest.approx(3.9),
        VIN_SYS_5V0=pytest.approx(5), VIN=pytest.approx(15))
    assert 'whole board' in source.scope and source.total == ['VIN']
    clocks = clock_files(root)
    assert clocks['gpu_hz'].endswith('gpu-gpc-0/cur_freq')
    assert clocks['emc_hz'].endswith('bwmgr/cur_freq')
    # without the monitor of the board's input: a carrier of somebody else
    shutil.rmtree(os.path.join(root, 'sys/bus/i2c/drivers/ina238'))
    source = open_source('sysfs', root)
    assert source.total == THOR and 'carrier board (fan' in source.scope


def test_why_no_source(tmp_path):
    source, reasons = choose_source('auto', str(tmp_path))
    assert source is None
    assert any('no INA3221' in r for r in reasons)
    with pytest.raises(BenchError, match='RAPL'):
        choose_source('rapl', str(tmp_path))
    with pytest.raises(BenchError, match='unknown power source'):
        open_source('volcano')


def test_unreadable_rail_is_named(tmp_path):
    root = make_board(tmp_path, 'xavier_jp4')
    helpers.write('', rail_file(root), 'not a number')
    with pytest.raises(BenchError, match='rail GPU cannot be read.*sudo'):
        open_source('sysfs', root)


def test_tegrastats_as_a_source(tmp_path):
    helpers.script(
        tmp_path, 'usr/bin/tegrastats', """
while true; do
  echo "GR3D_FREQ 5% VDD_IN 4000mW/9000mW VDD_SOC 1000mW/9000mW"; sleep 0.02
done""")
    source, _ = choose_source('auto', str(tmp_path))
    assert source == 'tegrastats'
    sampler = Sampler(source, str(tmp_path), 0.02).start()
    time.sleep(0.5)
    found = sampler.stop()
    assert found['trace'].total == ['VDD_IN']
    assert len(found['trace'].times) > 5
    assert set(found['trace'].series('total')) == {4.0}


LINE = 'echo "GR3D_FREQ 5% VDD_IN 4000mW/9000mW"'


def tegrastats(root, text):
    """A tegrastats that notes its process; returns a check that it ended."""
    pid = root / 'pid'
    helpers.script(root, 'usr/bin/tegrastats', 'echo $$ > {}\n{}'.format(
        pid, text))

    def ended():
        number = int(pid.read_text())
        for _ in range(100):
            try:
                with open('/proc/%d/stat' % number) as f:
                    if f.read().rsplit(')', 1)[1].split()[0] == 'Z':
                        return True  # waits for init alone
            except OSError:
                return True
            time.sleep(0.05)
        return False

    return ended


@pytest.mark.parametrize('text, message', [
    ('exec sleep 1000', 'printed no line in 5.0 s'),
    ('trap "" TERM; while :; do sleep 0.1; done', 'printed no line'),
    ('exec yes hello', "prints something else: b'hello'"),
    ('exec tr -d "\\\\n" < /dev/zero', 'printed no line'),
    ('exit 3', 'tegrastats ended'),
    ('echo "RAM 1/2MB GR3D_FREQ 0%"; exec sleep 1000', 'no power rail'),
])
def test_tegrastats_that_tells_nothing(tmp_path, text, message):
    ended = tegrastats(tmp_path, text)
    start = now()
    with pytest.raises(BenchError) as error:
        open_source('tegrastats', str(tmp_path), 0.1)
    assert message in str(error.value) and now() - start < 12
    assert ended()


def test_tegrastats_that_ignores_sigterm(tmp_path):
    ended = tegrastats(
        tmp_path, 'trap "" TERM INT HUP\nwhile :; do %s; sleep 0.02; done' %
        LINE)
    sampler = Sampler('tegrastats', str(tmp_path), 0.02).start()
    time.sleep(0.2)
    start = now()
    found = sampler.stop()
    assert now() - start < 5 and found['load']['readings'] > 2
    assert ended()


def test_tegrastats_that_stalls(tmp_path):
    ended = tegrastats(
        tmp_path, 'for i in 1 2 3 4 5; do %s; sleep 0.05; done\n'
        'trap "" TERM; exec sleep 1000' % LINE)
    sampler = Sampler('tegrastats', str(tmp_path), 0.05).start()
    time.sleep(2)
    start = now()
    found = sampler.stop()
    assert now() - start < 5 and len(found['trace'].times) >= 4
    assert 'printed no line in 1.0 s' in found['errors'][0][1]
    assert found['load'] and ended()


def test_run_with_a_tegrastats_that_stalls(tmp_path):
    pytest.importorskip('onnxruntime')
    # the first process answers the question whether there is one
    ended = tegrastats(
        tmp_path, 'for i in 1 2 3 4 5; do %s; sleep 0.05; done\n'
        'exec sleep 1000' % LINE)
    status, out, err = helpers.program(
        'run', '--model', helpers.conv_model(tmp_path / 'm.onnx'), '--backend',
        'onnxruntime', '--threads', '1', '--sysroot', tmp_path, '--out',
        tmp_path / 'out', *helpers.QUICK)
    assert status == 0 and 'Traceback' not in err, err
    assert 'FLAG samples_missing' in out and 'FLAG sensor_errors' in out
    assert ended()


def test_tegrastats_ends_with_a_sampler_that_is_killed(tmp_path):
    ended = tegrastats(tmp_path, '%s\ntrap "" TERM; exec sleep 1000' % LINE)
    sampler = Sampler('tegrastats', str(tmp_path), 0.05).start()
    os.kill(sampler._process.pid, signal.SIGKILL)
    sampler.stop()
    assert ended()


def test_rapl_counters_that_start_again(tmp_path):
    zone = 'sys/class/powercap/intel-rapl:0/'
    for path, text in (('name', 'package-0'), ('energy_uj', '900000'),
                       ('max_energy_range_uj', '1000000')):
        helpers.write(tmp_path, zone + path, text)
    # The core domain lies inside the package and must not be added.
    helpers.write(tmp_path, 'sys/class/powercap/intel-rapl:0:0/name', 'core')
    source = open_source('rapl', str(tmp_path))
    assert source.kind == 'energy' and source.total == ['package-0']
    assert source.read()[1] == [0]
    helpers.write(tmp_path, zone + 'energy_uj', '100000')
    assert source.read()[1] == [pytest.approx(0.2)]


def trace_of(function, times, kind='power'):
    trace = Trace(['a'], ['a'], kind)
    for t in times:
        trace.add(t, [function(t)])
    return trace


@pytest.mark.parametrize('power, exact', [
    (lambda t: 7.0, lambda t: 7 * t),
    (lambda t: 3 + 2 * t, lambda t: 3 * t + t * t),
    (lambda t: 10 + 5 * math.sin(3 * t),
     lambda t: 10 * t - 5 / 3 * math.cos(3 * t)),
    (lambda t: 20
     if t % 2 < 1 else 5, lambda t: 12.5 * t + 7.5 * min(t % 2, 2 - t % 2)),
])
def test_known_power_gives_known_energy(power, exact):
    times = [0.05 * i + 0.01 * math.sin(i) for i in range(400)]
    start, end = 1.234, 17.871
    got = window_energy(trace_of(power, times), start, end, 0.05)
    want = exact(end) - exact(start)
    assert got['energy_j']['total'] == pytest.approx(want, rel=0.01)
    assert got['mean_w']['a'] == pytest.approx(want / (end - start), rel=.01)
    assert got['complete']


def test_window_between_two_readings():
    assert integrate([0, 10], [0, 10], 4, 6) == pytest.approx(10)


def test_counters_of_energy():
    trace = trace_of(lambda t: 12 * t, [0.1 * i for i in range(100)], 'energy')
    got = window_energy(trace, 1.23, 8.88, 0.1)
    assert got['mean_w']['total'] == pytest.approx(12)
    assert trace.power_curve('a')[1][3] == pytest.approx(12)


def test_missing_readings_are_seen():
    times = [0.05 * i for i in range(200) if not 60 < i < 90]
    got = window_energy(trace_of(lambda t: 5.0, times), 1, 9, 0.05)
    assert got['covered'] and not got['complete']
    assert got['longest_gap_s'] == pytest.approx(1.5)
    got = window_energy(trace_of(lambda t: 5.0, times), 1, 15, 0.05)
    assert not got['covered'] and not got['complete']
    assert window_energy(trace_of(abs, []), 0, 1, 0.1)['energy_j'] == {}


def test_sampler_follows_changing_files(tmp_path):
    root = make_board(tmp_path, 'xavier_jp4')
    path, epoch, stop = rail_file(root), now(), threading.Event()

    def power(t):
        return 6000 + 3000 * math.sin(t - epoch)

    def writer():
        while not stop.is_set():
            with open(path + '.new', 'w') as f:
                f.write('%d' % power(now()))
            os.replace(path + '.new', path)
            time.sleep(0.002)

    thread = threading.Thread(target=writer)
    thread.start()
    sampler = Sampler('sysfs', root, 0.02).start()
    start = now()
    time.sleep(3)
    end = now()
    time.sleep(0.1)
    found = sampler.stop()
    stop.set()
    thread.join()
    got = window_energy(found['trace'], start, end, 0.02)
    want = 6 * (end - start) + 3 * (
        math.cos(start - epoch) - math.cos(end - epoch))
    assert got['energy_j']['GPU'] == pytest.approx(want, rel=0.01)
    assert got['energy_j']['CPU'] == pytest.approx(end - start, rel=0.01)
    assert found['load']['readings'] >= got['samples'] > 75
    assert found['load']['cpu_s'] < found['load']['seconds']


def test_files_that_vanish_and_return(tmp_path):
    root = make_board(tmp_path, 'xavier_jp4')
    path = rail_file(root)
    sampler = Sampler('sysfs', root, 0.02).start()
    time.sleep(0.2)
    os.rename(path, path + '.away')
    time.sleep(0.4)
    os.rename(path + '.away', path)
    time.sleep(0.2)
    found = sampler.stop()
    assert 'in_power0_input' in found['errors'][0][1]
    times = found['trace'].times
    assert max(b - a for a, b in zip(times, times[1:])) > 0.3
    assert set(found['trace'].series('total')) == {TOTALS['xavier_jp4']}


def test_sampler_reads_clocks_and_reports_a_bad_source(tmp_path):
    root = make_board(tmp_path, 'xavier_jp5')
    clock = helpers.write(tmp_path, 'clock', '1377000000')
    sampler = Sampler('sysfs', root, 0.02, dict(gpu_hz=clock)).start()
    time.sleep(0.1)
    assert sampler.stop()['watched'][0][1] == dict(gpu_hz=1377000000)
    with pytest.raises(BenchError, match='did not start: no RAPL'):
        Sampler('rapl', root).start()


def test_uncovered_windows_are_not_guessed():
    trace = trace_of(lambda t: 5.0, [0.05 * i for i in range(100)])
    got = window_energy(trace, 4, 7, 0.05)
    assert got['samples'] == 20 and not got['covered']
    assert got['energy_j'] == got['mean_w'] == {}
