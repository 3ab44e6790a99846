# Copyright (c) mmbasis authors. All rights reserved.
"""From a compressed model to what runs on the device.

Needs MMDeploy.
"""
from .compare import compare, evaluate_onnx, match_boxes, open_onnx
from .export import Deployment
from .merge import merge_slow_layers
from .quantize import calibration_images, quantize_onnx, write_calibration
from .tensorrt import check_tensorrt, trtexec_command

__all__ = [
    'compare', 'match_boxes', 'open_onnx', 'evaluate_onnx',
    'Deployment', 'merge_slow_layers', 'calibration_images', 'quantize_onnx',
    'write_calibration', 'check_tensorrt', 'trtexec_command'
]
