_base_ = ['./_base_/detection.py', './_base_/tensorrt-int8.py']
onnx_config = dict(input_shape=(416, 416))
backend_config = dict(model_inputs=[
    dict(
        input_shapes=dict(
            input=dict(
                min_shape=[1, 3, 416, 416],
                opt_shape=[1, 3, 416, 416],
                max_shape=[1, 3, 416, 416])))
])
