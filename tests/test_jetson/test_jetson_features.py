# Copyright (c) mmbasis authors. All rights reserved.
"""DLA, CUDA graphs, streams, timing cache, profile, check, stages."""
import json
import os

import jetson_helpers as helpers
import numpy as np
import pytest
from jetson.extras import suppress
from test_jetson_tensorrt import GENERATIONS, session
from test_jetson_trtexec import HELP_8, NEW, fake_trtexec
from test_jetson_trtexec import run as run_trtexec

pytest.importorskip('onnxruntime')
MEAN = [('ReduceMean', ['x'], ['y'], dict(keepdims=1))]


@pytest.fixture
def model(tmp_path):
    return helpers.conv_model(tmp_path / 'm.onnx', layers=2)


@pytest.fixture
def mean(tmp_path):
    """What the stand-in for TensorRT computes, whatever the graph."""
    return helpers.small_model(tmp_path / 'mean.onnx', MEAN,
                               dict(x=[1, 3, 8, 8]), dict(y=[1, 1, 1, 1]))


def run(model, out, *args, **kwargs):
    status, table, err = helpers.program('run', '--model', model, '--power',
                                         'none', '--out', out, '--cache',
                                         str(out) + '-cache', *args,
                                         *helpers.QUICK, **kwargs)
    assert 'Traceback' not in err, err
    return status, table, err


@pytest.mark.parametrize('generation', GENERATIONS)
def test_cuda_graph(tensorrt_env, tmp_path, model, generation):
    got = session(tensorrt_env, generation, tmp_path, model, cuda_graph=True)
    name = 'v3' if generation in ('8.6', '10') else 'v2'
    # once before, once to be recorded, never again
    assert got['calls'] == ['build', name, name, 'captured']
    assert got['count'] >= 20 and min(got['latencies']) >= 0.010
    assert got['output'] == [pytest.approx(got['mean'], abs=1e-6)] * 2
    assert got['live'] == [7, 0] and got['info']['cuda_graph'] is True


def test_cuda_graph_before_cuda_11_4(old_cuda_env, tmp_path, model):
    got = session(old_cuda_env, '7', tmp_path, model, cuda_graph=True)
    assert 'captured' in got['calls'] and got['live'] == [7, 0]


@pytest.mark.parametrize('generation', GENERATIONS)
def test_streams(tensorrt_env, tmp_path, model, generation):
    got = session(tensorrt_env, generation, tmp_path, model, streams=3)
    assert got['at_once'] == 3 and got['batch'] == 1
    assert got['live'] == [3 * 5, 0] and got['info']['streams'] == 3
    # the stand-in's streams run side by side
    assert 0.010 <= sorted(got['latencies'])[2] < 0.020
    assert got['output'] == [pytest.approx(got['mean'], abs=1e-6)] * 2


def test_streams_and_graph_in_a_run(tensorrt_env, tmp_path, model):
    status, _, err = run(model, tmp_path / 'out', '--streams', '2',
                         '--cuda-graph', env=tensorrt_env)
    assert status == 0, err
    found = helpers.result_of(tmp_path / 'out')['models'][0]
    window = found['windows'][0]
    assert window['images'] == 2 * window['count'] and found['batch'] == 1
    assert found['engine']['streams'] == 2 and found['engine']['cuda_graph']


@pytest.mark.parametrize('generation', GENERATIONS)
def test_layers(tensorrt_env, tmp_path, generation):
    model = helpers.conv_model(tmp_path / 'm.onnx', layers=3, dynamic=True)
    got = session(tensorrt_env, generation, tmp_path, model)
    assert got['layers'] == [
        dict(name='node %d' % i, ms=1.5 + i) for i in range(3)
    ]


@pytest.mark.parametrize('generation', GENERATIONS)
def test_dla(tensorrt_env, tmp_path, model, generation):
    got = session(tensorrt_env, generation, tmp_path, model, 'fp16', dla=1)
    assert got['built']['dla'] == 1 and got['info']['dla'] == 1
    assert got['built']['flags'] == ['FP16', 'GPU_FALLBACK']
    # an engine of its own
    session(tensorrt_env, generation, tmp_path, model, 'fp16')
    assert len(os.listdir(str(tmp_path / 'cache'))) == 2
    with pytest.raises(RuntimeError, match='DLA runs fp16 and int8'):
        session(tensorrt_env, generation, tmp_path, model, dla=0)
    with pytest.raises(RuntimeError, match='--dla 2: this board has 2 DLA'):
        session(tensorrt_env, generation, tmp_path, model, 'fp16', dla=2)


