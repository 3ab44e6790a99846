# Copyright (c) mmbasis authors. All rights reserved.
"""NVIDIA's own parser and builder, without a GPU: TensorRT for RTX.

It is TensorRT for desktop cards, with the API of TensorRT 10 and the same
family of ONNX parsers. It builds for a compute capability without the card;
what it has built cannot run or be inspected here, but its log lists the
kernels. It is strongly typed: precision comes from the graph.
"""
import json
import os
import os.path as osp
import re
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, Dict, Iterable, Mapping, Optional, Sequence, Tuple

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
#: … and what it says of others: fp32 for compute capability 7.5, scatters for
#: which TensorRT has a plugin
_OWN_WORDS = re.compile(
    r'for Turing \(SM75\): FP32|reduction type \(importScatterElements\)')
CAPABILITIES = '7.5', '8.0', '8.6', '8.9', '12.0', '12.1'
#: smallest, usual and largest sizes of a dynamic input for which none are
#: given: of its first axis, and of each other
SIZES = (1, 64), (2, 224), (4, 448)
_LIBRARIES = 'onnxruntime_ep_nv_tensorrt_rtx', 'tensorrt_rtx_bindings'

Shapes = Mapping[str, Sequence[Sequence[int]]]


def builder_at_hand() -> bool:
    """Whether the extra ``trt-check`` is installed."""
    return all(map(find_spec, _LIBRARIES))


def check_capability(name: str) -> str:
    """The builder's own name of a compute capability, such as ``'8.6'``.

    Raises:
        ModuleNotFoundError: Without the extra ``trt-check``.
        ValueError: If it does not build for it.
    """
    if not builder_at_hand():
        raise ModuleNotFoundError(
            'building engines needs TensorRT for RTX, which runs without a '
            "GPU: pip install 'mmbasis[trt-check]' (Linux, x86-64; NVIDIA's "
            'licence)')
    if name not in CAPABILITIES:
        raise ValueError(
            f'compute capability {name!r}: TensorRT for RTX builds for '
            f'{", ".join(CAPABILITIES)} (not for Xavier, Orin and Thor)')
    return f'SM{name.replace(".", "")}'


def build_engine(path: str, compute_capability: str = '8.6',
                 shapes: Optional[Shapes] = None,
                 seconds: float = 600.) -> Engine:
    """Parse an ONNX file and build it, in a process of its own.

    Args:
        path (str): ONNX file; its precision is that of the engine.
        compute_capability (str): Of the card to build for. Defaults to 8.6.
        shapes (Mapping[str, Sequence] | None): By names of dynamic inputs the
            smallest, usual and largest shape; ``SIZES`` where none is given.
        seconds (float): After this time the builder is stopped, which counts
            as refused, as does a crash. Defaults to ten minutes.

    Returns:
        Engine: With its kernels, or with what was refused.

    Raises:
        ModuleNotFoundError: Without the extra ``trt-check``.
        FileNotFoundError: Without the file.
        ValueError: For a compute capability or a shape that cannot be.
    """
    target = check_capability(compute_capability)
    if not osp.isfile(path):
        raise FileNotFoundError(f'{path}: no such ONNX file to build')
    answer = _ask(
        dict(path=osp.abspath(path), target=target, shapes=dict(shapes or {}),
             sizes=SIZES), seconds)
    if 'wrong_shape' in answer:
        raise ValueError('input {} has the shape {} (-1: dynamic), to which '
                         '{} does not fit'.format(*answer['wrong_shape']))
    refusals: Tuple[Refusal, ...] = ()
    if 'parser' in answer:
        refusals = tuple(
            Refusal(node, operator, message, _is_own(operator, message))
            for node, operator, message in answer['parser'])
    elif 'builder' in answer:
        refusals = _build_errors(path, answer['builder'])
    return Engine(compute_capability, refusals,
                  read_kernels(answer.get('log', '')), answer.get('size', 0),
                  answer.get('version', ''))


def _ask(request: Dict[str, Any], seconds: float) -> Dict[str, Any]:
    """The answer of ``rtx_process.py``."""
    script = osp.join(osp.dirname(__file__), 'rtx_process.py')
    try:
        done = subprocess.run([sys.executable, script],
                              input=json.dumps(request),
                              capture_output=True,
                              text=True,
                              timeout=seconds)
    except subprocess.TimeoutExpired:
        return dict(builder=[f'the builder did not end in {seconds:g} s'])
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return dict(builder=[
            f'the builder crashed, exit status {done.returncode}: '
            f'{"".join(last)}'
        ])
    return json.loads(done.stdout)


def _is_own(operator: str, message: str) -> bool:
    """Whether TensorRT takes what this builder refuses."""
    return operator in OWN_LIMITS | PLUGINS or bool(
        _OWN_WORDS.search(message))


def _build_errors(path: str, messages: Iterable[str]) -> Tuple[Refusal, ...]:
    """What the builder says, and of which node. It calls the layers of a node
    ``name`` and ``name_0``, and those of one without a name by its output."""
    import onnx
    graph = onnx.load(path, load_external_data=False).graph
    nodes = {x.name or f'node_of_{x.output[0]}': x for x in graph.node}
    found = []
    for message in dict.fromkeys(messages):
        words = re.split(r'[\s{}()\[\]\'"]+', message)
        words += [re.sub(r'_\d+$', '', x) for x in words]
        named = set(words) & set(nodes)
        # a message may name the first and the last of many
        name = named.pop() if len(named) == 1 else ''
        operator = nodes[name].op_type if name else ''
        found.append(
            Refusal(name, operator, message, _is_own(operator, message)))
    return tuple(found)


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
