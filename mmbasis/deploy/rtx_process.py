# Copyright (c) mmbasis authors. All rights reserved.
"""Build an ONNX file with TensorRT for RTX, in a process of its own: the
builder may run without end, crash or leak. Started by ``rtx.py`` as a script,
so it imports nothing but the builder. Reads a request from standard input and
writes the answer to standard output, both JSON.
"""
import ctypes
import glob
import json
import os.path as osp
import sys
from importlib.util import find_spec
from typing import Any, Dict, List, Tuple


def load_bindings() -> Any:
    """The bindings, after the libraries that they need; so nobody has to set
    ``LD_LIBRARY_PATH``."""
    spec = find_spec('onnxruntime_ep_nv_tensorrt_rtx')
    assert spec is not None and spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    for name in ('libtensorrt_rtx', 'libtensorrt_onnxparser_rtx'):
        library, = glob.glob(osp.join(folder, f'{name}.so.*.*'))
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings
    return tensorrt_rtx_bindings


def build(trt: Any, request: Dict[str, Any]) -> Dict[str, Any]:
    """What the parser or the builder refuses, or the engine's size and what
    was logged."""
    heard: List[Tuple[Any, str]] = []

    class Log(trt.ILogger):

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            heard.append((severity, text))

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request['path']):
        errors = map(parser.get_error, range(parser.num_errors))
        return dict(parser=[[
            x.node_name(),
            x.node_operator(), f'{x.code().name}: {x.desc()} ({x.func()})'
        ] for x in errors] or [['', '', 'the file cannot be parsed']])
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(
        getattr(trt.ComputeCapability, request['target']), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    wrong = add_profile(builder, network, config, request)
    if wrong:
        return dict(wrong_shape=wrong)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        return dict(builder=[
            text for severity, text in heard
            if severity <= trt.ILogger.ERROR
        ])
    return dict(size=engine.nbytes, log='\n'.join(text for _, text in heard))


def add_profile(builder: Any, network: Any, config: Any,
                request: Dict[str, Any]) -> List[Any]:
    """Set the sizes of dynamic inputs; one to which those given do not fit."""
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [x for x in inputs if -1 in tuple(x.shape)]
    for tensor in dynamic:
        shape = list(tensor.shape)
        given = request['shapes'].get(tensor.name) or [[
            size if size != -1 else sizes[axis > 0]
            for axis, size in enumerate(shape)
        ] for sizes in request['sizes']]
        for sizes in given:
            if len(sizes) != len(shape) or any(
                    a not in (-1, b) for a, b in zip(shape, sizes)):
                return [tensor.name, shape, sizes]
        profile.set_shape(tensor.name, *map(tuple, given))
    if dynamic:
        config.add_optimization_profile(profile)
    return []


def main() -> None:
    """Answer one request."""
    trt = load_bindings()
    answer = dict(build(trt, json.load(sys.stdin)), version=trt.__version__)
    json.dump(answer, sys.stdout)


if __name__ == '__main__':
    main()
