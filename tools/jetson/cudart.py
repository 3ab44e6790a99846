# Copyright (c) mmbasis authors. All rights reserved.
"""CUDA memory and streams through ctypes: no PyCUDA is needed on the board.

Signatures: CUDA Runtime API reference, the same from CUDA 10 to 12.
"""
import ctypes
import glob

from .util import BenchError

_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_CAPTURE_RELAXED = 2


def find_library():
    """Returns the name or path of libcudart, or None."""
    names = ['libcudart.so']
    names += ['libcudart.so.' + v for v in ('12', '11.0', '10.2', '13')]
    names += sorted(glob.glob('/usr/local/cuda*/lib64/libcudart.so*'))
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


class Cuda:
    """The few calls that an inference needs.

    Raises:
        BenchError: there is no library; or any call fails, with its text.
    """

    def __init__(self):
        name = find_library()
        if name is None:
            raise BenchError('libcudart is not found: set LD_LIBRARY_PATH to '
                             'the lib64 folder of CUDA')
        self._lib = ctypes.CDLL(name)
        self._lib.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name, *args):
        status = getattr(self._lib, name)(*args)
        if status != 0:
            raise BenchError('{} failed: {}'.format(
                name,
                self._lib.cudaGetErrorString(status).decode()))

    def version(self):
        """Returns the runtime's version, such as ``'10.2'``."""
        value = ctypes.c_int()
        self._call('cudaRuntimeGetVersion', ctypes.byref(value))
        return '{}.{}'.format(value.value // 1000, value.value % 1000 // 10)

    def malloc(self, size):
        """Returns the address of ``size`` bytes on the device."""
        pointer = ctypes.c_void_p()
        self._call('cudaMalloc', ctypes.byref(pointer), ctypes.c_size_t(size))
        return pointer.value

    def free(self, pointer):
        """Frees device memory."""
        self._call('cudaFree', ctypes.c_void_p(pointer))

    def malloc_host(self, size):
        """Returns the address of pinned host memory, fast to copy from."""
        pointer = ctypes.c_void_p()
        self._call('cudaMallocHost', ctypes.byref(pointer),
                   ctypes.c_size_t(size))
        return pointer.value

    def free_host(self, pointer):
        """Frees pinned host memory."""
        self._call('cudaFreeHost', ctypes.c_void_p(pointer))

    def stream(self):
        """Returns a new stream."""
        stream = ctypes.c_void_p()
        self._call('cudaStreamCreate', ctypes.byref(stream))
        return stream.value

    def destroy_stream(self, stream):
        """Destroys a stream."""
        self._call('cudaStreamDestroy', ctypes.c_void_p(stream))

    def synchronize(self, stream):
        """Waits until all work of a stream is done."""
        self._call('cudaStreamSynchronize', ctypes.c_void_p(stream))

    def capture(self, stream, work):
        """Records what a call puts into a stream, instead of doing it.

        Args:
            stream (int): of :meth:`stream`; nothing else may use it.
            work (callable): puts work into the stream.

        Returns:
            tuple[int, int]: for :meth:`launch` and :meth:`destroy_graph`.
        """
        graph, ready = ctypes.c_void_p(), ctypes.c_void_p()
        self._call('cudaStreamBeginCapture', ctypes.c_void_p(stream),
                   ctypes.c_int(_CAPTURE_RELAXED))
        try:
            work()
        finally:
            self._call('cudaStreamEndCapture', ctypes.c_void_p(stream),
                       ctypes.byref(graph))
        if hasattr(self._lib, 'cudaGraphInstantiateWithFlags'):  # CUDA 11.4
            self._call('cudaGraphInstantiateWithFlags', ctypes.byref(ready),
                       graph, ctypes.c_ulonglong(0))
        else:
            self._call('cudaGraphInstantiate', ctypes.byref(ready), graph,
                       None, None, ctypes.c_size_t(0))
        return graph.value, ready.value

    def launch(self, graph, stream):
        """Starts what was recorded."""
        self._call('cudaGraphLaunch', ctypes.c_void_p(graph[1]),
                   ctypes.c_void_p(stream))

    def destroy_graph(self, graph):
        """Frees a recording."""
        self._call('cudaGraphExecDestroy', ctypes.c_void_p(graph[1]))
        self._call('cudaGraphDestroy', ctypes.c_void_p(graph[0]))

    def to_device(self, device, host, size, stream):
        """Starts copying ``size`` bytes from host to device."""
        self._copy(device, host, size, _HOST_TO_DEVICE, stream)

    def to_host(self, host, device, size, stream):
        """Starts copying ``size`` bytes from device to host."""
        self._copy(host, device, size, _DEVICE_TO_HOST, stream)

    def _copy(self, to, origin, size, kind, stream):
        self._call('cudaMemcpyAsync', ctypes.c_void_p(to),
                   ctypes.c_void_p(origin), ctypes.c_size_t(size),
                   ctypes.c_int(kind), ctypes.c_void_p(stream))
