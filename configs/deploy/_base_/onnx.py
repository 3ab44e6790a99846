# What MMDeploy reads of every deploy config. tools/deploy.py completes these
# files with sizes, batch and precision. They inherit from nothing outside this
# folder, because the pip package of MMDeploy brings no configs.
onnx_config = dict(
    type='onnx',
    export_params=True,
    keep_initializers_as_inputs=False,
    # per-channel int8 of ONNX Runtime needs 13; TensorRT 8.5 reads up to 17
    opset_version=13,
    save_file='end2end.onnx',
    input_names=['input'],
    output_names=['output'],
    # (width, height); None leaves the size to the model's test pipeline
    input_shape=None,
    # images that the graph is traced with; ours, MMDeploy's tool traces one
    batch_size=1,
    # MMDeploy's graph passes need its compiled extension
    optimize=False)
