# Copyright (c) mmbasis authors. All rights reserved.
"""Latency tables."""
import json
import re

import jetson_helpers as helpers
import pytest
from jetson.backends import Options
from jetson.layers import measure_table, read_index
from jetson.pace import Pace
from jetson.util import BenchError
from jetson_boards import make_board

pytest.importorskip('onnxruntime')
ARGS = [
    '--backend', 'onnxruntime', '--threads', '1', '--seconds', '0.05',
    '--min-count', '5', '--max-wait', '0'
]


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / 'layers'
    path.mkdir()
    entries = []
    for i, channels in enumerate((4, 128, 8)):
        helpers.conv_model(path / ('%d.onnx' % i), channels, 32)
        entries.append(
            dict(
                id='conv/%d' % channels,
                onnx='%d.onnx' % i,
                input_shape=[1, 3, 32, 32],
                rank=channels,
                extra=dict(stage=i)))
    (path / 'index.json').write_text(
        json.dumps(dict(version=1, entries=entries)))
    return path


def measure(folder, out, *more):
    return helpers.program('layers', folder, '--out', out,
                           *(ARGS + list(more)))


def test_table(folder, tmp_path):
    status, out, err = measure(folder, tmp_path / 't.json')
    assert status == 0, err
    table = json.loads((tmp_path / 't.json').read_text())
    assert table['version'] == 1 and table['status'] == 'complete'
    assert 'form' not in table['entries'][0]
    assert table['backend'] == 'onnxruntime'
    assert table['precision'] == 'fp32' and table['device']['cores'] > 0
    assert [e['id']
            for e in table['entries']] == ['conv/4', 'conv/128', 'conv/8']
    assert table['entries'][1]['extra'] == dict(stage=1)
    for e in table['entries']:
        assert e['median_ms'] > 0 and e['noise_ms'] >= 0
    assert table['entries'][1]['median_ms'] > table['entries'][0]['median_ms']
    assert 'left]' in err and 'conv/128' in out


def test_only_what_is_missing_is_measured_again(folder, tmp_path):
    out = tmp_path / 't.json'
    assert measure(folder, out)[0] == 0
    table = json.loads(out.read_text())
    first = table['entries'][0]['median_ms']
    # As if stopped after one entry; and one model has changed since.
    table.update(status='partial', entries=table['entries'][:2])
    out.write_text(json.dumps(table))
    helpers.conv_model(folder / '1.onnx', 24, 32)
    status, _, err = measure(folder, out)
    assert status == 0
    assert '2 of 3' in err and '3 of 3' in err
    table = json.loads(out.read_text())
    assert len(table['entries']) == 3
    assert table['entries'][0]['median_ms'] == first


def test_other_conditions_are_refused(folder, tmp_path):
    out = tmp_path / 't.json'
    assert measure(folder, out)[0] == 0
    before = out.read_text()
    status, _, err = measure(folder, out, '--rounds', '2')
    assert status == 1 and 'measured differently: protocol rounds 3' in err
    assert out.read_text() == before


@pytest.fixture
def products(monkeypatch):
    """Function that says how long the products of a run take, ms; the last
    one is that of all that follow."""

    def follow(*times):
        left = list(times)

        def probe(pace):
            found = left.pop(0) if len(left) > 1 else left[0]
            pace.best_ms = min(found, pace.best_ms or found)
            return found

        monkeypatch.setattr(Pace, 'probe', probe)

    return follow


def measure_quickly(folder, tmp_path, told):
    return measure_table(
        str(folder), str(tmp_path / 't.json'), 'onnxruntime',
        Options(threads=1), 1, .01, 2, max_wait=1e-6, listener=told.append)


def test_entries_of_a_slow_moment_are_measured_again(folder, tmp_path,
                                                     products):
    # before and after the first entry, and then those of the others
    products(5, 5, 4)
    told = []
    table = measure_quickly(folder, tmp_path, told)
    assert [x.split()[3] for x in told] == [
        'conv/4', 'conv/128', 'conv/8', 'conv/4']
    assert [e['product_ms'] for e in table['entries']] == [4, 4, 4]
    assert [e['id'] for e in table['entries']] == [
        'conv/4', 'conv/128', 'conv/8']
    assert table['flags'] == []


def test_entries_that_stay_slow_are_flagged(folder, tmp_path, products):
    # the machine is at its full speed once, before the first entry
    products(4, 5)
    told = []
    table = measure_quickly(folder, tmp_path, told)
    assert len(told) == 9  # three times three
    flag, = table['flags']
    assert flag['code'] == 'slow_machine'
    assert flag['text'].startswith('3 of 3 entries, such as conv/4, ')
    # a second call tries what has not come out well
    products(4)
    told.clear()
    assert measure_quickly(folder, tmp_path, told)['status'] == 'complete'
    assert len(told) == 3


def test_a_run_counts_at_full_speed(products):
    runs = []

    def run():
        runs.append(None)
        return len(runs)

    # known; waits; full, but slow after it; full before and after
    products(4, 6, 5, 4.2, 5, 4.1, 4.3)
    pace = Pace()
    pace.probe()
    assert pace.at_full_speed(run, 60) == (2, 4.3)
    assert pace.best_ms == 4


def test_of_slow_runs_the_least_slow_one_counts(products):
    products(5, 7, 6, 9)
    pace = Pace(4)
    values = iter('abcdef')
    assert pace.at_full_speed(lambda: next(values), 0) == ('a', 7)
    assert pace.at_full_speed(lambda: next(values), .05)[1] == 9


def test_a_real_product_is_timed():
    pace = Pace()
    found = pace.probe()
    assert 0 < pace.best_ms == found and pace.is_full(found)
    assert not pace.is_full(1.25 * found)


