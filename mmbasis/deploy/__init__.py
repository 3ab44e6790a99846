# Copyright (c) mmbasis authors. All rights reserved.
"""From a compressed model to what runs on the device; needs MMDeploy."""
from .compare import compare, evaluate_onnx, match_boxes, open_onnx
from .export import Deployment, calibration_images, merge_slow_layers
from .half import write_half
from .int8 import quantize_onnx
from .precision import (
    PRECISIONS,
    add_precisions,
    compare_precisions,
    write_precision,
)
from .tensorrt import check_tensorrt, trtexec_command, write_calibration

__all__ = [
    'compare', 'match_boxes', 'open_onnx', 'evaluate_onnx',
    'Deployment', 'merge_slow_layers', 'calibration_images', 'PRECISIONS',
    'add_precisions', 'compare_precisions', 'write_precision', 'write_half',
    'quantize_onnx',
    'write_calibration', 'check_tensorrt', 'trtexec_command'
]
