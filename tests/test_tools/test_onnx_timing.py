# Copyright (c) mmbasis authors. All rights reserved.
"""ONNX files are timed in turns, in processes without PyTorch."""
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip('onnxruntime')
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / 'tests' / 'test_jetson'))
sys.path.insert(0, str(ROOT / 'tools' / 'benchmarks'))
import jetson_helpers  # noqa: E402
from onnx_timing import time_together  # noqa: E402

SHAPE = (1, 3, 64, 64)


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp('onnx')
    return {
        name: str(
            jetson_helpers.conv_model(
                folder / f'{name}.onnx', channels, size=64, layers=3))
        for name, channels in (('small', 4), ('large', 256))
    }


def test_files_take_turns(paths):
    times = time_together(paths, SHAPE, threads=1, turns=3, max_wait=0)
    assert {k: len(v) for k, v in times.items()} == dict(small=3, large=3)
    assert 0 < max(times['small']) < min(times['large'])


def test_turns_of_a_slow_machine_do_not_count(monkeypatch):
    import onnx_timing
    turns = iter([(5., 1.), (4., 2.), (5., 3.), (4.2, 4.)])

    def run_turn(paths, shape, threads, best_ms, max_wait):
        product, latency = next(turns)
        return dict(
            latencies=[latency] * 2,
            product_ms=product,
            best_ms=min(product, best_ms or product))

    monkeypatch.setattr(onnx_timing, '_run_turn', run_turn)
    assert time_together(dict(a='', b=''), SHAPE, 1, 2) == dict(
        a=[2., 4.], b=[2., 4.])
    turns = iter([(4., 1.)] + [(5., 2.)] * 5)
    with pytest.raises(RuntimeError, match='in 1 of 6 turns, and 2 are'):
        time_together(dict(a=''), SHAPE, 1, 2)


def test_a_file_that_does_not_run_is_an_error(paths, tmp_path, capfd):
    paths = dict(paths, missing=str(tmp_path / 'missing.onnx'))
    with pytest.raises(subprocess.CalledProcessError):
        time_together(paths, SHAPE, threads=1, turns=1, max_wait=0)
    assert 'missing.onnx' in capfd.readouterr().err


@pytest.mark.parametrize('code', [
    'import onnx_timing as o; '
    'o.time_file({path!r}, {shape}, 1, o.Pace(), 0)',
    'from jetson.backends import Options, open_session; '
    'open_session("auto", {path!r}, Options()).infer()',
])
def test_torch_is_not_loaded(paths, code):
    code = code.format(path=paths['small'], shape=SHAPE)
    folders = [str(ROOT / 'tools' / 'benchmarks'), str(ROOT / 'tools')]
    subprocess.run([
        sys.executable, '-c', f'import sys; sys.path[:0] = {folders}; {code}; '
        'assert "torch" not in sys.modules'
    ],
                   check=True)
