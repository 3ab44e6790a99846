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
from .util import BenchError, write_bytes


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


class Lane:
    """An execution context with buffers and a stream of its own."""

    def __init__(self, cuda, trt, engine, options):
        self._cuda, self._graph = cuda, None
        self.tensors, self._stream, self._start = [], None, None
        self.context = engine.create_execution_context()
        if self.context is None:
            raise BenchError('TensorRT could not make an execution context: '
                             'probably out of memory')
        try:
            self._prepare(interface(trt, engine, self.context), trt, options)
        except BaseException:
            self.close()
            raise

    def _prepare(self, api, trt, options):
        for name in api.names:
            if api.is_input(name):
                declared = api.declared(name)
                shape = resolve_shape(name, declared, options.shapes)
                if -1 in declared and api.set_shape(name, shape) is False:
                    raise BenchError(
                        'the engine does not accept shape {} for {}{}'.format(
                            shape, name,
                            ': with --streams, before TensorRT 10, export '
                            'fixed sizes' if options.streams > 1 else ''))
        for name in api.names:
            try:
                dtype = np.dtype(trt.nptype(api.dtype(name)))
            except TypeError as e:
                raise BenchError('{} has type {}, which numpy does not have: '
                                 'export it as fp16 or fp32'.format(
                                     name, api.dtype(name))) from e
            self.tensors.append(
                Tensor(self._cuda, name, api.shape(name), dtype,
                       api.is_input(name)))
        for t in self.tensors:
            if t.is_input:
                t.fill(make_input(t.name, t.shape, t.dtype, options.images))
        self._stream = self._cuda.stream()
        self._start = api.runner(self.tensors, self._stream)
        if options.cuda_graph:
            # The first run does work that must not be in the graph.
            self._enqueue()
            self.wait()
            try:
                self._graph = self._cuda.capture(self._stream, self._enqueue)
            except BenchError as e:
                raise BenchError('--cuda-graph: this engine cannot be '
                                 'recorded ({}): leave it out'.format(e)) \
                    from e

    def _enqueue(self):
        for t in self.tensors:
            if t.is_input:
                self._cuda.to_device(t.device, t.host, t.size, self._stream)
        if not self._start():
            raise BenchError('TensorRT refused to run the engine; its '
                             'messages above say why')
        for t in self.tensors:
            if not t.is_input:
                self._cuda.to_host(t.host, t.device, t.size, self._stream)

    def go(self):
        """Starts copying inputs, computing, and copying outputs."""
        if self._graph:
            self._cuda.launch(self._graph, self._stream)
        else:
            self._enqueue()

    def wait(self):
        """Waits until the outputs are in host memory."""
        self._cuda.synchronize(self._stream)

    def close(self):
        """Frees the graph, the buffers, and the context."""
        if self._graph:
            self._cuda.destroy_graph(self._graph)
            self._graph = None
        for t in self.tensors:
            t.free(self._cuda)
        self.tensors = []
        if self._stream is not None:
            self._cuda.destroy_stream(self._stream)
            self._stream = None
        self._start = self.context = None


class TensorrtSession(Session):
    """An engine with a lane for every stream."""

    def __init__(self, trt, engine, options, info):
        cuda = Cuda()
        self._trt, self._engine, self._lanes = trt, engine, []
        try:
            for _ in range(options.streams):
                self._lanes.append(Lane(cuda, trt, engine, options))
        except BaseException:
            self.close()
            raise
        super().__init__(
            {t.name: t.shape
             for t in self._lanes[0].tensors if t.is_input},
            dict(info, cuda=cuda.version()))
        self.at_once = options.streams

    def infer(self):
        """Runs one inference in every stream, and waits for all."""
        for lane in self._lanes:
            lane.go()
        for lane in self._lanes:
            lane.wait()

    def outputs(self):
        """Returns copies of the outputs of the last inference, by name."""
        found = {}
        for t in self._lanes[0].tensors:
            if not t.is_input:
                raw = (ctypes.c_char * t.size).from_address(t.host)
                found[t.name] = np.frombuffer(raw,
                                              t.dtype).reshape(t.shape).copy()
        return found

    def layers(self, count):
        """Times the layers; see ``Session.layers``."""
        profiler = trt_build.profiler(self._trt)
        lane = self._lanes[0]
        self.infer()  # the inputs are on the device
        # It stays: before TensorRT 10 two contexts cannot share a profile of
        # shapes, and nothing is timed after this.
        lane.context.profiler = profiler
        addresses = [t.device for t in lane.tensors]
        for _ in range(count):
            if not lane.context.execute_v2(addresses):
                raise BenchError('TensorRT refused to run the engine with a '
                                 'profiler; its messages above say why')
        return profiler.milliseconds(count)

    def close(self):
        """Frees all lanes, then the engine."""
        for lane in self._lanes:
            lane.close()
        self._lanes = []
        self._engine = None


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
    info = dict(
        version=trt.__version__,
        plugins=options.plugins,
        **options.engine_settings())
    runtime = trt.Runtime(logger)
    if options.dla is not None:
        runtime.DLA_core = options.dla
    file, engine = path, None
    if path.lower().endswith('.onnx'):
        info['precision'] = precision = options.precision_of(path)
        file = trt_build.cache_path(trt.__version__, path, options, precision)
        info['from_cache'] = os.path.exists(file)
        if not info['from_cache']:
            _keep(file, trt_build.build(trt, logger, path, options, precision))
        if options.calibrates(path):
            info['note'] = (
                'int8 ranges from one batch of {}: for timing, '
                'not for accuracy'.format(
                    'images' if options.images else 'random numbers'))
    else:
        info['precision'] = options.precision_of(path)
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
    write_bytes(file, data)
