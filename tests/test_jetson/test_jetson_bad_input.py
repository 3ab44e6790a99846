# Copyright (c) mmbasis authors. All rights reserved.
"""Whatever is wrong with the input: one line that names it, status not 0."""
import contextlib
import io
import json
import os
import shutil
import signal

import jetson_helpers as helpers
import pytest
from jetson.cli import _SIGNALS as SIGNALS
from jetson.cli import main
from jetson.compare import load_result
from jetson.util import BenchError
from jetson_boards import make_board, rail_file
from test_jetson_python36 import NEEDS_36, PYTHON36

ort = pytest.importorskip('onnxruntime')
ORT = ['--backend', 'onnxruntime', '--threads', '1', '--power', 'none']
LINE = 'GR3D_FREQ 9% VDD_IN {}mW/9mW\n'


def run_here(args, cwd=None):
    """Runs the command line in this process; returns (status, stderr)."""
    out, err = (io.TextIOWrapper(io.BytesIO(), 'utf-8') for _ in range(2))
    handlers = {n: signal.getsignal(getattr(signal, n)) for n in SIGNALS}
    before = os.getcwd()
    os.chdir(cwd or before)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([str(a) for a in args])
    except SystemExit as e:
        status = e.code
    finally:
        os.chdir(before)
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
    err.flush()
    return status, err.buffer.getvalue().decode()


def check(args, *words, cwd=None, **kwargs):
    """Runs the program, which must fail in one line with these words."""
    if kwargs:
        status, _, err = helpers.program(*args, **kwargs)
    else:
        status, err = run_here(args, cwd)
    lines = [n for n in err.splitlines() if n.startswith('error: ')]
    assert status in (1, 2) and len(lines) == 1, err
    assert 'Traceback' not in err
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    return helpers.conv_model(tmp_path_factory.mktemp('model') / 'm.onnx')


NUMBERS = [('--repeats', '0'), ('--repeats', '-3'), ('--repeats', '1e3'),
           ('--repeats', '99999999'), ('--min-seconds', '-1'),
           ('--min-seconds', '0'), ('--min-seconds', 'nan'),
           ('--min-seconds', 'inf'), ('--min-count', '0'),
           ('--min-count', '1.5'), ('--sample-hz', '0'),
           ('--sample-hz', '-1'), ('--sample-hz', 'nan'),
           ('--sample-hz', '5000'), ('--warm-seconds', '-1'),
           ('--max-warm-seconds', '1'), ('--rewarm-seconds', 'nan'),
           ('--idle-seconds', '-0.1'), ('--threads', '0'),
           ('--workspace-mib', '-5'), ('--workspace-mib', '0')]


@pytest.mark.parametrize('flag, value', NUMBERS)
def test_numbers_of_run(tmp_path, model, flag, value):
    out = tmp_path / 'out'
    # the last one counts
    check(['run', '--model', model] + ORT + ['--out', out, flag, value],
          flag, value.lstrip('-')[:3])
    assert not out.exists()


@pytest.mark.parametrize('args, words', [
    (['layers', 'X', '--out', 'o', '--rounds', '0'], ['--rounds 0']),
    (['layers', 'X', '--out', 'o', '--seconds', 'nan'], ['--seconds nan']),
    (['layers', 'X', '--out', 'o', '--min-count', '-1'], ['--min-count -1']),
    (['layers', 'X', '--out', 'o', '--max-wait', '-1'], ['--max-wait -1']),
    (['layers', 'X', '--out', 'no/such/o'], ['no/such/o', 'no such folder']),
    (['layers', 'X', '--out', 'o'], ['X/index.json', 'No such file']),
    (['replay', 'gone.log'], ['gone.log', 'No such file']),
    (['replay', '.'], ['.: Is a directory']),
    (['replay', 'X', '--period', '0'], ['--period 0']),
    (['replay', 'X', '--period', 'nan'], ['--period nan']),
    (['replay', 'X', '--period', '-1'], ['--period -1']),
    (['compare', 'gone'], ['gone', 'No such file']),
    (['compare'], ['results', '--help']),
    (['run'], ['--model', '--help']),
    (['frob'], ['frob', 'probe']),
    ([], ['COMMAND']),
])
def test_arguments(tmp_path, args, words):
    check(args, *words, cwd=str(tmp_path))


