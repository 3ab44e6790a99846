# Copyright (c) mmbasis authors. All rights reserved.
"""NVIDIA's own parser and builder, without a GPU: TensorRT for RTX.

It is TensorRT for desktop cards, with the API of TensorRT 10 and the same
family of ONNX parsers. It builds for a compute capability without the card;
what it has built cannot run or be inspected here, but its log lists the
kernels. It is strongly typed: precision comes from the graph.
"""
import ctypes
import glob
import os
import os.path as osp
import re
from functools import lru_cache
from importlib.util import find_spec
from typing import (
    Any,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
)

from .. import compression
from ..models import load_compressed, standalone_config
from .engines import Engine, Refusal, read_kernels
from .export import Deployment, merge_layers

#: operators that this builder lacks, and TensorRT has
OWN_LIMITS = frozenset(
    ('NonMaxSuppression', 'RoiAlign', 'NonZero', 'DeformConv'))
#: MMDeploy's plugins for TensorRT (mmdeploy_tensorrt_ops)
PLUGINS = frozenset("""
GatherTopk GridPriorsTRT MMCVDeformConv2d MMCVModulatedDeformConv2d
MMCVMultiLevelRoiAlign MMCVMultiLevelRotatedRoiAlign
MMCVMultiScaleDeformableAttention MMCVRoiAlign ScaledDotProductAttentionTRT
TRTBatchedBEVNMS TRTBatchedNMS TRTBatchedRotatedNMS
TRTBicubicInterpolate TRTDCNv3 TRTInstanceNormalization grid_sampler
""".split())
#: sizes (smallest, usual, largest) of a dynamic input for which none are
#: given: of its first axis, and of the others
BATCH, SIZES = (1, 2, 4), (64, 224, 448)
_LIBRARIES = 'onnxruntime_ep_nv_tensorrt_rtx', 'tensorrt_rtx_bindings'

Shapes = Mapping[str, Sequence[Sequence[int]]]


def builder_at_hand() -> bool:
    """Whether the extra ``trt-check`` is installed."""
    return all(map(find_spec, _LIBRARIES))


@lru_cache(maxsize=None)
def _bindings() -> Tuple[Any, Any, List[Tuple[Any, str]]]:
    """The bindings, their logger and what it has heard. The first logger of a
    process is that of all builders, and must live as long as they."""
    spec = find_spec(_LIBRARIES[0])
    assert spec is not None and spec.submodule_search_locations is not None
    folder = spec.submodule_search_locations[0]
    # so that nobody has to set LD_LIBRARY_PATH
    for name in ('libtensorrt_rtx', 'libtensorrt_onnxparser_rtx'):
        library, = glob.glob(osp.join(folder, f'{name}.so.*.*'))
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    import tensorrt_rtx_bindings as trt
    heard: List[Tuple[Any, str]] = []

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            heard.append((severity, text))

    return trt, Log(), heard


def _load() -> Tuple[Any, Any, List[Tuple[Any, str]]]:
    if not builder_at_hand():
        raise ModuleNotFoundError(
            'building engines needs TensorRT for RTX, which runs without a '
            "GPU: pip install 'mmbasis[trt-check]' (Linux, x86-64; NVIDIA's "
            'licence)')
    return _bindings()


def check_capability(name: str) -> Any:
    """The builder's own value of a compute capability, such as ``'8.6'``.

    Raises:
        ModuleNotFoundError: Without the extra ``trt-check``.
        ValueError: If it does not build for it.
    """
    known = {
        f'{key[2:-1]}.{key[-1]}': value
        for key, value in _load()[0].ComputeCapability.__members__.items()
        if key.startswith('SM')
    }
    if name not in known:
        raise ValueError(
            f'compute capability {name!r}: TensorRT for RTX builds for '
            f'{", ".join(known)} (not for Xavier, Orin and Thor)')
    return known[name]


