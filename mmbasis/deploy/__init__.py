# Copyright (c) mmbasis authors. All rights reserved.
"""From a compressed model to what runs on the device; needs MMDeploy."""
from .agreement import PRECISIONS
from .calibration import write_calibration
from .compare import compare, evaluate_onnx, match_boxes
from .configs import complete, parse_size
from .export import (
    Deployment,
    calibration_images,
    complete_for_images,
    merge_slow_layers,
)
from .half import write_half
from .int8 import quantize_onnx
from .operators import check_tensorrt
from .precision import (
    add_precisions,
    check_precisions,
    compare_precisions,
    write_precision,
)
from .report import print_report
from .rtx import (
    build_engine,
    builder_at_hand,
    check_capability,
    compare_engines,
)
from .runs import open_onnx
from .tensorrt import trtexec_commands
from .weights import check_weights

__all__ = [
    'compare', 'match_boxes', 'open_onnx', 'evaluate_onnx', 'check_weights',
    'Deployment', 'merge_slow_layers', 'calibration_images', 'PRECISIONS',
    'add_precisions', 'check_precisions', 'compare_precisions',
    'write_precision', 'write_half', 'quantize_onnx', 'write_calibration',
    'check_tensorrt', 'trtexec_commands', 'complete', 'complete_for_images',
    'parse_size', 'build_engine', 'builder_at_hand', 'check_capability',
    'compare_engines', 'print_report'
]