@pytest.mark.parametrize('generation', GENERATIONS)
def test_timing_cache(tensorrt_env, tmp_path, model, generation):
    path = str(tmp_path / 'timing')
    if generation == '7':
        with pytest.raises(RuntimeError, match='8.0 was the first'):
            session(tensorrt_env, generation, tmp_path, model,
                    timing_cache=path)
        return
    got = session(tensorrt_env, generation, tmp_path, model, timing_cache=path)
    assert got['calls'][0] == 'cache of 0 bytes'
    size = os.path.getsize(path)
    got = session(tensorrt_env, generation, tmp_path, model, 'fp16',
                  timing_cache=path)
    assert got['calls'][0] == 'cache of {} bytes'.format(size) and size > 0
    helpers.write('', path, 'of another board')
    with pytest.raises(RuntimeError, match='timing: not of this board'):
        session(tensorrt_env, generation, tmp_path, model, 'int8',
                timing_cache=path)


def test_check_agrees(tensorrt_env, tmp_path, mean):
    status, table, err = run(mean, tmp_path / 'out', '--check', '--profile',
                             env=tensorrt_env)
    assert status == 0, err
    found = helpers.result_of(tmp_path / 'out')['models'][0]
    assert found['check']['agrees'] and found['check']['outputs']['y'] < 1e-3
    assert 'outputs agree with onnxruntime' in table
    assert found['layers'] == [dict(name='node 0', ms=1.5)]
    assert '1.5000 ms 100.0%  node 0' in table


def test_check_finds_other_outputs(tensorrt_env, tmp_path, model):
    """A convolution does not return the mean of its input."""
    status, table, err = run(model, tmp_path / 'out', '--check',
                             env=tensorrt_env)
    assert status == 1 and 'the outputs of m differ' in err
    assert 'FLAG outputs_differ (m): outputs differ from' in table
    found = helpers.result_of(tmp_path / 'out')
    assert found['status'] == 'complete'
    assert not found['models'][0]['check']['agrees']


@pytest.mark.parametrize('change, error', [
    (lambda y: y, 0), (lambda y: y * 1.0005, .0005), (lambda y: y * 1.1, .1),
    (lambda y: y[:, :1], None), (lambda y: y * np.nan, None),
    (lambda y: None, None), (lambda y: y.ravel(), None)
])
def test_errors_of_outputs(tmp_path, model, change, error):
    from jetson.backends import Options, open_session
    from jetson.extras import check_outputs
    opened = open_session('onnxruntime', model, Options(threads=1))
    outputs = opened.outputs

    opened.outputs = lambda: {k: change(v) for k, v in outputs().items()}
    got = check_outputs(opened, model)
    found = got['outputs']['y']
    if error is None:
        assert found is None and not got['agrees']
    else:
        assert found == pytest.approx(error, rel=1e-2, abs=1e-6)
        assert got['agrees'] == (error < 1e-3)


@pytest.fixture
def images(tmp_path):
    image = pytest.importorskip('PIL.Image')
    (tmp_path / 'images').mkdir()
    image.new('RGB', (40, 30), (200, 10, 10)).save(
        str(tmp_path / 'images' / 'a.png'))
    return tmp_path / 'images'


ORT = ['--backend', 'onnxruntime', '--threads', '1']


def test_stages(tmp_path, images):
    flat = [('Flatten', ['x'], ['y'], {})]
    model = helpers.small_model(tmp_path / 'c.onnx', flat,
                                dict(x=[2, 3, 8, 8]), dict(y=[2, 192]))
    status, table, err = run(model, tmp_path / 'out', '--stages', 'top5',
                             '--images', images, *ORT)
    assert status == 0, err
    found = helpers.result_of(tmp_path / 'out')['models'][0]['stages']
    assert found['post'] == 'top5' and found['pre_ms']['p50'] > 0
    assert found['post_ms']['p50'] > 0 and 'one after the other' in table