def build_engine(path: str, compute_capability: str = '8.6',
                 shapes: Shapes = {}) -> Engine:
    """Parse an ONNX file and build it.

    Args:
        path (str): ONNX file; its precision is that of the engine.
        compute_capability (str): Of the card to build for. Defaults to 8.6.
        shapes (Mapping[str, Sequence]): By names of dynamic inputs the
            smallest, usual and largest shape. Inputs that it leaves out get
            ``BATCH`` and ``SIZES``.

    Returns:
        Engine: With its kernels, or with what was refused.

    Raises:
        ModuleNotFoundError: Without the extra ``trt-check``.
        FileNotFoundError: Without the file.
        ValueError: If the builder does not know the compute capability, or a
            shape is not one of the input.
    """
    trt, log, heard = _load()
    target = check_capability(compute_capability)
    if not osp.isfile(path):
        raise FileNotFoundError(f'{path}: no such ONNX file to build')
    heard.clear()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(osp.abspath(path)):
        errors = map(parser.get_error, range(parser.num_errors))
        return Engine(compute_capability, tuple(map(_refusal, errors)))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(target, 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _add_profile(builder, network, config, shapes)
    engine = builder.build_serialized_network(network, config)
    text = '\n'.join(line for _, line in heard)
    if engine is None:
        errors = (line for severity, line in heard
                  if severity <= trt.ILogger.ERROR)
        return Engine(compute_capability, _build_errors(path, errors))
    return Engine(compute_capability, (), read_kernels(text), engine.nbytes)


def _refusal(error: Any) -> Refusal:
    """What the parser says of a node."""
    operator = error.node_operator()
    message = f'{error.code().name}: {error.desc()} ({error.func()})'
    return Refusal(error.node_name(), operator, message,
                   operator in OWN_LIMITS | PLUGINS)


def _build_errors(path: str, messages: Iterable[str]) -> Tuple[Refusal, ...]:
    """What the builder says, and of which node. It calls the layers of a node
    ``name`` and ``name_0``, and those of one without a name by its output."""
    import onnx
    graph = onnx.load(path, load_external_data=False).graph
    nodes = {x.name or f'node_of_{x.output[0]}': x for x in graph.node}
    found = []
    for message in dict.fromkeys(messages):
        words = re.split(r'[\s{}()\[\]]+', message)
        words += [re.sub(r'_\d+$', '', x) for x in words]
        named = set(words) & set(nodes)
        # a message may name the first and the last of many
        name = named.pop() if len(named) == 1 else ''
        operator = nodes[name].op_type if name else ''
        found.append(Refusal(name, operator, message, operator in OWN_LIMITS))
    return tuple(found)


def _add_profile(builder: Any, network: Any, config: Any,
                 shapes: Shapes) -> None:
    """Set the sizes of dynamic inputs."""
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    dynamic = [x for x in inputs if -1 in tuple(x.shape)]
    for tensor in dynamic:
        shape = tuple(tensor.shape)
        given = shapes.get(tensor.name) or [[
            size if size != -1 else (sizes if axis else batch)
            for axis, size in enumerate(shape)
        ] for batch, sizes in zip(BATCH, SIZES)]
        if any(len(x) != len(shape) or any(
                a not in (-1, b) for a, b in zip(shape, x)) for x in given):
            raise ValueError(
                f'the input {tensor.name} has the shape {shape} (-1: '
                f'dynamic); the sizes to build for are {list(given)}')
        profile.set_shape(tensor.name, *map(tuple, given))
    if dynamic:
        config.add_optimization_profile(profile)


def _build_all(deployment: Deployment, files: Sequence[str],
                  compute_capability: str) -> Dict[str, Dict[str, Any]]:
    """Build the files that a deployment exported, dynamic inputs with the
    sizes of its config; the summary of each engine, by path."""
    given = deployment.deploy_cfg.backend_config.get('model_inputs')
    report = {}
    for index, path in enumerate(files):
        shapes = {
            name: [x[f'{which}_shape'] for which in ('min', 'opt', 'max')]
            for name, x in (given[index].input_shapes if given else {}).items()
        }
        report[path] = build_engine(path, compute_capability, shapes).summary()
    return report


def _dense_twin(deployment: Deployment, work_dir: str) -> Optional[Deployment]:
    """The deployment of a compressed model with all layers merged to dense,
    whose weights go into a folder; None where the model is dense."""
    content = compression.read_checkpoint(deployment.checkpoint)
    plan = compression.plan_of(content)
    if plan is None or not plan.layers:
        return None
    model = load_compressed(deployment.model_cfg, deployment.checkpoint)
    plan = merge_layers(model, list(plan.layers), 'merged: the dense engine')
    os.makedirs(work_dir, exist_ok=True)
    path = osp.abspath(osp.join(work_dir, 'merged.pth'))
    compression.save_checkpoint(model, plan, path, content.get('meta', {}))
    cfg = standalone_config(deployment.model_cfg, plan, path)
    return Deployment(deployment.deploy_cfg, cfg, path)


def compare_engines(deployment: Deployment, files: Sequence[str], image: Any,
                    work_dir: str, compute_capability: str
                    ) -> Dict[str, Dict[str, Dict[str, Any]]]:
    """Build exported files, and those of the dense model to compare with.

    Args:
        deployment (Deployment): Has exported the files.
        files (Sequence[str]): Their paths.
        image (str | ndarray): Traces the dense model.
        work_dir (str): Its subfolder ``dense`` gets the dense files, which are
            those of the compressed model with all layers merged to dense.
        compute_capability (str): See :func:`build_engine`.

    Returns:
        dict: ``files`` and, for a compressed model, ``dense``: by path the
        summary of the engine.
    """
    report = dict(files=_build_all(deployment, files, compute_capability))
    folder = osp.join(work_dir, 'dense')
    twin = _dense_twin(deployment, folder)
    if twin is not None:
        report['dense'] = _build_all(twin, twin.export(image, folder),
                                     compute_capability)
    return report
