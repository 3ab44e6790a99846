_base_ = ['./_base_/detection.py', './_base_/tensorrt-int8.py']
onnx_config = dict(input_shape=(1344, 800))
backend_config = dict(model_inputs=[
    dict(
        input_shapes=dict(
            input=dict(
                min_shape=[1, 3, 800, 1344],
                opt_shape=[1, 3, 800, 1344],
                max_shape=[1, 3, 800, 1344])))
])
