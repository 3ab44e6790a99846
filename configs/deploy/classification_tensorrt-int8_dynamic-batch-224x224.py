_base_ = ['./_base_/classification.py', './_base_/tensorrt-int8.py']
onnx_config = dict(
    input_shape=(224, 224),
    dynamic_axes={
        'input': {
            0: 'batch'
        },
        'output': {
            0: 'batch'
        }
    })
backend_config = dict(model_inputs=[
    dict(
        input_shapes=dict(
            input=dict(
                min_shape=[1, 3, 224, 224],
                opt_shape=[4, 3, 224, 224],
                max_shape=[64, 3, 224, 224])))
])
