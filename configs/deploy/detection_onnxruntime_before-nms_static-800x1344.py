_base_ = ['./_base_/detection_before-nms.py', './_base_/onnxruntime.py']
onnx_config = dict(input_shape=(1344, 800))
