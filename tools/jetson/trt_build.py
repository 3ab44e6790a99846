# Copyright (c) mmbasis authors. All rights reserved.
"""Builds TensorRT engines from ONNX, with the interfaces of 7.1 to 10.

The generations are told apart by what they can do, not by their number:
``max_workspace_size`` gave way to ``set_memory_pool_limit`` in 8.4, and
``build_engine`` to ``build_serialized_network`` in 8.0.
"""
import ctypes
import hashlib
import json
import os
import platform

import numpy as np

from .inputs import make_input, resolve_shape
from .util import BenchError, read_text, sha256, write_bytes


def load_plugins(trt, logger, paths):
    """Loads plugin libraries and registers all plugins.

    Raises:
        BenchError: a library does not load; the linker's text says why.
    """
    for path in paths:
        try:
            ctypes.CDLL(os.path.abspath(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as e:
            raise BenchError('cannot load the plugin library {}: {}'.format(
                path, e)) from e
    trt.init_libnvinfer_plugins(logger, '')


def cache_path(version, path, options, precision):
    """Returns the file name of the engine for a model.

    The name is a hash of the content of the model (and of ``MODEL.data``,
    where large weights are kept), of the plugins, of all that steers the
    build, and of TensorRT and board, for which alone an engine is made.
    """
    parts = [sha256(path)]
    for extra in [path + '.data'] + options.plugins:
        if os.path.isfile(extra):
            parts.append(sha256(extra))
    parts.append([
        version, precision, options.workspace_mib,
        sorted((k, list(v)) for k, v in options.shapes.items()), options.dla,
        options.calibrates(path) and options.images,
        platform.node(),
        read_text('/proc/device-tree/model')
    ])
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]
    stem = os.path.splitext(os.path.basename(path))[0]
    return os.path.join(options.cache,
                        '{}-{}-{}.engine'.format(stem, precision, key))


def build(trt, logger, path, options, precision):
    """Builds a serialized engine.

    Args:
        trt (module): ``tensorrt``.
        logger: a TensorRT logger.
        path (str): ONNX file.
        options (Options): shapes, images, workspace, DLA, timing cache.
        precision (str): see ``Options.precision_of``.

    Returns:
        bytes-like: the engine.

    Raises:
        BenchError: the file does not parse, or no engine results.
    """
    builder = trt.Builder(logger)
    # From TensorRT 10 on every network has an explicit batch.
    names = ['EXPLICIT_BATCH']
    if options.precision is None and precision != 'fp32':
        names.append('STRONGLY_TYPED')  # the file alone decides
    flags = [getattr(trt.NetworkDefinitionCreationFlag, n, None)
             for n in names]
    network = builder.create_network(
        sum(1 << int(f) for f in flags if f is not None))
    typed = flags[-1] is not None and len(flags) > 1
    parser = trt.OnnxParser(network, logger)
    with open(path, 'rb') as f:
        data = f.read()
    # parse(data) alone would look for external weights in the wrong folder.
    parsed = (
        parser.parse(data, path)
        if os.path.exists(path + '.data') else parser.parse(data))
    if not parsed:
        errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BenchError('TensorRT cannot parse {}: {}'.format(
            path, '; '.join(errors) or 'no reason given'))
    config = builder.create_builder_config()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    shapes = {
        i.name: resolve_shape(i.name, list(i.shape), options.shapes)
        for i in inputs
    }
    profile = _configure(trt, builder, config, options, inputs, shapes)
    calibrator = None  # TensorRT keeps no reference to it while it builds
    if not typed:
        _set_precision(trt, config, options, precision)
        if options.calibrates(path):
            calibrator = _calibrator(trt, inputs, shapes, options)
            config.int8_calibrator = calibrator
            if profile is not None:
                config.set_calibration_profile(profile)
    if hasattr(builder, 'build_serialized_network'):
        engine = builder.build_serialized_network(network, config)
    else:
        engine = builder.build_engine(network, config)
        engine = engine and engine.serialize()
    if calibrator:
        calibrator.free()
    if engine is None:
        raise BenchError('TensorRT could not build an engine from {}; its '
                         'messages above say why'.format(path))
    if options.timing_cache:
        cache = config.get_timing_cache().serialize()
        write_bytes(options.timing_cache, bytes(cache))
    return engine


def _configure(trt, builder, config, options, inputs, shapes):
    """Sets memory, shapes, DLA and cache; returns the profile, or None."""
    size = options.workspace_mib << 20
    if hasattr(config, 'set_memory_pool_limit'):
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    else:
        config.max_workspace_size = size
    if options.dla is not None:
        if options.dla >= builder.num_DLA_cores:
            raise BenchError('--dla {}: this board has {} DLA core(s)'.format(
                options.dla, builder.num_DLA_cores))
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if options.timing_cache:
        _use_timing_cache(trt, config, options.timing_cache)
    profile = None
    if any(-1 in tuple(i.shape) for i in inputs):
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        config.add_optimization_profile(profile)
    return profile


def _use_timing_cache(trt, config, path):
    if not hasattr(config, 'create_timing_cache'):
        raise BenchError('--timing-cache: TensorRT {} has none, 8.0 was the '
                         'first: leave it out'.format(trt.__version__))
    data = b''
    if os.path.exists(path):
        with open(path, 'rb') as f:
            data = f.read()
    cache = config.create_timing_cache(data)
    # Timings of another board or version are refused, not used.
    if cache is None or not config.set_timing_cache(cache, False):
        raise BenchError('--timing-cache {}: not of this board and TensorRT '
                         '{}: delete it'.format(path, trt.__version__))


def _set_precision(trt, config, options, precision):
    """Lets a weakly typed network use a precision."""
    if precision == 'fp32':
        return
    names = dict(fp16=['FP16'], bf16=['BF16'], int8=['FP16', 'INT8'])
    # fp16 beside int8, too: for layers that int8 does not suit.
    for name in names.get(precision, [precision.upper()]):
        flag = getattr(trt.BuilderFlag, name, None)
        if flag is not None:
            config.set_flag(flag)
        elif options.precision is not None:
            raise BenchError(
                'TensorRT {} takes the precision from the file: '
                'export the model in {} and leave out --precision'.format(
                    trt.__version__, precision))


def profiler(trt):
    """Returns a profiler that adds up the time of each layer."""

    class Sums(trt.IProfiler):
        """Called by TensorRT after each layer."""

        def __init__(self):
            trt.IProfiler.__init__(self)
            self._sums = {}

        def report_layer_time(self, layer_name, ms):
            self._sums[layer_name] = self._sums.get(layer_name, 0) + ms

        def milliseconds(self, count):
            return [
                dict(name=k, ms=v / count) for k, v in self._sums.items()
            ]

    return Sums()


def _calibrator(trt, inputs, shapes, options):
    """One batch gives the value ranges: enough for timing, not accuracy."""
    from .cudart import Cuda
    cuda = Cuda()
    arrays = {
        i.name: make_input(i.name, shapes[i.name],
                           np.dtype(trt.nptype(i.dtype)), options.images)
        for i in inputs
    }

    class OneBatch(trt.IInt8EntropyCalibrator2):
        """Hands over one batch of images, or of random numbers."""

        def __init__(self):
            trt.IInt8EntropyCalibrator2.__init__(self)
            self._pointers = {}

        def get_batch_size(self):
            return list(shapes.values())[0][0]

        def get_batch(self, names):
            if self._pointers:
                return None
            stream = cuda.stream()
            for name in names:
                data = arrays[name]
                self._pointers[name] = cuda.malloc(data.nbytes)
                cuda.to_device(self._pointers[name], data.ctypes.data,
                               data.nbytes, stream)
            cuda.synchronize(stream)
            cuda.destroy_stream(stream)
            return [self._pointers[n] for n in names]

        def free(self):
            for pointer in self._pointers.values():
                cuda.free(pointer)

        def read_calibration_cache(self):
            return None

        def write_calibration_cache(self, cache):
            pass

    return OneBatch()