def test_stages_of_a_detector(tmp_path, images):
    nodes = [('Constant', [], ['s'], dict(value_ints=[2, -1, 4])),
             ('Reshape', ['x', 's'], ['dets'], {}),
             ('Abs', ['dets'], ['labels'], {})]
    model = helpers.small_model(
        tmp_path / 'd.onnx', nodes, dict(x=[2, 3, 8, 8]),
        dict(dets=[2, 48, 4], labels=[2, 48, 4]))
    status, _, err = run(model, tmp_path / 'out', '--stages', 'nms',
                         '--images', images, *ORT)
    assert status == 0, err
    found = helpers.result_of(tmp_path / 'out')['models'][0]
    assert found['stages']['post_ms']['p50'] > 0


def test_suppression():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 10, 10], [20, 20, 30, 30],
                      [0, 0, 10, 10.]])
    scores = np.array([[.9, 0], [.8, .7], [.6, .01], [.04, .95]])
    assert suppress(np, boxes, scores) == [(3, 1), (0, 0), (2, 0)]
    assert suppress(np, boxes, scores * 0) == []


@pytest.mark.parametrize('args, word', [
    (['--stages', 'top5'], '--images FOLDER'),
    (['--stages', 'nms', '--images', 'images'], 'N x boxes x 4'),
    (['--stages', 'top5', '--images', 'images'], 'N x classes'),
    (['--profile'], 'tensorrt and trtexec can'),
    (['--dla', '0', '--precision', 'fp16'], 'tensorrt and trtexec can'),
    (['--cuda-graph'], '--cuda-graph: back end onnxruntime cannot'),
    (['--streams', '2'], '--streams'), (['--streams', '0'], '--streams 0'),
    (['--timing-cache', 'x'], '--timing-cache'), (['--dla', '-1'], '--dla -1'),
])
def test_what_cannot_be_done_is_said(tmp_path, model, images, args, word):
    args = [str(images) if a == 'images' else a for a in args]
    status, _, err = run(model, tmp_path / 'out', *(args + ORT))
    assert status == 1 and word in err


PROFILE = """
for a in "$@"; do case "$a" in --exportProfile=*)
echo '[{{"count": 50}}, {{"name": "conv", "timeMs": 5, "averageMs": 0.1, \
"percentage": 100}}]' > "${{a#*=}}";; esac; done
"""


def test_trtexec(tmp_path):
    fake_trtexec(tmp_path, HELP_8,
                 PROFILE.replace('{{', '{').replace('}}', '}') +
                 NEW.format(times=''))
    status, out, err = run_trtexec(
        tmp_path, '--precision', 'fp16', '--dla', '1', '--cuda-graph',
        '--streams', '4', '--timing-cache', tmp_path / 'timing', '--profile')
    assert status == 0, err
    log = (tmp_path / 'log').read_text().splitlines()
    built, timed = log[1], [n for n in log if '--exportTimes' in n][0]
    assert '--timingCacheFile=' in built and '--fp16' in built
    for line in (built, timed):
        assert '--useDLACore=1 --allowGPUFallback' in line
    assert '--useCudaGraph' in timed and '--streams=4' in timed
    assert '--useCudaGraph' not in built
    found = helpers.result_of(tmp_path / 'out')['models'][0]
    assert found['layers'] == [dict(name='conv', ms=.1)]
    assert found['engine']['dla'] == 1 and found['engine']['streams'] == 4
    # 10 queries of one image, whatever the stream
    assert found['windows'][0]['images'] == 10
    assert '  conv' in out


def test_new_name_of_streams_and_no_outputs(tmp_path):
    fake_trtexec(tmp_path, HELP_8 + ' --infStreams', NEW.format(times=''))
    status, _, err = run_trtexec(tmp_path, '--streams', '4')
    assert status == 0, err
    assert '--infStreams=4' in (tmp_path / 'log').read_text()
    (tmp_path / 'out' / 'result.json').unlink()
    status, _, err = run_trtexec(tmp_path, '--check')
    assert status == 1 and '--check: back end trtexec cannot' in err


def test_profile_of_another_form(tmp_path):
    fake_trtexec(tmp_path, HELP_8, NEW.format(times=''))
    status, _, err = run_trtexec(tmp_path, '--profile')
    assert status == 1 and 'profile of trtexec' in err
    assert 'Traceback' not in err
    with open(str(tmp_path / 'out' / 'result.json')) as f:
        assert json.load(f)['status'] == 'partial'
