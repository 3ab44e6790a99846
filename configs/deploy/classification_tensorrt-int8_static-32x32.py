_base_ = ['./_base_/classification.py', './_base_/tensorrt-int8.py']
onnx_config = dict(input_shape=(32, 32))
backend_config = dict(model_inputs=[
    dict(
        input_shapes=dict(
            input=dict(
                min_shape=[1, 3, 32, 32],
                opt_shape=[1, 3, 32, 32],
                max_shape=[1, 3, 32, 32])))
])
