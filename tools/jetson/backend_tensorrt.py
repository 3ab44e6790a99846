# Copyright (c) mmbasis authors. All rights reserved.
"""TensorRT through its Python API, generations 7.1, 8 and 10.

``build_engine`` and numbered bindings (to 8) or named tensors (from 8.5) are
told apart by what the objects can do. Memory and streams: ``cudart``.
"""
import ctypes
import os

import numpy as np

from . import trt_build
from .backends import Session
from .cudart import Cuda
from .inputs import make_input, resolve_shape
from .util import BenchError


class Tensor:
    """One input or output: shape, numpy type, host and device memory."""

    def __init__(self, cuda, name, shape, dtype, is_input):
        self.name, self.is_input = name, is_input
        if any(s < 0 for s in shape):
            raise BenchError('{} has a size that is only known while running '
                             '({}): not supported'.format(name, shape))
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        self.size = int(np.prod(self.shape,
                                dtype=np.int64)) * self.dtype.itemsize
        # An empty tensor needs an address too.
        self.device = cuda.malloc(max(1, self.size))
        self.host = cuda.malloc_host(max(1, self.size))

    def fill(self, array):
        """Puts an input into the host memory."""
        ctypes.memmove(self.host, array.ctypes.data, self.size)

    def free(self, cuda):
        """Frees both memories."""
        cuda.free(self.device)
        cuda.free_host(self.host)


class Named:
    """Named tensors: TensorRT 8.5 and later."""

    def __init__(self, trt, engine, context):
        self.engine, self.context, self._trt = engine, context, trt
        self.names = [
            engine.get_tensor_name(i) for i in range(engine.num_io_tensors)
        ]

    def is_input(self, name):
        """Tells inputs from outputs."""
        return self.engine.get_tensor_mode(name) == \
            self._trt.TensorIOMode.INPUT

    def declared(self, name):
        """Returns the shape in the engine, -1 for open sizes."""
        return list(self.engine.get_tensor_shape(name))

    def dtype(self, name):
        """Returns the TensorRT type."""
        return self.engine.get_tensor_dtype(name)

    def set_shape(self, name, shape):
        """Fixes the shape of an input."""
        return self.context.set_input_shape(name, shape)

    def shape(self, name):
        """Returns the shape for the given inputs."""
        return list(self.context.get_tensor_shape(name))

    def runner(self, tensors, stream):
        """Returns the call that starts an inference."""
        for t in tensors:
            self.context.set_tensor_address(t.name, t.device)
        return lambda: self.context.execute_async_v3(stream)


class Numbered:
    """Numbered bindings: TensorRT 7 and 8."""

    def __init__(self, trt, engine, context):
        self.engine, self.context = engine, context
        self.names = [
            engine.get_binding_name(i) for i in range(engine.num_bindings)
        ]

    def is_input(self, name):
        """Tells inputs from outputs."""
        return self.engine.binding_is_input(self.names.index(name))

    def declared(self, name):
        """Returns the shape in the engine, -1 for open sizes."""
        return list(self.engine.get_binding_shape(self.names.index(name)))

    def dtype(self, name):
        """Returns the TensorRT type."""
        return self.engine.get_binding_dtype(self.names.index(name))

    def set_shape(self, name, shape):
        """Fixes the shape of an input."""
        return self.context.set_binding_shape(self.names.index(name), shape)

    def shape(self, name):
        """Returns the shape for the given inputs."""
        return list(self.context.get_binding_shape(self.names.index(name)))

    def runner(self, tensors, stream):
        """Returns the call that starts an inference."""
        addresses = [t.device for t in tensors]
        return lambda: self.context.execute_async_v2(
            bindings=addresses, stream_handle=stream)


def interface(trt, engine, context):
    """Returns ``Named`` or ``Numbered``, whichever the objects can do."""
    named = hasattr(engine, 'num_io_tensors') and \
        hasattr(context, 'execute_async_v3')
    return (Named if named else Numbered)(trt, engine, context)


