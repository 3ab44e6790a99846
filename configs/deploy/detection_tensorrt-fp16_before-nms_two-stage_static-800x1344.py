_base_ = [
    './_base_/detection_before-nms_two-stage.py', './_base_/tensorrt-fp16.py'
]
onnx_config = dict(input_shape=(1344, 800))
backend_config = dict(model_inputs=[
    dict(
        input_shapes=dict(
            input=dict(
                min_shape=[1, 3, 800, 1344],
                opt_shape=[1, 3, 800, 1344],
                max_shape=[1, 3, 800, 1344]))),
    dict(
        input_shapes=dict(
            bbox_feats=dict(
                min_shape=[1, 256, 7, 7],
                opt_shape=[500, 256, 7, 7],
                max_shape=[1000, 256, 7, 7])))
])
