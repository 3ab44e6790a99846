_base_ = ['./_base_/detection.py', './_base_/onnxruntime.py']
onnx_config = dict(input_shape=(300, 300))