@pytest.mark.parametrize('spec, word', [
    ('replay:', 'name the log'), ('replay::1', 'name the log'),
    ('replay:gone', 'gone'), ('replay:gone:2', 'gone'),
    ('replay:LOG:nan', 'period nan'), ('replay:LOG:0', 'period 0'),
    ('replay:LOG:-1', 'period -1'), ('replay:LOG:inf', 'period inf'),
    ('replay:EMPTY', 'no power rail'), ('replay:.', 'Is a directory'),
    ('nvml:-1', 'nvml:-1'), ('nvml:\u00b2', 'nvml:'), ('nvml:', 'nvml:'),
    ('sysfs:1', "'sysfs:1'"), ('tegrastats:2', 'unknown'), ('rapl:0', 'rapl'),
    ('', "''"), ('none:1', 'unknown'), ('AUTO', 'AUTO'),
])
def test_power_sources(tmp_path, model, spec, word):
    helpers.write(tmp_path, 'LOG', LINE.format(1) * 3)
    helpers.write(tmp_path, 'EMPTY', 'RAM 1/2MB GR3D_FREQ 9%\n')
    check(['run', '--model', model, '--power', spec, '--out', 'out'], word,
          cwd=str(tmp_path))


@pytest.mark.parametrize('data, word', [
    (b'\xff\xfe\x00', 'no line of tegrastats'),
    (b'', 'no line of tegrastats'),
    (b'\x1f\x8b' + bytes(range(256)) * 20, 'no line of tegrastats'),
    (LINE.format('9' * 5000).encode() * 9, 'no rail'),
    (LINE.format(9).encode(), 'too few'),
    (LINE.format(9).encode() * 50, 'no busy stretch'),
    (LINE.format(9).encode() * 9 + b'GR3D_FREQ 9%\n', 'no rail VDD_IN'),
    (LINE.format(-900).encode() * 9 + LINE.format(-10).encode() * 9 +
     LINE.format(-900).encode() * 9, 'draws no power'),
])
def test_logs(tmp_path, data, word):
    path = tmp_path / 'a.log'
    path.write_bytes(data)
    check(['replay', path, '--rail', 'VDD_IN'], word)


def test_log_with_bytes_of_another_encoding(tmp_path):
    path = tmp_path / 'a.log'
    path.write_bytes(b'caf\xe9 \xff\n' + b''.join(
        LINE.format(9000 if 20 < i < 40 else 100).encode()
        for i in range(60)) + b'\xe9\xe8\n')
    status, out, err = helpers.program('replay', path, '--rail', 'VDD_IN')
    assert status == 0 and len(out.splitlines()) == 3, err


@pytest.mark.parametrize('args, words', [
    (['--model', 'a='], ["''"]),
    (['--model', '.'], ["'.'"]),
    (['--model', 'text.onnx'], ['text.onnx']),
    (['--model', 'text.pt', '--backend', 'torch', '--input-shape', '1x3'],
     ['text.pt is not a TorchScript file']),
    (['--model', 'x.txt', '--backend', 'auto'], ['x.txt', '.onnx']),
    (['--model', 'OK', '--input-shape', 'z:1x3x16x16'], ['z', 'are: x']),
    (['--model', 'OK', '--input-shape', 'x:1x3x16'], ['(1, 3, 16)']),
    (['--model', 'OK', '--input-shape', ''], ['expected NAME']),
    (['--model', 'OK', '--input-shape', '1x0x3'], ['1x0x3']),
    (['--model', 'OK', '--input-shape', '1x3x16x16', '--input-shape',
      '2x3x16x16'], ['2x3x16x16', 'before']),
    (['--model', 'open.onnx', '--input-shape', '90000x3x90000x90000'],
     ['90000x3x90000x90000', 'right?']),
    (['--model', 'bad.onnx'], ['bad.onnx does not run with a 2x3, b 5x7']),
    (['--model', 'none.onnx'], ['none.onnx has no input']),
    (['--model', 'flat.onnx', '--images', '.'], ['flat.onnx takes no pict']),
    (['--model', 'OK', '--images', 'broken'], ['broken', 'x.png']),
    (['--model', 'OK', '--images', 'text.pt'], ['no such folder']),
    (['--model', 'OK', '--out', 'text.pt'], ['--out text.pt', 'another']),
    (['--model', 'OK', '--out', 'text.pt/a'], ['--out text.pt/a']),
    (['--model', 'OK', '--set-nvpmodel', '-1'], ['--set-nvpmodel -1']),
])
def test_models_and_shapes(tmp_path, model, args, words):
    # what the sizes are shows only while it runs
    helpers.small_model(
        tmp_path / 'bad.onnx',
        [('NonZero', ['a'], ['n'], {}), ('Cast', ['n'], ['f'], dict(to=1)),
         ('MatMul', ['f', 'b'], ['y'], {})], dict(a=[2, 3], b=[5, 7]),
        dict(y=None))
    relu = [('Relu', ['x'], ['y'], {})]
    helpers.small_model(tmp_path / 'flat.onnx', relu, dict(x=[1, 4]),
                        dict(y=[1, 4]))
    sizes = ['a', 3, 'b', 'c']
    helpers.small_model(tmp_path / 'open.onnx', relu, dict(x=sizes),
                        dict(y=sizes))
    helpers.small_model(tmp_path / 'none.onnx',
                        [('Constant', [], ['y'], dict(value_float=2.))], {},
                        dict(y=[]))
    for name in ('text.onnx', 'text.pt', 'x.txt'):
        helpers.write(tmp_path, name, 'this is no model')
    helpers.write(tmp_path, 'broken/x.png', '\x89PNG\r\n\x1a\n broken')
    args = [model if a == 'OK' else a for a in args]
    more = [] if '--out' in args else ['--out', 'out']
    check(['run'] + ORT + helpers.QUICK + args + more, *words,
          cwd=str(tmp_path))


