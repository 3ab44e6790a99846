# The graph ends at the boxes and scores that enter non-maximum suppression:
# standard operators only, the device needs no plugin. tools/deploy.py cuts a
# two-stage detector in two.
_base_ = ['./detection.py']
codebase_config = dict(model_type='single_stage')
partition_config = dict(
    type='single_stage',
    apply_marks=True,
    # MMDeploy's own list makes all axes dynamic
    partition_cfg=[
        dict(
            save_file='partition0.onnx',
            start='detector_forward:input',
            end='multiclass_nms:input',
            dynamic_axes=dict())
    ])
