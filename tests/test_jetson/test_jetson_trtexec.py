# Copyright (c) mmbasis authors. All rights reserved.
"""The trtexec back end on a script that prints what trtexec prints."""
import jetson_helpers as helpers
import pytest
from jetson.trtexec_report import parse_inputs, parse_version

# Ten executions of 20 ms of GPU time (2 ms of copying) in 0.25 s.
NEW = """
echo "[I] TensorRT version: 8.5"
echo "[I] Input binding for x with dimensions 1x3x16x16 is created."
echo "&&&& RUNNING TensorRT.trtexec [TensorRT v8502]"
{times}sleep 0.3
echo "[01/01/2024-10:00:00] [I] === Trace details ==="
echo "[01/01/2024-10:00:00] [I] Throughput: 40 qps"
echo "[I] Latency: min = 21 ms, max = 23 ms, mean = 22 ms, median = 22 ms, \
percentile(90%) = 22.5 ms, percentile(99%) = 23 ms"
echo "[I] Enqueue Time: min = 1 ms, max = 1 ms, mean = 1 ms, median = 1 ms"
echo "[I] GPU Compute Time: min = 20 ms, max = 20 ms, mean = 20 ms, \
median = 20 ms, percentile(99%) = 20 ms"
echo "[I] Total Host Walltime: 0.25 s"
echo "[I] Total GPU Compute Time: 0.2 s"
"""
OLD = """
echo "[I] Host Latency"
echo "[I] min: 21 ms (end to end 22 ms)"
echo "[I] max: 23 ms (end to end 24 ms)"
echo "[I] mean: 22 ms (end to end 23 ms)"
echo "[I] median: 22 ms (end to end 23 ms)"
echo "[I] percentile: 23 ms at 99% (end to end 24 ms at 99%)"
echo "[I] throughput: 0 qps"
echo "[I] walltime: 0.25 s"
echo "[I] GPU Compute"
echo "[I] mean: 20 ms"
echo "[I] median: 20 ms"
echo "[I] total compute time: 0.2 s"
"""
HELP_8 = ('--memPoolSize --buildOnly --exposeDMA --exportTimes --shapes '
          '--staticPlugins --fp16 --int8 --timingCacheFile --streams')


# What NVIDIA's sources and recorded logs hold, by version.
WORDINGS = [
    ('[I] Created input binding for x with dimensions 1x3x16x16', '8.0'),
    ('[04/14/2026-01:36:52] [I] Using random values for input x\n'
     '[04/14/2026-01:36:52] [I] Created input binding for x with dimensions '
     '1x3x16x16\n[04/14/2026-01:36:52] [I] Created output binding for y with '
     'dimensions 1x8x16x16', '8.2'),
    ('[08/31/2025-21:07:08] [I] Input binding for x with dimensions '
     '1x3x16x16 is created.\n[08/31/2025-21:07:08] [I] Output binding for y '
     'is dynamic and will be created during execution using OutputAllocator.',
     '10'),
    ('[I] Input binding for x with dimensions 1x3x16x16 is created.\r', '10'),
    ('[I] Input binding for x with dimensions (1, 3, 16, 16) is created.',
     '8.6'),
]


def fake_trtexec(root, flags, report):
    helpers.script(
        root, 'usr/src/tensorrt/bin/trtexec', """
echo "$@" >> {0}/log
case "$1" in --help) echo "{1}"; exit 0;; esac
for a in "$@"; do case "$a" in
  --saveEngine=*) touch "${{a#*=}}";;
  --exportTimes=*) echo '[{{"latencyMs": 21}}, {{"latencyMs": 23}}]' > \
"${{a#*=}}";;
esac; done
{2}""".format(root, flags, report))


def run(tmp_path, *more, model=None):
    model = model or helpers.conv_model(tmp_path / 'm.onnx')
    return helpers.program('run', '--model', 'm=' + model, '--backend',
                           'trtexec', '--power', 'none', '--sysroot', tmp_path,
                           '--cache', tmp_path / 'cache', '--out',
                           tmp_path / 'out', *(list(more) + helpers.QUICK))


def test_version_8(tmp_path):
    fake_trtexec(tmp_path, HELP_8, NEW.format(times=''))
    status, out, err = run(tmp_path, '--precision', 'fp16')
    assert status == 0, err
    model = helpers.result_of(tmp_path / 'out')['models'][0]
    assert model['engine']['version'] == '8.5.2'
    window = model['windows'][0]
    assert window['fps'] == pytest.approx(40) and window['count'] == 10
    assert window['latency_ms']['p50'] == 22
    assert window['end'] - window['start'] == pytest.approx(0.25)
    calls = (tmp_path / 'log').read_text().splitlines()
    build, timed = calls[1], calls[-1]
    assert '--buildOnly' in build and '--fp16' in build
    assert '--memPoolSize=workspace:1024' in build
    assert '--loadEngine=' in timed and '--exposeDMA' in timed


def test_version_7_prints_no_rate(tmp_path):
    fake_trtexec(tmp_path, '--workspace', OLD)
    status, _, err = run(tmp_path)
    assert status == 1 and 'give --input-shape NAME' in err
    (tmp_path / 'out' / 'result.json').unlink()
    status, out, err = run(tmp_path, '--input-shape', '1x3x16x16')
    assert status == 0, err
    window = helpers.result_of(tmp_path / 'out')['models'][0]['windows'][0]
    assert window['fps'] == pytest.approx(40)
    assert window['latency_ms']['p99'] == 23
    assert window['latency_ms']['p90'] is None
    assert '0 qps' in out
    assert '--workspace=1024' in (tmp_path / 'log').read_text()


def test_failure_shows_its_error(tmp_path):
    fake_trtexec(tmp_path, '', 'echo "[E] no such plugin"; exit 1')
    status, _, err = run(tmp_path)
    assert status == 1 and '[E] no such plugin' in err