def test_torchscript_that_does_not_fit(tmp_path):
    torch = pytest.importorskip('torch')
    path = str(tmp_path / 'm.pt')
    torch.jit.trace(torch.nn.Linear(8, 4), torch.rand(1, 8)).save(path)
    check([
        'run', '--model', path, '--input-shape', '1x9', '--power', 'none',
        '--out', tmp_path / 'out'
    ], 'm.pt does not run with input 1x9')


ENTRY = dict(id='a', onnx='m.onnx', input_shape=[1, 3, 16, 16], rank=1)


@pytest.mark.parametrize('index, word', [
    ([], 'expected an object'), (dict(version=[]), 'version'),
    (dict(version='1'), 'version'), (dict(version=True), 'version'),
    (dict(version=1), 'no entries'), (dict(version=1, entries={}), 'entries'),
    (dict(version=1, entries=[3]), 'is no object'),
    (dict(version=1, entries=[dict(ENTRY, id=[])]), "'id'"),
    (dict(version=1, entries=[dict(ENTRY, onnx=3)]), "'onnx'"),
    (dict(version=1, entries=[dict(ENTRY, input_shape='1x3')]), "'1x3'"),
    (dict(version=1, entries=[dict(ENTRY, input_shape=[1, -3])]), '-3'),
    (dict(version=1, entries=[dict(ENTRY, input_shape=[1, .5])]), '0.5'),
    (dict(version=1, entries=[dict(ENTRY, input_shape=[1, 3])]), "entry 'a'"),
    (b'\xff{', 'index.json'), (b'[' * 100000, 'index.json'), (b'', 'index'),
])
def test_indices(tmp_path, model, index, word):
    shutil.copy(model, str(tmp_path / 'm.onnx'))
    text = index if isinstance(index, bytes) else json.dumps(index).encode()
    (tmp_path / 'index.json').write_bytes(text)
    check(['layers', tmp_path, '--out', tmp_path / 't.json'] + ORT[:4], word)


@pytest.fixture(scope='module')
def result(tmp_path_factory, model):
    out = tmp_path_factory.mktemp('run') / 'out'
    status, _, err = helpers.program('run', '--model', 'a=' + model, '--model',
                                     'b=' + model, '--out', out,
                                     *(ORT + helpers.QUICK))
    assert status == 0, err
    return helpers.result_of(out)


def damaged(value, path=()):
    """Yields results of which one part is gone or of another kind."""
    if isinstance(value, dict):
        for key in value:
            for other in damaged(value[key], path + (key, )):
                yield dict(value, **{key: other})
            yield {k: v for k, v in value.items() if k != key}
            yield dict(value, **{key: 'text'})
    elif isinstance(value, list) and value:
        for other in damaged(value[0], path + (0, )):
            yield [other] + value[1:]
        yield [3]


def test_damaged_results(tmp_path, result):
    """Any part may be missing: it is said, or it is not needed."""
    refused = 0
    for other in damaged(result):
        path = helpers.write(tmp_path, 'r.json', json.dumps(other))
        try:
            load_result(path)
        except BenchError as e:
            assert 'r.json' in str(e)
            refused += 1
    assert refused > 50


def test_damaged_result_in_one_line(tmp_path, result):
    del result['models'][1]['summary']['latency_ms']
    path = helpers.write(tmp_path, 'r.json', json.dumps(result))
    check(['compare', path], 'r.json is a damaged result', 'latency_ms')


def test_sensor_that_holds_no_number(tmp_path, model):
    root = make_board(tmp_path / 'root', 'xavier_jp4')
    helpers.write('', rail_file(root), 'nan')
    check(['run', '--model', model, '--sysroot', root, '--power', 'sysfs',
           '--out', tmp_path / 'out'], 'rail GPU', 'nan')


def test_result_that_cannot_be_written(tmp_path, model):
    os.makedirs(str(tmp_path / 'out' / 'result.csv'))
    check(['run', '--model', model, '--out', tmp_path / 'out'] + ORT +
          helpers.QUICK, 'cannot write', 'result.csv')


@NEEDS_36
def test_terminal_that_shows_ascii_alone(tmp_path):
    path = helpers.write(tmp_path, 'a.log', LINE.format(9) * 9)
    check(['replay', path, '--rail', '\u00c4'], 'no rail \\xc4',
          python=PYTHON36,
          env=dict(PYTHONIOENCODING='ascii', LC_ALL='C.UTF-8'))
