# Copyright (c) mmbasis authors. All rights reserved.
"""The precision that really runs is that of the file, and is told."""
import json

import jetson_helpers as helpers
import numpy as np
import pytest
from jetson.onnx_file import stored_precision
from jetson.util import BenchError
from test_jetson_tensorrt import GENERATIONS, session
from test_jetson_trtexec import HELP_8, NEW, fake_trtexec
from test_jetson_trtexec import run as run_trtexec

onnx = pytest.importorskip('onnx')


def add(path, dtype, size=8, constant=False):
    """Writes x + w, where w is stored in a type; returns the path."""
    w = np.ones([1, 3, size, size], dtype)
    cast = [('Cast', ['w'], ['c'], dict(to=1)), ('Add', ['x', 'c'], ['y'], {})]
    nodes = [('Constant', [], ['w'],
              dict(value=onnx.numpy_helper.from_array(w)))] if constant else []
    return helpers.small_model(path, nodes + cast, dict(x=list(w.shape)),
                               dict(y=list(w.shape)),
                               {} if constant else dict(w=w))


def quantised(path):
    """Writes Q/DQ of x, with one fp32 weight that is larger than the rest."""
    w = np.ones([1, 3, 16, 16], np.float32)
    nodes = [('QuantizeLinear', ['x', 's', 'z'], ['q'], {}),
             ('DequantizeLinear', ['q', 's', 'z'], ['d'], {}),
             ('Add', ['d', 'w'], ['y'], {})]
    return helpers.small_model(
        path, nodes, dict(x=[1, 3, 16, 16]), dict(y=[1, 3, 16, 16]),
        dict(w=w, s=np.float32(.1), z=np.int8(0)))


@pytest.mark.parametrize('constant', [False, True])
@pytest.mark.parametrize('dtype, name', [(np.float32, 'fp32'),
                                         (np.float16, 'fp16'),
                                         (np.float64, 'fp64')])
def test_files(tmp_path, dtype, name, constant):
    assert stored_precision(add(tmp_path / 'm.onnx', dtype,
                                constant=constant)) == name


def test_most_weights_decide(tmp_path):
    """Normalisation stays in fp32 in a file of fp16."""
    model = onnx.load(add(tmp_path / 'm.onnx', np.float16))
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones(9, np.float32), 'b'))
    model.graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones(9999, np.int64), 'i'))
    onnx.save(model, str(tmp_path / 'n.onnx'))
    assert stored_precision(str(tmp_path / 'n.onnx')) == 'fp16'
    tensor = onnx.TensorProto(
        name='v', data_type=onnx.TensorProto.BFLOAT16, dims=[999])
    model.graph.initializer.append(tensor)
    onnx.save(model, str(tmp_path / 'n.onnx'))
    assert stored_precision(str(tmp_path / 'n.onnx')) == 'bf16'


def test_quantised_files(tmp_path):
    path = quantised(tmp_path / 'q.onnx')
    assert stored_precision(path) == 'int8'
    model = onnx.load(path)
    model.graph.initializer.append(
        onnx.TensorProto(name='v', data_type=17, dims=[1]))
    onnx.save(model, path)
    assert stored_precision(path) == 'fp8'


def test_files_without_weights_and_external_ones(tmp_path):
    path = helpers.small_model(tmp_path / 'a.onnx',
                               [('Relu', ['x'], ['y'], {})], dict(x=[1]),
                               dict(y=[1]))
    assert stored_precision(path) == 'fp32'
    model = onnx.load(add(tmp_path / 'm.onnx', np.float16, 64))
    path = str(tmp_path / 'e.onnx')
    onnx.save(model, path, save_as_external_data=True, size_threshold=0)
    assert stored_precision(path) == 'fp16'


@pytest.mark.parametrize('cut', [1, 7, 50, -1, -40])
def test_files_that_are_cut_off(tmp_path, cut):
    with open(helpers.conv_model(tmp_path / 'm.onnx'), 'rb') as f:
        data = f.read()
    path = tmp_path / 'cut.onnx'
    path.write_bytes(data[:cut])
    with pytest.raises(BenchError, match='cut.onnx'):
        stored_precision(str(path))
    path.write_bytes(b'')
    with pytest.raises(BenchError, match='not ONNX'):
        stored_precision(str(path))


@pytest.mark.parametrize('generation', GENERATIONS)
@pytest.mark.parametrize('make, name, flags', [
    (lambda p: add(p, np.float16), 'fp16', ['FP16']),
    (quantised, 'int8', ['FP16', 'INT8']),
    (lambda p: add(p, np.float32), 'fp32', []),
])
def test_tensorrt_follows_the_file(tensorrt_env, tmp_path, generation, make,
                                   name, flags):
    model = make(tmp_path / 'm.onnx')
    got = session(tensorrt_env, generation, tmp_path, model)
    assert got['info']['precision'] == name
    if generation == '10' and flags:
        flags = ['strong']
    assert got['built']['flags'] == flags
    assert 'note' not in got['info']  # nothing was calibrated


