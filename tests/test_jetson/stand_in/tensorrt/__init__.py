# Copyright (c) mmbasis authors. All rights reserved.
"""Stands in for TensorRT: as strict as the real one about its interface.

``FAKE_TRT`` chooses the generation: 7, 8.0, 8.6 (both interfaces) or 10. What
a generation does not have raises AttributeError. An inference takes
``FAKE_LATENCY_S`` per node of the graph and writes the mean of the inputs into
every output. ``FAKE_DIE`` = ``error:N`` or ``kill:N`` ends the N-th one badly.
"""
import ctypes
import json
import os
import signal

import numpy as np

_GENERATION = os.environ.get('FAKE_TRT', '8.6')
_NAMED = _GENERATION in ('8.6', '10')
_NUMBERED = _GENERATION != '10'
__version__ = {
    '7': '7.1.3',
    '8.0': '8.0.1',
    '8.6': '8.6.1',
    '10': '10.3.0'
}[_GENERATION]
_cuda = ctypes.CDLL('libcudart.so')
_cuda.fake_size.argtypes = [ctypes.c_void_p]
_cuda.fake_size.restype = ctypes.c_long
_cuda.fake_written.argtypes = [ctypes.c_void_p]
_cuda.fake_computed.argtypes = [ctypes.c_void_p]
_cuda.fake_busy.argtypes = [ctypes.c_void_p, ctypes.c_double]
_cuda.fake_stream.argtypes = [ctypes.c_void_p]
_Call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_cuda.fake_record.argtypes = [ctypes.c_void_p, _Call]
calls = []
built = []  # what each engine was built with
plugins_ready = []


class Logger:
    WARNING = 2

    def __init__(self, level):
        self.level = level


def init_libnvinfer_plugins(logger, namespace):
    assert isinstance(logger, Logger) and namespace == ''
    plugins_ready.append(True)
    return True


def nptype(dtype):
    return {'FLOAT': np.float32}[dtype]


class NetworkDefinitionCreationFlag:
    EXPLICIT_BATCH = 0


if _GENERATION == '10':
    del NetworkDefinitionCreationFlag.EXPLICIT_BATCH
    NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1


class DeviceType:
    GPU, DLA = 'gpu', 'dla'


class IProfiler:
    pass


class BuilderFlag:
    FP16, INT8, GPU_FALLBACK = 'FP16', 'INT8', 'GPU_FALLBACK'


class LayerType:
    CONVOLUTION = 0


class TensorIOMode:
    INPUT, OUTPUT = 'in', 'out'


if _GENERATION in ('8.6', '10'):

    class MemoryPoolType:
        WORKSPACE = 'workspace'


class IInt8EntropyCalibrator2:
    pass


class _Tensor:

    def __init__(self, value):
        self.name = value.name
        self.shape = tuple(d.dim_value or -1
                           for d in value.type.tensor_type.shape.dim)
        self.dtype = 'FLOAT'


class _Network:

    def __init__(self):
        self.graph = None

    @property
    def num_inputs(self):
        return len(self.graph.input)

    def get_input(self, i):
        return _Tensor(self.graph.input[i])

    @property
    def num_layers(self):
        return len(self.graph.node)


class OnnxParser:

    def __init__(self, network, logger):
        self._network, self.num_errors = network, 0

    def parse(self, data):
        import onnx
        try:
            self._network.graph = onnx.load_from_string(data).graph
        except Exception:
            self.num_errors = 1
            return False
        return True

    def get_error(self, i):
        return 'In node 0: not ONNX'


class _Config:
    __slots__ = [
        'flags', 'profiles', 'int8_calibrator', 'workspace', 'cache',
        'default_device_type', 'DLA_core'
    ] + ([] if _GENERATION == '10' else ['max_workspace_size'])

    def __init__(self):
        self.flags, self.profiles = [], []
        self.int8_calibrator = self.workspace = self.cache = None
        self.default_device_type, self.DLA_core = DeviceType.GPU, None

    def set_flag(self, flag):
        self.flags.append(flag)

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)

    def set_calibration_profile(self, profile):
        assert profile in self.profiles
        self.flags.append('calibration profile')


