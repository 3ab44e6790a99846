# Copyright (c) mmbasis authors. All rights reserved.
"""Graphs of lower precision beside an exported one, and what they cost."""
import os.path as osp
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from ..compression import read_checkpoint
from ..models.int8 import InputScales
from .compare import evaluate_onnx
from .export import Deployment, calibration_images
from .half import write_half
from .int8 import quantize_onnx
from .runs import open_onnx

PRECISIONS = 'fp16', 'int8'


def path_of(path: str, precision: str) -> str:
    """Where the graph of a precision lies: ``end2end-fp16.onnx``."""
    stem, extension = osp.splitext(path)
    return f'{stem}-{precision}{extension}'


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


def compare_precisions(path: str, other: str,
                       images: Sequence[np.ndarray]) -> Dict[str, Any]:
    """Differences of a graph from the fp32 one, on images. ONNX Runtime runs
    them without its optimizer, which moves roundings. On a CPU it computes
    fp16 in fp32, so values that overflow on the device do not show:
    :func:`write_half` looks for them.

    Returns:
        dict: For each output the ``largest`` difference and the ``relative``
        one, ``|a - b| / |b|`` in the Euclidean norm.

    Raises:
        ValueError: If an output is not finite.
    """
    outputs: List[List[np.ndarray]] = []
    for file in (path, other):
        session = _open_exactly(file)
        name = session.get_inputs()[0].name
        names = [x.name for x in session.get_outputs()]
        runs = [session.run(None, {name: x}) for x in images]
        outputs.append([np.concatenate([x.ravel() for x in same])
                        .astype(np.float64) for same in zip(*runs)])
    found: Dict[str, Any] = {}
    for name, a, b in zip(names, *outputs):
        if len(a) != len(b):  # detections after suppression
            found[name] = dict(sizes=[len(a), len(b)])
            continue
        if not np.isfinite(b[np.isfinite(a)]).all():
            raise ValueError(
                f'{other}: the output {name} is not finite where that of fp32 '
                'is: its values leave the range of the precision; use fp32')
        scale = np.linalg.norm(a) or 1.
        found[name] = dict(largest=float(abs(b - a).max(initial=0.)),
                           relative=float(np.linalg.norm(b - a) / scale))
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
        precisions (Sequence[str]): Some of :data:`PRECISIONS`.
        images (Sequence): To compare on, as for :func:`compare`.
        work_dir (str): Gets the log of the evaluation.
        num_calibration (int): Training images for int8. Defaults to 64.
        evaluate (bool): Run MMDeploy's evaluator. Defaults to False.

    Returns:
        dict[str, dict]: By precision ``files`` with their sizes in bytes,
        ``comparison`` or why there is none (``skipped``), ``scales`` of int8
        (``'trained'`` or ``'calibrated'``) and ``metrics``.
    """
    inputs = [deployment.create_input(x)[1].numpy() for x in images]
    report: Dict[str, Dict[str, Any]] = {}
    for precision in precisions:
        entry = report[precision] = _write(deployment, files, precision,
                                           inputs, num_calibration)
        written = [*entry['files']]
        if 'skipped' not in entry:
            entry['comparison'] = compare_precisions(files[0], written[0],
                                                     inputs)
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
