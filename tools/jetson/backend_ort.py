# Copyright (c) mmbasis authors. All rights reserved.
"""ONNX Runtime: on any computer; with its CUDA or TensorRT provider too."""
import os

import numpy as np

from .backends import Session
from .inputs import make_input, resolve_shape
from .onnx_file import stored_precision
from .util import BenchError

TYPES = {
    'tensor(float)': np.float32,
    'tensor(float16)': np.float16,
    'tensor(double)': np.float64,
    'tensor(int64)': np.int64,
    'tensor(int32)': np.int32,
    'tensor(uint8)': np.uint8,
    'tensor(int8)': np.int8,
    'tensor(bool)': np.bool_,
}


class OrtSession(Session):
    """One ``InferenceSession`` with fixed inputs."""

    def __init__(self, session, feeds, info):
        super().__init__({k: v.shape for k, v in feeds.items()}, info)
        self._run = session.run
        self._names = [o.name for o in session.get_outputs()]
        self._feeds = feeds
        self.on_cpu = info['providers'] == ['CPUExecutionProvider']

    def infer(self):
        """Runs the model once; outputs are numpy arrays."""
        return self._run(None, self._feeds)

    def outputs(self):
        """Runs once more; returns the outputs by name."""
        return dict(zip(self._names, self.infer()))

    def close(self):
        """Drops the session."""
        self._run = None


def load(path, options):
    """Loads an ONNX file.

    Args:
        path (str): the file; run in the precision in which it is stored.
        options (Options): ``shapes``, ``images`` and ``threads`` are used.

    Raises:
        BenchError: another precision is asked for, or the file is bad.
    """
    import onnxruntime as ort
    stored = stored_precision(path)
    if options.precision not in (None, stored):
        raise BenchError(
            'ONNX Runtime runs {} as it is stored, in {}, and cannot turn it '
            'into {}: export such a file, or use TensorRT'.format(
                path, stored, options.precision))
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if options.threads:
        settings.intra_op_num_threads = options.threads
    # TensorRT inside ONNX Runtime would build engines without a cache: the
    # TensorRT back end is the way to that.
    providers = [
        p for p in ('CUDAExecutionProvider', 'CPUExecutionProvider')
        if p in ort.get_available_providers()
    ]
    try:
        session = ort.InferenceSession(path, settings, providers=providers)
    except Exception as e:  # its errors have no common class
        raise BenchError('ONNX Runtime cannot load {}: {}'.format(
            path, e)) from e
    feeds = {}
    for i in session.get_inputs():
        if i.type not in TYPES:
            raise BenchError(
                'input {} has type {}, which is not supported'.format(
                    i.name, i.type))
        shape = resolve_shape(i.name, i.shape, options.shapes)
        feeds[i.name] = make_input(i.name, shape, TYPES[i.type],
                                   options.images)
    info = dict(
        version=ort.__version__,
        precision=stored,
        providers=session.get_providers(),
        threads=options.threads or 'all of {}'.format(_cores()))
    return OrtSession(session, feeds, info)


def _cores():
    """Returns how many cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