if _GENERATION in ('8.6', '10'):

    def _limit(self, pool, size):
        assert pool == MemoryPoolType.WORKSPACE
        self.workspace = size

    _Config.set_memory_pool_limit = _limit


class _Cache:

    def __init__(self, data):
        self.data = data

    def serialize(self):
        return self.data


if _GENERATION != '7':

    def _create(self, data):
        calls.append('cache of {} bytes'.format(len(data)))
        return _Cache(data)

    def _set_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        self.cache = cache
        return cache.data in (b'', __version__.encode())

    _Config.create_timing_cache = _create
    _Config.set_timing_cache = _set_cache
    _Config.get_timing_cache = lambda self: self.cache


class _Profile(dict):

    def set_shape(self, name, low, best, high):
        self[name] = best


class Builder:

    def __init__(self, logger):
        assert plugins_ready, 'plugins must be registered first'

    num_DLA_cores = 2

    def create_network(self, flags):
        assert flags in ((0, 2) if _GENERATION == '10' else (1, ))
        network = _Network()
        network.strong = flags == 2
        return network

    def create_builder_config(self):
        return _Config()

    def create_optimization_profile(self):
        return _Profile()


def _serialize(network, config):
    if config.workspace is None:
        assert config.max_workspace_size > 1 << 20
    dynamic = any(-1 in _Tensor(i).shape for i in network.graph.input)
    if network.strong:
        assert not {'FP16', 'INT8'} & set(config.flags), 'typed by the file'
    if config.DLA_core is not None:
        assert config.default_device_type == DeviceType.DLA
        assert {'FP16', 'GPU_FALLBACK'} <= set(config.flags)
    if config.cache:
        config.cache.data = __version__.encode()
    quantized = any(n.op_type == 'QuantizeLinear' for n in network.graph.node)
    if 'INT8' in config.flags and not quantized:
        assert not dynamic or 'calibration profile' in config.flags
        calibrator = config.int8_calibrator
        names = [i.name for i in network.graph.input]
        assert calibrator.get_batch(names) is not None
        assert calibrator.get_batch(names) is None
    tensors = [
        dict(name=t.name, shape=_Tensor(t).shape, input=is_input)
        for group, is_input in ((network.graph.input, True),
                                (network.graph.output, False)) for t in group
    ]
    if any(-1 in t['shape'] for t in tensors if t['input']):
        assert config.profiles, 'open sizes need a profile'
    calls.append('build')
    return json.dumps(
        dict(
            tensors=tensors,
            nodes=len(network.graph.node),
            dla=config.DLA_core,
            flags=sorted(config.flags) + ['strong'] * network.strong,
            version=__version__)).encode()


if _GENERATION == '7':

    def _build(self, network, config):
        return _Engine(_serialize(network, config))

    Builder.build_engine = _build
else:
    Builder.build_serialized_network = \
        lambda self, network, config: _serialize(network, config)


class Runtime:

    DLA_core = None

    def __init__(self, logger):
        pass

    def deserialize_cuda_engine(self, data):
        try:
            good = json.loads(data)['version'] == __version__
            assert not good or json.loads(data)['dla'] == self.DLA_core
        except ValueError:
            good = False
        return _Engine(data) if good else None


class _Engine:

    def __init__(self, data):
        self._data = data
        self._tensors = json.loads(data)['tensors']
        self._nodes = json.loads(data)['nodes']
        built.append(json.loads(data))

    def serialize(self):
        return self._data

    def create_execution_context(self):
        return _Context(self)