def test_nameless_shape_must_fit(tmp_path):
    fake_trtexec(tmp_path, HELP_8, NEW.format(times=''))
    status, _, err = run(tmp_path, '--input-shape', '8x3x16x16')
    assert status == 1 and 'does not fit' in err


@pytest.mark.parametrize('text, version', WORDINGS)
def test_wordings_of_input_shapes(tmp_path, text, version):
    assert parse_inputs(text) == ({'x': [1, 3, 16, 16]}, {})
    line = '[I] Input binding for x with dimensions 1x3x16x16 is created.'
    report = NEW.format(times='').replace('echo "%s"\n' % line, '').replace(
        'sleep', "cat <<'E'\n%s\nE\nsleep" % text)
    fake_trtexec(tmp_path, HELP_8, report)
    status, _, err = run(tmp_path)
    assert status == 0, err
    model = helpers.result_of(tmp_path / 'out')['models'][0]
    assert model['inputs'] == {'x': [1, 3, 16, 16]}


@pytest.mark.parametrize('name', [
    'onnx::Cast_0', 'Placeholder:0', 'a b', 'images with dimensions',
    'model/x.1'
])
def test_names_of_inputs(name):
    for form in ('Created input binding for {} with dimensions 4x3x640x640',
                 'Input binding for {} with dimensions 4x3x640x640 is '
                 'created.'):
        found = parse_inputs('[I] ' + form.format(name) + '\n')[0]
        assert found == {name: [4, 3, 640, 640]}


def test_scalars_several_inputs_and_streams():
    text = ''.join(
        '[I] Input binding for {} with dimensions {} is created.\n'.format(*x)
        for x in (('a', '2x3'), ('s', ''), ('a', '2x3'), ('b', '7')))
    assert parse_inputs(text)[0] == dict(a=[2, 3], s=[], b=[7])


@pytest.mark.parametrize('warning', [
    'Dynamic dimensions required for input: x, but no shapes were provided. '
    'Automatically overriding shape to: 1x3x1x1',
    'Shape missing for input with dynamic shape: xAutomatically setting '
    'shape to: 1x3x1x1'
])
def test_open_sizes_are_not_measured_as_one_pixel(tmp_path, warning):
    fake_trtexec(
        tmp_path, HELP_8, 'echo "[W] %s"\n' % warning +
        NEW.format(times='').replace('1x3x16x16', '1x3x1x1'))
    status, _, err = run(tmp_path)
    assert status == 1 and 'give --input-shape x:' in err and '1x3x1x1' in err
    assert 'Traceback' not in err


def test_an_open_batch_becomes_one(tmp_path):
    fake_trtexec(
        tmp_path, HELP_8, 'echo "[W] Dynamic dimensions required for input: '
        'x, but no shapes were provided. Automatically overriding shape to: '
        '1x3x16x16"\n' + NEW.format(times=''))
    status, _, err = run(tmp_path)
    assert status == 0, err
    # a shape without a name would not have reached trtexec
    (tmp_path / 'out' / 'result.json').unlink()
    status, _, err = run(tmp_path, '--input-shape', '1x3x16x16')
    assert status == 1 and 'with this name' in err


def test_shapes_reach_trtexec_with_quoted_names(tmp_path):
    fake_trtexec(tmp_path, HELP_8,
                 NEW.format(times='').replace('for x', 'for in:0'))
    status, _, err = run(tmp_path, '--input-shape', 'in:0:1x3x16x16')
    assert status == 0, err
    assert "--shapes='in:0':1x3x16x16" in (tmp_path / 'log').read_text()


def test_latencies_of_the_warm_up_are_left_out(tmp_path):
    """TensorRT 8.0 to 8.4 exports them, too."""
    report = NEW.format(times='').replace('0.2 s', '0.02 s')
    fake_trtexec(tmp_path, HELP_8, report)
    status, _, err = run(tmp_path, '--raw')
    assert status == 0, err
    window = helpers.result_of(tmp_path / 'out')['models'][0]['windows'][0]
    assert window['count'] == 1 and window['latency_ms']['max'] == 23
    assert window['latency_ms']['min'] == 23


@pytest.mark.parametrize('banner, version',
                         [('8502', '8.5.2'), ('8400', '8.4.0'),
                          ('7103', '7.1.3'), ('100600', '10.6.0'),
                          ('101303', '10.13.3')])
def test_versions(banner, version):
    assert parse_version('&&&& RUNNING TensorRT.trtexec [TensorRT v%s] [b9] '
                         '# trtexec' % banner) == version


@pytest.mark.parametrize('report, message', [
    (NEW.format(times='').replace('mean = 20 ms, median = 20 ms', ''),
     'missing: gpu_ms'),
    (NEW.format(times='').replace('0.25 s', '0 s'), 'missing: walltime'),
    (NEW.format(times='').replace('40 qps', 'nan qps').replace(
        'Total GPU', 'No'), 'missing: total compute time'),
    ('echo "&&&& FAILED TensorRT.trtexec [TensorRT v8400]"', 'trtexec failed'),
])
def test_reports_that_cannot_be_used(tmp_path, report, message):
    fake_trtexec(tmp_path, HELP_8, report)
    status, _, err = run(tmp_path)
    assert status == 1 and message in err and 'Traceback' not in err


def test_trtexec_that_writes_no_engine(tmp_path):
    fake_trtexec(tmp_path, HELP_8, 'echo done; exit 0')
    log = tmp_path / 'usr/src/tensorrt/bin/trtexec'
    log.write_text(log.read_text().replace('touch', 'true'))
    status, _, err = run(tmp_path)
    assert status == 1 and 'wrote no engine' in err
