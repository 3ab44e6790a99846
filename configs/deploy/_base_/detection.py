_base_ = ['./onnx.py']
onnx_config = dict(output_names=['dets', 'labels'])
codebase_config = dict(
    type='mmdet',
    task='ObjectDetection',
    model_type='end2end',
    module=['mmbasis.deploy.rewriters'],
    # where the model's test_cfg states a threshold or a count, that one holds
    post_processing=dict(
        score_threshold=0.05,
        confidence_threshold=0.005,
        iou_threshold=0.5,
        max_output_boxes_per_class=1000,
        pre_top_k=5000,
        keep_top_k=100,
        background_label_id=-1))
