_base_ = ['./_base_/detection_before-nms.py', './_base_/tensorrt-fp16.py']
onnx_config = dict(input_shape=(300, 300))
backend_config = dict(model_inputs=[
    dict(
        input_shapes=dict(
            input=dict(
                min_shape=[1, 3, 300, 300],
                opt_shape=[1, 3, 300, 300],
                max_shape=[1, 3, 300, 300])))
])
