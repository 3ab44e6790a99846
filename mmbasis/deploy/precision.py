# Copyright (c) mmbasis authors. All rights reserved.
"""Graphs of lower precision beside an exported one, and what they cost."""
import os.path as osp
import tempfile
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from ..compression import read_checkpoint
from ..models.int8 import InputScales
from .agreement import chosen_tensors, judge
from .compare import evaluate_onnx
from .export import Deployment, calibration_images, suppresses
from .graphs import keep_outputs, read_taps
from .half import write_half
from .int8 import quantize_onnx
from .runs import open_onnx

#: modules that are plugins of MMDeploy in a graph, by class
_PLUGINS = ('DeformConv2d', 'ModulatedDeformConv2d',
            'MultiScaleDeformableAttention')


def path_of(path: str, precision: str) -> str:
    """Where the graph of a precision lies: ``end2end-fp16.onnx``."""
    stem, extension = osp.splitext(path)
    return f'{stem}-{precision}{extension}'


def check_precisions(deployment: Deployment,
                     precisions: Sequence[str]) -> None:
    """Refuse lower precision before the export, where the graph will hold
    plugins: nothing here runs them, or knows the types of what they return.

    Raises:
        ValueError: Naming the first plugin, and what to do instead.
    """
    if not precisions:
        return
    wanted, model = ' and '.join(precisions), deployment.model
    if (deployment.backend == 'tensorrt' and deployment.partition is None
            and deployment.deploy_cfg.codebase_config.type == 'mmdet'
            and suppresses(model)):
        raise ValueError(
            f'{wanted} of a whole graph for TensorRT: non-maximum suppression '
            'is a plugin of MMDeploy in it (TRTBatchedNMS), which only fp32 '
            'can go with here. Take '
            'configs/deploy/detection-before-nms_tensorrt.py, whose graph '
            'ends before it')
    for name, module in model.named_modules():
        kinds = [x.__name__ for x in type(module).__mro__]
        plugin = next((x for x in kinds if x in _PLUGINS), None)
        if plugin is not None:
            raise ValueError(
                f'{wanted} of a graph with plugins: {name} is a {plugin}, '
                'which only fp32 can go with here. Leave out --precision; '
                'TensorRT 8.5 lowers such a graph by trtexec --fp16')


def write_precision(path: str, precision: str, backend: str,
                    images: Sequence[np.ndarray] = (),
                    scales: Optional[InputScales] = None) -> str:
    """Write the graph of a precision beside the fp32 one, for strongly typed
    engines: the graph says what is computed in which type.

    Args:
        path (str): The fp32 ONNX file.
        precision (str): ``'fp16'`` or ``'int8'``.
        backend (str): ``'onnxruntime'`` or ``'tensorrt'``; int8 differs.
        images (Sequence[ndarray]): For the calibration of int8, and for the
            range of values, which fp16 may not hold.
        scales (InputScales, optional): Trained ones for int8.

    Returns:
        str: The file.
    """
    output = path_of(path, precision)
    if precision == 'fp16':
        write_half(path, output, images)
    else:
        open_onnx(path)  # complains of operators that cannot be calibrated
        quantize_onnx(path, output, list(images), backend, scales)
    return output


def compare_precisions(path: str, other: str, images: Sequence[np.ndarray],
                       precision: str = 'fp16') -> Dict[str, Dict[str, Any]]:
    """Compare a graph with the fp32 one, on images: its outputs, and the raw
    outputs of the heads, which both hold unless they were lost on the way.
    ONNX Runtime runs them without its optimizer, which moves roundings. On a
    CPU it computes fp16 in fp32, so values that overflow on the device do not
    show: :func:`write_half` looks for them.

    Returns:
        dict[str, dict]: See :func:`mmbasis.deploy.agreement.judge`; the graph
        agrees if all of them do.

    Raises:
        ValueError: If an output is not finite, or none can be compared.
    """
    import onnx
    models = onnx.load(other), onnx.load(path)
    outputs = [x.name for x in models[1].graph.output]
    made = {y for x in models[0].graph.node for y in x.output}.difference(
        outputs)
    names = {x: x for x in outputs}
    names.update((name, tensor) for name, tensor in read_taps(
        models[1]).items() if tensor in made and ':' in name)
    ours, theirs = (_run(x, names, images) for x in models)
    for name, value, wanted in (
            (k, x[k], y[k]) for x, y in zip(ours, theirs) for k in names):
        known = (np.isfinite(wanted) if value.shape == wanted.shape
                 else slice(None))
        if not np.isfinite(value[known]).all():
            raise ValueError(
                f'{other}: the output {name} is not finite where that of fp32 '
                'is: its values leave the range of the precision; use fp32')
    chosen = chosen_tensors(models[1].graph)
    verdict = judge(ours, theirs, {k for k, v in names.items()
                                   if v in chosen}, precision)
    if not verdict:
        raise ValueError(f'{other}: none of its outputs ({[*names]}) can be '
                         'compared with fp32')
    return verdict