class TensorrtSession(Session):
    """An engine with its context, stream and buffers."""

    def __init__(self, trt, engine, options, info):
        self._cuda = Cuda()
        self._tensors, self._stream = [], None
        self._engine, self._context = engine, engine.create_execution_context()
        if self._context is None:
            raise BenchError('TensorRT could not make an execution context: '
                             'probably out of memory')
        try:
            self._prepare(interface(trt, engine, self._context), trt, options)
        except BaseException:
            self.close()
            raise
        super().__init__(
            {t.name: t.shape
             for t in self._tensors if t.is_input},
            dict(info, cuda=self._cuda.version()))

    def _prepare(self, api, trt, options):
        for name in api.names:
            if api.is_input(name):
                declared = api.declared(name)
                shape = resolve_shape(name, declared, options.shapes)
                if -1 in declared and api.set_shape(name, shape) is False:
                    raise BenchError('the engine does not accept shape {} '
                                     'for {}'.format(shape, name))
        for name in api.names:
            dtype = np.dtype(trt.nptype(api.dtype(name)))
            self._tensors.append(
                Tensor(self._cuda, name, api.shape(name), dtype,
                       api.is_input(name)))
        for t in self._tensors:
            if t.is_input:
                t.fill(make_input(t.name, t.shape, t.dtype, options.images))
        self._stream = self._cuda.stream()
        self._start = api.runner(self._tensors, self._stream)

    def infer(self):
        """Copies inputs, computes, copies outputs, and waits."""
        for t in self._tensors:
            if t.is_input:
                self._cuda.to_device(t.device, t.host, t.size, self._stream)
        if not self._start():
            raise BenchError('TensorRT refused to run the engine; its '
                             'messages above say why')
        for t in self._tensors:
            if not t.is_input:
                self._cuda.to_host(t.host, t.device, t.size, self._stream)
        self._cuda.synchronize(self._stream)

    def output(self, name):
        """Returns a copy of an output of the last inference."""
        t = [t for t in self._tensors if t.name == name][0]
        raw = (ctypes.c_char * t.size).from_address(t.host)
        return np.frombuffer(raw, t.dtype).reshape(t.shape).copy()

    def close(self):
        """Frees the buffers, then the context, then the engine."""
        for t in self._tensors:
            t.free(self._cuda)
        self._tensors = []
        if self._stream is not None:
            self._cuda.destroy_stream(self._stream)
            self._stream = None
        self._start = self._context = self._engine = None


def load(path, options):
    """Loads an engine, or builds it from ONNX and keeps it.

    Args:
        path (str): ``.onnx``, or a serialized engine for this very device.
        options (Options): see there.

    Raises:
        BenchError: parsing, building or loading failed.
    """
    import tensorrt as trt
    logger = trt.Logger(trt.Logger.WARNING)
    trt_build.load_plugins(trt, logger, options.plugins)
    info = dict(version=trt.__version__, plugins=options.plugins)
    runtime = trt.Runtime(logger)
    file, engine = path, None
    if path.lower().endswith('.onnx'):
        file = trt_build.cache_path(trt, path, options)
        info['from_cache'] = os.path.exists(file)
        if not info['from_cache']:
            _keep(file, trt_build.build(trt, logger, path, options))
        if options.precision == 'int8':
            info['note'] = (
                'int8 ranges from one batch of {}: for timing, '
                'not for accuracy'.format(
                    'images' if options.images else 'random numbers'))
    with open(file, 'rb') as f:
        engine = runtime.deserialize_cuda_engine(f.read())
    if engine is None:
        raise BenchError(
            'TensorRT {} cannot load the engine {}: it was built by another '
            'version or for another GPU. Delete it and run again'.format(
                trt.__version__, file))
    info['engine'] = file
    session = TensorrtSession(trt, engine, options, info)
    session.runtime = runtime  # TensorRT wants it to outlive the engine
    return session


def _keep(file, data):
    os.makedirs(os.path.dirname(file) or '.', exist_ok=True)
    temp = '{}.{}.tmp'.format(file, os.getpid())
    with open(temp, 'wb') as f:
        f.write(data)
    os.replace(temp, file)
