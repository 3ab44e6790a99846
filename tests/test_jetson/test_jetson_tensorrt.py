# Copyright (c) mmbasis authors. All rights reserved.
"""The TensorRT back end on stand-ins that check order and sizes of calls."""
import json
import os
import statistics
import subprocess
import sys
import time

import jetson_helpers as helpers
import pytest

GENERATIONS = ['7', '8.0', '8.6', '10']
# One session in a process of its own, which reports what happened in it.
SESSION = """
import ctypes, json, sys
sys.path.insert(0, sys.argv[1])
from jetson.backends import Options, open_session
job = json.loads(sys.argv[2])
model = job.pop("model")
job["shapes"] = {k: tuple(v) for k, v in job["shapes"].items()}
session = open_session("tensorrt", model, Options(**job))
import tensorrt
window = session.window(0.3, 20)
latencies = list(window["latencies"])
output = session.outputs()["y"]
from jetson.inputs import make_input
data = make_input("x", session.inputs["x"], output.dtype)
live = ctypes.CDLL("libcudart.so").fake_live
before = live()
layers = session.layers(4)
session.close()
print(json.dumps(dict(
    info=session.info, batch=session.batch, calls=tensorrt.calls,
    count=len(latencies), start=window["start"], end=window["end"],
    latencies=latencies, at_once=session.at_once, layers=layers,
    output=[float(output.min()), float(output.max())],
    built=tensorrt.built[-1],
    shape=output.shape, mean=float(data.mean()), live=[before, live()])))
"""


