# Copyright (c) mmbasis authors. All rights reserved.
"""The trtexec back end on a script that prints what trtexec prints."""
import jetson_helpers as helpers
import pytest

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
          '--staticPlugins')


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


def run(tmp_path, *more):
    model = helpers.conv_model(tmp_path / 'm.onnx')
    return helpers.program('run', '--model', 'm=' + model, '--backend',
                           'trtexec', '--power', 'none', '--sysroot', tmp_path,
                           '--cache', tmp_path / 'cache', '--out',
                           tmp_path / 'out', *(list(more) + helpers.QUICK))


def test_version_8(tmp_path):
    fake_trtexec(tmp_path, HELP_8, NEW.format(times=''))
    status, out, err = run(tmp_path, '--precision', 'fp16')
    assert status == 0, err
    model = helpers.result_of(tmp_path / 'out')['models'][0]
    assert model['engine']['version'] == '8502'
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
