# Copyright (c) mmbasis authors. All rights reserved.
"""Tegrastats lines and logs, trtexec reports."""
import re

import jetson_helpers as helpers
import pytest
from jetson.plateaus import compare_plateaus, find_plateaus
from jetson.rails import choose_total
from jetson.sampler import Sampler
from jetson.tegrastats import parse_line, read_log
from jetson.trtexec_report import parse_report
from jetson.util import BenchError

# From shared/method.md: GPU W, GPU J and speed-up of the paper's five models.
PAPER = [(5.89, 230, 1), (5.45, 158, 1.34), (5.15, 124, 1.63),
         (5.08, 112, 1.77), (4.93, 104, 1.86)]
# Per line of jetson_fixtures.txt: power of the total in W, or None.
TOTALS = [
    7.632, 32.85, 3.346, 5.258, 4.067, 6.755, 12.377, 13.907, 17.946, 2.746,
    1.931, None
]


@pytest.fixture
def fixtures(shared_file):
    with open(shared_file('jetson_fixtures.txt')) as f:
        lines, reports = f.read().split('# trtexec\n')
    lines = [n for n in lines.splitlines() if n and not n.startswith('#')]
    return lines, re.split(r'^# R\d.*$', reports, flags=re.M)[1:]


def test_all_recorded_lines_parse(fixtures):
    assert len(fixtures[0]) == 12
    for line, expected in zip(fixtures[0], TOTALS):
        record = parse_line(line)
        total, why = choose_total(list(record['power_mw']))
        assert record['gpu_load'] is not None and record['temperature_c']
        if expected is None:
            assert total is None and 'no power rail' in why
        else:
            watts = sum(record['power_mw'][r] for r in total) * 1e-3
            assert watts == pytest.approx(expected)


def test_current_value_is_used_not_the_average():
    record = parse_line('GR3D_FREQ 84%@[713] gpu@63.5C '
                        'VDD_IN 17946mW/15710mW VDD_SOC 3923mW/3515mW')
    assert record['power_mw'] == dict(VDD_IN=17946, VDD_SOC=3923)
    assert record['average_mw']['VDD_IN'] == 15710
    assert record['gpu_mhz'] == 713


def test_three_values_and_pairs_of_temperatures():
    record = parse_line('GR3D_FREQ 12%@[1300,1300] cpu@52.9C/53.9C '
                        'VIN_SYS_5V0 5500mW/5400mW/5600mW')
    assert record['power_mw'] == dict(VIN_SYS_5V0=5500)
    assert record['gpu_mhz'] == 1300


def test_names_that_stand_twice_and_sensors_that_are_off():
    record = parse_line('GR3D_FREQ 0%@[0,0] CV0@-256C CPU@44.5C '
                        'NC 0mW/0mW VDD_CPU_CV 390mW/390mW NC 7mW/0mW')
    assert record['power_mw'] == {'NC': 0, 'VDD_CPU_CV': 390, 'NC#2': 7}
    assert record['temperature_c'] == dict(CPU=44.5)


def test_memory_is_not_power():
    record = parse_line('RAM 1464/3964MB (lfb 214x4MB) SWAP 0/1982MB (cached '
                        '0MB) IRAM 0/252kB(lfb 252kB) CPU [90%@1479,off] '
                        'EMC_FREQ 6%@1600 GR3D_FREQ 7%@768')
    assert record['power_mw'] == {} and record['ram_mb'] == (1464, 3964)
    assert record['cpu'] == [(90, 1479), None]


# Of boards with JetPack 7.0 to 7.2, shortened in the middle.
THOR = [
    ('05-14-2026 21:36:35 RAM 26063/125772MB (lfb 35x4MB) CPU [2%@972,0%@972] '
     'VDD_GPU -392mW/-392mW VDD_CPU_SOC_MSS 3924mW/3835mW '
     'VIN_SYS_5V0 5064mW/5055mW VIN 15004mW/15096mW',
     dict(VDD_GPU=-392, VDD_CPU_SOC_MSS=3924, VIN_SYS_5V0=5064, VIN=15004),
     [(2, 972), (0, 972)], None),
    ('05-17-2026 10:00:32 RAM 4208/125773MB (lfb 31x4MB) SWAP 0/2048MB '
     '(cached 0MB) CPU [1%@972,off] EMC_FREQ 0%@665 GR3D_FREQ @[7,0,0] '
     'NVENC0_FREQ @0 VIC off PVA0_FREQ off APE 300 cpu@34.468C '
     'VDD_GPU 0mW/0mW VDD_CPU_SOC_MSS 4165mW/4165mW '
     'VIN_SYS_5V0 4126mW/4126mW',
     dict(VDD_GPU=0, VDD_CPU_SOC_MSS=4165, VIN_SYS_5V0=4126),
     [(1, 972), None], 7),
    ('08-08-2026 20:58:23 RAM 3429/125749MB (lfb 120x4MB) CPU [0%,5%,off]@2601'
     ' EMC_FREQ @4266 GR3D_FREQ @[1574,1574,1574] cpu@49.75C/49.75C '
     'VDD_GPU -1mW/-33mW/0mW VIN 28906mW/14453mW/28906mW',
     dict(VDD_GPU=-1, VIN=28906), [(0, 2601), (5, 2601), None], 1574),
]