class _Context:

    def __init__(self, engine):
        self._engine, self._batch = engine, None
        self._addresses, self._count, self._calls = {}, 0, []
        self.profiler = None

    def _shape(self, tensor):
        return tuple(self._batch if d == -1 and self._batch else d
                     for d in tensor['shape'])

    def _set(self, tensor, shape):
        assert tensor['input'] and len(shape) == len(tensor['shape'])
        self._batch = shape[0]
        return True

    def execute_v2(self, addresses):
        assert all(isinstance(a, int) for a in addresses)
        for i in range(self._engine._nodes):
            self.profiler.report_layer_time('node %d' % i, 1.5 + i)
        return True

    def _put(self, addresses, stream):
        """Executes, or records that in a stream that is captured."""
        assert isinstance(stream, int) and _cuda.fake_stream(stream)
        addresses = list(addresses)
        call = _Call(lambda s: self._execute(addresses, s))
        if _cuda.fake_record(stream, call):
            assert self._count, 'the first run must not be captured'
            self._calls.append(call)
            calls.append('captured')
            return True
        return self._execute(addresses, stream)

    def _execute(self, addresses, stream):
        self._count += 1
        _cuda.fake_busy(
            stream, self._engine._nodes *
            float(os.environ.get('FAKE_LATENCY_S', '0.005')))
        how, _, number = os.environ.get('FAKE_DIE', '').partition(':')
        if number and self._count == int(number):
            if how == 'kill':
                os.kill(os.getpid(), signal.SIGKILL)
            return False
        total, outputs = [], []
        for tensor, address in zip(self._engine._tensors, addresses):
            size = 4 * int(np.prod(self._shape(tensor)))
            assert _cuda.fake_size(address) == size, 'wrong buffer'
            raw = (ctypes.c_float * (size // 4)).from_address(address)
            if tensor['input']:
                assert _cuda.fake_written(address), 'input was not copied'
                total.append(np.frombuffer(raw, np.float32).mean())
            else:
                outputs.append((address, np.frombuffer(raw, np.float32)))
        for address, array in outputs:
            array[:] = np.mean(total)
            _cuda.fake_computed(address)
        return True


def _tensor(engine, name):
    return [t for t in engine._tensors if t['name'] == name][0]


if _NAMED:
    _Engine.num_io_tensors = property(lambda e: len(e._tensors))
    _Engine.get_tensor_name = lambda e, i: e._tensors[i]['name']
    _Engine.get_tensor_mode = lambda e, n: \
        TensorIOMode.INPUT if _tensor(e, n)['input'] else TensorIOMode.OUTPUT
    _Engine.get_tensor_shape = lambda e, n: tuple(_tensor(e, n)['shape'])
    _Engine.get_tensor_dtype = lambda e, n: 'FLOAT'
    _Context.set_input_shape = lambda c, n, s: c._set(_tensor(c._engine, n), s)
    _Context.get_tensor_shape = lambda c, n: c._shape(_tensor(c._engine, n))
    _Context.set_tensor_address = lambda c, n, a: \
        c._addresses.__setitem__(n, a)

    def _v3(self, stream):
        calls.append('v3')
        return self._put(
            [self._addresses[t['name']] for t in self._engine._tensors],
            stream)

    _Context.execute_async_v3 = _v3

if _NUMBERED:
    _Engine.num_bindings = property(lambda e: len(e._tensors))
    _Engine.get_binding_name = lambda e, i: e._tensors[i]['name']
    _Engine.binding_is_input = lambda e, i: e._tensors[i]['input']
    _Engine.get_binding_shape = lambda e, i: tuple(e._tensors[i]['shape'])
    _Engine.get_binding_dtype = lambda e, i: 'FLOAT'
    _Context.set_binding_shape = lambda c, i, s: c._set(
        c._engine._tensors[i], s)
    _Context.get_binding_shape = lambda c, i: c._shape(c._engine._tensors[i])

    def _v2(self, bindings, stream_handle):
        calls.append('v2')
        return self._put(bindings, stream_handle)

    _Context.execute_async_v2 = _v2
