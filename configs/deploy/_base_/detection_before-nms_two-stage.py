# Two graphs: one ends at the features and at the proposals that enter
# non-maximum suppression, one holds the heads of the regions. What stands
# between them (suppression, RoIAlign) is the device's program's to do.
_base_ = ['./detection_before-nms.py']
codebase_config = dict(model_type='two_stage')
partition_config = dict(
    type='two_stage',
    # MMDeploy's own list starts at marks that its rewriters for MMDetection 3
    # do not set
    partition_cfg=[
        dict(
            save_file='partition0.onnx',
            start='extract_feat:input',
            end=['extract_feat:output', 'multiclass_nms[0]:input'],
            dynamic_axes=dict()),
        dict(
            save_file='partition1.onnx',
            start='bbox_head_forward:input',
            end='bbox_head_forward:output',
            dynamic_axes=dict(
                bbox_feats={0: 'regions'},
                cls_score={0: 'regions'},
                bbox_pred={0: 'regions'}))
    ])