@pytest.mark.parametrize('line, power, cpu, clock', THOR)
def test_lines_of_thor(line, power, cpu, clock):
    record = parse_line(line)
    assert record['power_mw'] == power and record['cpu'] == cpu
    assert record['gpu_mhz'] == clock and record['ram_mb'][0] > 3000
    total, why = choose_total(list(power))
    assert total and 'missing' not in why


def test_a_line_without_power_and_load_is_one():
    assert parse_line('RAM 1/2MB CPU [1%@9]')['power_mw'] == {}


def test_other_lines_are_refused():
    with pytest.raises(BenchError, match='not a line of tegrastats'):
        parse_line('hello')


def check_plateaus(times, watts, second):
    """One reading at each end of a stretch may be counted or not."""
    found = compare_plateaus(find_plateaus(times, watts, 5 * second))
    assert len(found) == 5
    for p, (power, energy, speed_up) in zip(found, PAPER):
        length = p['seconds'] / second
        assert p['mean_w'] == pytest.approx(power, rel=1 / length)
        assert p['energy_j'] / second == pytest.approx(energy, abs=power)
        assert p['speed_up'] == pytest.approx(
            speed_up, abs=p['speed_up_error'])


def test_log_of_the_paper(shared_file):
    records = read_log(shared_file('xavier_vgg16_tegrastats.log'))
    watts = [r['power_mw']['GPU'] * 1e-3 for r in records]
    check_plateaus(list(range(len(watts))), watts, 1)


def test_log_of_the_paper_as_a_power_source(shared_file):
    path = shared_file('xavier_vgg16_tegrastats.log')
    sampler = Sampler('replay:{}:0.01'.format(path), '/', 0.01).start()
    try:
        while sampler.read()['alive']:
            pass
    finally:
        found = sampler.stop()
    assert found['head']['total'] == [
        'GPU', 'CPU', 'SOC', 'CV', 'VDDRQ', 'SYS5V'
    ]
    assert 'the recorded log ended' in found['errors'][-1][1]
    check_plateaus(*found['trace'].power_curve('GPU'), second=0.01)


def test_replay_command(shared_file):
    path = shared_file('xavier_vgg16_tegrastats.log')
    status, out, err = helpers.program('replay', path)
    assert status == 0, err
    assert len(out.splitlines()) == 7
    status, _, err = helpers.program('replay', path, '--rail', 'VDD_IN')
    assert status == 1 and 'SYS5V' in err


def test_reports_of_trtexec(fixtures):
    implicit, implicit_8, seven, ten = [parse_report(r) for r in fixtures[1]]
    assert implicit['images_per_execution'] == 16
    assert implicit['executions_per_s'] * 16 == pytest.approx(41087.7, 1e-3)
    assert implicit_8['images_per_execution'] == 16
    assert implicit_8['end_to_end_ms']['mean'] == 0.586663
    # TensorRT 7 prints 0 qps here; 663 executions in 3.00956 s.
    assert seven['printed_qps'] == 0 and seven['executions'] == 663
    assert seven['executions_per_s'] == pytest.approx(220.3, 1e-3)
    assert seven['latency_ms']['p99'] == 5.46606
    assert any('0 qps' in w for w in seven['warnings'])
    assert ten['executions_per_s'] == pytest.approx(130.298, 1e-3)
    assert ten['latency_ms']['p90'] == 10.2996
    assert ten['images_per_execution'] is None
    assert any('waits for the CPU' in w for w in ten['warnings'])


def test_output_without_a_report():
    with pytest.raises(BenchError, match='(?s)missing: latency.*oops'):
        parse_report('[E] oops')
