# Copyright (c) mmbasis authors. All rights reserved.
"""From a compressed model to what runs on the device; needs MMDeploy."""
from .compare import compare, evaluate_onnx, match_boxes
from .export import (
    Deployment,
    calibration_images,
    merge_slow_layers,
    quantize_onnx,
)
from .runs import open_onnx
from .tensorrt import check_tensorrt, trtexec_command, write_calibration
from .weights import check_weights

__all__ = [
    'compare', 'match_boxes', 'open_onnx', 'evaluate_onnx', 'check_weights',
    'Deployment', 'merge_slow_layers', 'calibration_images', 'quantize_onnx',
    'write_calibration', 'check_tensorrt', 'trtexec_command'
]