def session(env,
            generation,
            tmp_path,
            model,
            precision=None,
            shapes=None,
            **more):
    job = dict(
        model=model,
        precision=precision,
        shapes=shapes or {},
        cache=str(tmp_path / 'cache'),
        **more)
    done = subprocess.run(
        [sys.executable, '-c', SESSION, helpers.TOOLS,
         json.dumps(job)],
        env=dict(os.environ, FAKE_TRT=generation, **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        timeout=60)
    if done.returncode:
        raise RuntimeError(done.stderr.decode())
    return json.loads(done.stdout.decode())


def check_latencies(log, start, end, latencies, least):
    """Compares measured latencies with what really happened.

    On a busy machine other processes get in between the two clock readings of
    some inferences; a quarter of them must be undisturbed.
    """
    rows = [[float(v) for v in n.split()]
            for n in log.read_text().splitlines()]
    true = [length for stamp, length in rows if start < stamp <= end]
    assert len(true) == len(latencies) and min(true) >= least
    excess = sorted(a / b - 1 for a, b in zip(latencies, true))
    assert excess[0] > -1e-3
    assert excess[len(excess) // 4] < 0.02


@pytest.mark.parametrize('generation', GENERATIONS)
def test_generations(tensorrt_env, tmp_path, generation):
    model = helpers.conv_model(tmp_path / 'm.onnx', layers=2)
    got = session(
        dict(tensorrt_env, FAKE_LOG=str(tmp_path / 'log')), generation,
        tmp_path, model)
    named = generation in ('8.6', '10')
    assert got['calls'][:2] == ['build', 'v3' if named else 'v2']
    # The data went in, through, and out again.
    assert got['output'] == [pytest.approx(got['mean'], abs=1e-6)] * 2
    assert got['shape'] == [1, 8, 16, 16] and got['batch'] == 1
    assert got['info']['cuda'] == '10.2'
    # Two tensors on both sides and a stream; nothing stays after close().
    assert got['live'] == [5, 0]
    # Two nodes of 5 ms.
    check_latencies(tmp_path / 'log', got['start'], got['end'],
                    got['latencies'], 0.010)
    again = session(tensorrt_env, generation, tmp_path, model)
    assert again['info']['from_cache'] and again['calls'][0] != 'build'


@pytest.mark.parametrize('generation', GENERATIONS)
def test_open_batch_and_reduced_precision(tensorrt_env, tmp_path, generation):
    model = helpers.conv_model(tmp_path / 'm.onnx', dynamic=True)
    got = session(tensorrt_env, generation, tmp_path, model, 'int8',
                  dict(x=[4, 3, 16, 16]))
    assert got['batch'] == 4 and got['shape'] == [4, 8, 16, 16]
    assert 'not for accuracy' in got['info']['note']
    assert got['live'] == [5, 0]  # those of the calibration are gone
    session(tensorrt_env, generation, tmp_path, model, 'fp16')
    assert len(os.listdir(tmp_path / 'cache')) == 2


def test_cache_knows_the_content_of_the_model(tensorrt_env, tmp_path):
    model = helpers.conv_model(tmp_path / 'm.onnx')
    session(tensorrt_env, '8.6', tmp_path, model)
    helpers.conv_model(tmp_path / 'm.onnx', layers=2)
    assert not session(tensorrt_env, '8.6', tmp_path,
                       model)['info']['from_cache']


def test_errors_say_what_to_do(tensorrt_env, tmp_path):
    bad = helpers.write(tmp_path, 'bad.onnx', 'text')
    with pytest.raises(RuntimeError, match='cannot parse .*not ONNX'):
        session(tensorrt_env, '8.6', tmp_path, bad)
    model = helpers.conv_model(tmp_path / 'm.onnx')
    with pytest.raises(RuntimeError, match='cannot load the plugin library'):
        session(tensorrt_env, '8.6', tmp_path, model, plugins=['none.so'])
    with pytest.raises(RuntimeError, match='does not fit'):
        session(
            tensorrt_env, '8.6', tmp_path, model, shapes=dict(x=[1, 3, 8, 8]))
    engine = tmp_path / 'old.engine'
    engine.write_text('{"version": "5"}')
    with pytest.raises(RuntimeError, match='another version'):
        session(tensorrt_env, '10', tmp_path, str(engine))


@pytest.mark.parametrize('generation', ['7', '10'])
def test_whole_run(tensorrt_env, tmp_path, generation):
    dense = helpers.conv_model(tmp_path / 'dense.onnx', layers=4)
    basis = helpers.conv_model(tmp_path / 'basis.onnx', layers=2)
    out = tmp_path / 'out'
    status, _, err = helpers.program(
        'run',
        '--raw',
        '--model',
        'dense=' + dense,
        '--model',
        'basis=' + basis,
        '--power',
        'none',
        '--precision',
        'fp16',
        '--out',
        out,
        '--cache',
        tmp_path / 'cache',
        *helpers.QUICK,
        env=dict(
            tensorrt_env, FAKE_TRT=generation, FAKE_LOG=str(tmp_path / 'log')))
    assert status == 0, err
    result = helpers.result_of(out)
    assert result['models'][0]['engine']['backend'] == 'tensorrt'
    raw = json.loads((out / 'raw.json').read_text())['latencies_s']
    raw = {(r['model'], r['repeat']): r['values'] for r in raw}
    for model, least in zip(result['models'], (0.020, 0.010)):
        for window in model['windows']:
            latencies = raw[model['name'], window['repeat']]
            check_latencies(tmp_path / 'log', window['start'], window['end'],
                            latencies, least)
            assert window['latency_ms']['p50'] == pytest.approx(
                1e3 * statistics.median(latencies))


@pytest.mark.parametrize('how, message', [
    ('error:40', 'TensorRT refused to run'),
    ('kill:40', 'the benchmark process died'),
])
def test_engine_that_dies(tensorrt_env, tmp_path, how, message):
    model = helpers.conv_model(tmp_path / 'm.onnx', layers=4)
    out = tmp_path / 'out'
    status, _, err = helpers.program(
        'run',
        '--model',
        model,
        '--power',
        'none',
        '--out',
        out,
        '--cache',
        tmp_path / 'cache',
        *helpers.QUICK,
        env=dict(tensorrt_env, FAKE_DIE=how))
    assert status != 0 and message in err
    deadline = 50
    while helpers.result_of(out)['status'] == 'running' and deadline:
        deadline -= 1  # the guard outlives the process by a moment
        time.sleep(0.1)
    result = helpers.result_of(out)
    assert result['status'] == 'partial' and message in result['reason']