def _run(model: Any, names: Dict[str, str],
         images: Sequence[np.ndarray]) -> List[Dict[str, np.ndarray]]:
    """Tensors of a graph by their names here, for each image."""
    import onnx
    with tempfile.TemporaryDirectory() as folder:
        path = osp.join(folder, 'graph.onnx')
        onnx.save(keep_outputs(model, names.values()), path)
        session = _open_exactly(path)
    source, tensors = session.get_inputs()[0].name, [*{*names.values()}]
    found = []
    for x in images:
        values = dict(zip(tensors, session.run(tensors, {source: x})))
        found.append({k: values[v] for k, v in names.items()})
    return found


def _open_exactly(path: str) -> Any:
    """A session that computes in the types of the graph."""
    import onnxruntime
    from mmdeploy.backend.onnxruntime.init_plugins import get_ops_path
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL)
    if osp.isfile(get_ops_path()):
        options.register_custom_ops_library(get_ops_path())
    return onnxruntime.InferenceSession(
        path, options, providers=['CPUExecutionProvider'])


def add_precisions(deployment: Deployment, files: Sequence[str],
                   precisions: Sequence[str], images: Sequence[Any],
                   work_dir: str, num_calibration: int = 64,
                   evaluate: bool = False) -> Dict[str, Dict[str, Any]]:
    """Write, compare and evaluate graphs of lower precision.

    Of a two-stage detector that is cut in two, int8 and the comparison are
    of the first graph: the second one takes no images.

    Args:
        deployment (Deployment): What was exported.
        files (Sequence[str]): The fp32 graphs.
        precisions (Sequence[str]): Some of ``PRECISIONS``.
        images (Sequence): To compare on, as for :func:`compare`.
        work_dir (str): Gets the log of the evaluation.
        num_calibration (int): Training images for int8. Defaults to 64.
        evaluate (bool): Run MMDeploy's evaluator. Defaults to False.

    Returns:
        dict[str, dict]: By precision ``files`` with their sizes in bytes,
        ``comparison`` and whether it ``agrees``, or why there is none
        (``skipped``), ``scales`` of int8 (``'trained'`` or
        ``'calibrated'``) and ``metrics``.
    """
    inputs = [deployment.create_input(x)[1].numpy() for x in images]
    report: Dict[str, Dict[str, Any]] = {}
    for precision in precisions:
        entry = report[precision] = _write(deployment, files, precision,
                                           inputs, num_calibration)
        written = [*entry['files']]
        if 'skipped' not in entry:
            entry['comparison'] = found = compare_precisions(
                files[0], written[0], inputs, precision)
            entry['agrees'] = all(x['agrees'] for x in found.values())
            if evaluate and deployment.partition is None:
                entry['metrics'] = evaluate_onnx(deployment, written, work_dir)
    return report


def _write(deployment: Deployment, files: Sequence[str], precision: str,
           inputs: List[np.ndarray], num_calibration: int) -> Dict[str, Any]:
    """Write the graphs of a precision; what the report says of them."""
    entry: Dict[str, Any] = {}
    scales = None
    if precision == 'int8':
        files = files[:1]
        inputs = calibration_images(deployment, num_calibration)
        scales = InputScales.of(read_checkpoint(deployment.checkpoint))
        entry['scales'] = 'trained' if scales else 'calibrated'
    else:
        try:
            open_onnx(files[0])
        except RuntimeError as error:  # custom operators
            entry['skipped'] = str(error)
            inputs = []
    entry['files'] = {}
    for path in files:
        written = write_precision(path, precision, deployment.backend,
                                  inputs if path == files[0] else (), scales)
        entry['files'][written] = osp.getsize(written)
    return entry