CLOCK = 'sys/class/devfreq/17000000.gv11b/'
CPU = 'sys/devices/system/cpu/cpufreq/policy0/scaling_'


@pytest.mark.parametrize('path, value, message', [
    (None, None, 'engine threads 1 instead of 2'),
    (CLOCK + 'max_freq', '900', 'clock_limits gpu .* to 900 hz'),
    (CLOCK + 'min_freq', '100', 'clock_limits gpu'),
    (CLOCK + 'governor', 'userspace', 'clock_limits gpu .* userspace'),
    (CPU + 'max_freq', '7', 'clock_limits policy0'),
    (CPU + 'governor', 'powersave', 'powersave'),
    ('state/mode', '6', 'mode MODE_2 instead of MODE_6'),
])
def test_other_settings_are_refused(folder, tmp_path, path, value, message):
    """Threads, limits of clocks, governors and power modes do not mix."""
    root = make_board(tmp_path / 'root', 'xavier_jp5')
    index = json.loads((folder / 'index.json').read_text())
    index['entries'] = index['entries'][:1]
    (folder / 'index.json').write_text(json.dumps(index))
    out = tmp_path / 't.json'
    args = dict(
        rounds=1, seconds=.01, min_count=2, max_wait=0, sysroot=root)
    measure_table(str(folder), str(out), 'onnxruntime', Options(threads=1),
                  **args)
    before = out.read_text()
    # the present clock may differ
    helpers.write(root, CLOCK + 'cur_freq', '5')
    measure_table(str(folder), str(out), 'onnxruntime', Options(threads=1),
                  **args)
    if path:
        helpers.write(root, path, value)
    with pytest.raises(BenchError, match='measured differently') as error:
        measure_table(
            str(folder), str(out), 'onnxruntime',
            Options(threads=1 if path else 2), **args)
    assert re.search(message, str(error.value))
    assert json.loads(out.read_text())['entries'] == \
        json.loads(before)['entries']


def test_what_changes_meanwhile_is_in_a_table_that_is_not_finished(
        folder, tmp_path, monkeypatch):
    root = make_board(tmp_path / 'root', 'xavier_jp5')
    import jetson.layers as layers
    real, calls = layers.measure, []

    def measure(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            raise BenchError('the end')
        helpers.write(root, CLOCK + 'max_freq', '900')
        return real(*args, **kwargs)

    monkeypatch.setattr(layers, 'measure', measure)
    with pytest.raises(BenchError, match='the end'):
        measure_table(
            str(folder), str(tmp_path / 't.json'), 'onnxruntime',
            Options(threads=1), 1, .01, 2, 0, root)
    table = json.loads((tmp_path / 't.json').read_text())
    assert table['status'] == 'partial'
    assert [f['code'] for f in table['flags']] == ['limits_changed']


@pytest.mark.parametrize('text', [
    '[]', '{"schema": "mmbasis.latency_table", "version": 1}',
    '{"schema": "mmbasis.latency_table", "version": 1, "device": 3, '
    '"entries": [], "flags": []}',
    '{"schema": "mmbasis.latency_table", "version": 1, "entries": [3], '
    '"flags": []}', 'no json'
])
def test_damaged_tables(folder, tmp_path, text):
    out = tmp_path / 't.json'
    out.write_text(text)
    status, _, err = measure(folder, out)
    assert status == 1 and 't.json' in err and 'Traceback' not in err
    assert out.read_text() == text


def test_bad_indices(folder):
    index = json.loads((folder / 'index.json').read_text())
    for change, message in ((dict(version=3), '"version": 1 or 2'),
                            (dict(entries=[]), 'no entries'),
                            (dict(entries=[dict(id=1)]), "no 'onnx'"),
                            (dict(entries=[dict(id=1, onnx='gone.onnx')]),
                             'is missing'),
                            (dict(entries=index['entries'][:1] * 2),
                             'stands twice')):
        (folder / 'index.json').write_text(json.dumps(dict(index, **change)))
        with pytest.raises(BenchError, match=message):
            read_index(str(folder))


def test_entry_that_does_not_run_keeps_the_rest(folder, tmp_path):
    (folder / '1.onnx').write_text('no model')
    status, _, err = measure(folder, tmp_path / 't.json')
    assert status == 1 and "entry 'conv/128'" in err
    table = json.loads((tmp_path / 't.json').read_text())
    assert table['status'] == 'partial' and len(table['entries']) == 1


def test_forms(folder, tmp_path):
    """An index of version 2 gives a table of version 2."""
    index = json.loads((folder / 'index.json').read_text())
    index['version'] = 2
    for entry in index['entries']:
        entry.update(role='layer', form='input', input_rank=entry['rank'])
        entry['rank'] = None
    (folder / 'index.json').write_text(json.dumps(index))
    out = tmp_path / 't.json'
    status, _, err = measure(folder, out)
    assert status == 0, err
    table = json.loads(out.read_text())
    assert table['version'] == 2
    assert [(e['form'], e['rank'], e['input_rank'])
            for e in table['entries']] == [
                ('input', None, n) for n in (4, 128, 8)]
    # one of version 1 is not continued
    out.write_text(json.dumps(dict(table, version=1)))
    status, _, err = measure(folder, out)
    assert status == 1 and 'not a latency table of version 2' in err


@pytest.mark.parametrize('key', ['form', 'rank', 'input_rank'])
def test_layers_of_version_2_say_their_form(folder, key):
    index = json.loads((folder / 'index.json').read_text())
    index['version'] = 2
    index['entries'][1].update(role='layer', form='input', input_rank=8)
    del index['entries'][1][key]
    (folder / 'index.json').write_text(json.dumps(index))
    with pytest.raises(BenchError, match='an entry has no .%s.' % key):
        read_index(str(folder))
