# Copyright (c) mmbasis authors. All rights reserved.
"""From a compressed model to what runs on the device; needs MMDeploy."""
from .compare import compare, evaluate_onnx, match_boxes, open_onnx
from .export import (
    Deployment,
    calibration_images,
    merge_slow_layers,
    quantize_onnx,
)
from .operators import check_tensorrt
from .rtx import (
    build_engine,
    builder_at_hand,
    check_capability,
    compare_engines,
)
from .tensorrt import trtexec_command, write_calibration

__all__ = [
    'compare', 'match_boxes', 'open_onnx', 'evaluate_onnx',
    'Deployment', 'merge_slow_layers', 'calibration_images', 'quantize_onnx',
    'write_calibration', 'check_tensorrt', 'trtexec_command', 'build_engine',
    'builder_at_hand', 'check_capability', 'compare_engines'
]