def test_tensorrt_lowers_what_is_stored_in_fp32(tensorrt_env, tmp_path):
    model = add(tmp_path / 'm.onnx', np.float32)
    for name in ('fp32', 'fp16', 'int8'):
        got = session(tensorrt_env, '10', tmp_path, model, name)
        assert got['info']['precision'] == name
        assert 'strong' not in got['built']['flags']
    model = add(tmp_path / 'm.onnx', np.float16)
    for name in ('fp32', 'int8'):
        with pytest.raises(RuntimeError, match='stored in fp16 and runs in'):
            session(tensorrt_env, '10', tmp_path, model, name)


def test_engines_are_as_they_were_built(tensorrt_env, tmp_path):
    model = helpers.conv_model(tmp_path / 'm.onnx')
    got = session(tensorrt_env, '10', tmp_path, model, 'fp16')
    engine = got['info']['engine']
    got = session(tensorrt_env, '10', tmp_path, engine)
    assert got['info']['precision'] == 'as built'
    with pytest.raises(RuntimeError, match='is built already'):
        session(tensorrt_env, '10', tmp_path, engine, 'fp16')


@pytest.mark.parametrize('make, flags, built, name', [
    (lambda p: add(p, np.float16, 16), '', '--fp16', 'fp16'),
    (lambda p: add(p, np.float16, 16), ' --stronglyTyped', '--stronglyTyped',
     'fp16'),
    (quantised, '', '--fp16 --int8', 'int8'),
    (lambda p: add(p, np.float32, 16), ' --stronglyTyped', '', 'fp32'),
])
def test_trtexec_follows_the_file(tmp_path, make, flags, built, name):
    fake_trtexec(tmp_path, HELP_8 + flags, NEW.format(times=''))
    model = make(tmp_path / 'p.onnx')
    status, out, err = run_trtexec(tmp_path, model=model)
    assert status == 0, err
    found = helpers.result_of(tmp_path / 'out')['models'][0]
    assert found['engine']['precision'] == name and name + ';' in out
    line = [
        n for n in (tmp_path / 'log').read_text().splitlines()
        if '--saveEngine' in n
    ][0]
    known = ('--fp16', '--int8', '--stronglyTyped')
    assert ' '.join(n for n in line.split() if n in known) == built


def test_trtexec_without_flags_for_types(tmp_path):
    """TensorRT 11 has none: the file decides."""
    fake_trtexec(tmp_path, '--memPoolSize', NEW.format(times=''))
    status, _, err = run_trtexec(tmp_path, '--precision', 'fp16')
    assert status == 1 and 'export the model in fp16' in err
    status, _, err = run_trtexec(
        tmp_path, '--out', tmp_path / 'two',
        model=add(tmp_path / 'h.onnx', np.float16, 16))
    assert status == 0, err
    assert helpers.result_of(
        tmp_path / 'two')['models'][0]['engine']['precision'] == 'fp16'


def test_onnxruntime_and_tables_tell_it(tmp_path):
    pytest.importorskip('onnxruntime')
    add(tmp_path / 'h.onnx', np.float16)
    entry = dict(id='a', onnx='h.onnx', rank=1)
    (tmp_path / 'index.json').write_text(
        json.dumps(dict(version=1, entries=[entry])))
    args = ['layers', tmp_path, '--out', tmp_path / 't.json', '--backend',
            'onnxruntime', '--threads', '1', '--seconds', '0.01']
    status, _, err = helpers.program(*args)
    assert status == 0, err
    table = json.loads((tmp_path / 't.json').read_text())
    assert table['precision'] == 'fp16'
    status, _, err = helpers.program(*args, '--precision', 'fp32')
    assert status == 1 and 'as it is stored, in fp16' in err


def test_a_table_of_mixed_precisions_is_refused(tmp_path):
    pytest.importorskip('onnxruntime')
    add(tmp_path / 'h.onnx', np.float16)
    add(tmp_path / 's.onnx', np.float32)
    entries = [dict(id=n, onnx=n + '.onnx', rank=1) for n in 'sh']
    (tmp_path / 'index.json').write_text(
        json.dumps(dict(version=1, entries=entries)))
    status, _, err = helpers.program(
        'layers', tmp_path, '--out', tmp_path / 't.json', '--backend',
        'onnxruntime', '--threads', '1', '--seconds', '0.01')
    assert status == 1
    assert "entry 'h' runs in fp16, those before in fp32" in err
