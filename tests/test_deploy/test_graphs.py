# Copyright (c) mmbasis authors. All rights reserved.
"""Graphs of ONNX's own operators, and what is known of them before."""
import onnx
import pytest
from onnx import helper

from mmbasis.deploy import Deployment, check_tensorrt, compare
from mmbasis.deploy.export import read_deploy_cfg
from mmbasis.deploy.graphs import drop_dropout, keep_outputs

CLS = 'classification_onnxruntime'
FLOAT = onnx.TensorProto.FLOAT
STAGES = dict(
    layers=[1, 1, 1, 1], embed_dims=[12, 16, 24, 32], mlp_ratios=[2, 2, 2, 2],
    layer_scale_init_value=.5)
VIT = dict(
    type='VisionTransformer', img_size=32, patch_size=8,
    arch=dict(embed_dims=32, num_layers=2, num_heads=2,
              feedforward_channels=64))


def small(backbone, channels, **parts):
    """A change of a classifier's config."""

    def change(model):
        model.backbone = backbone
        model.head.update(in_channels=channels, num_classes=5)
        model.update(parts)

    return change


def export(found, image, cfg, folder):
    deployment = Deployment(cfg, found.config, found.checkpoint)
    path, = deployment.export(image, str(folder))
    result, = compare(deployment, [path], [image])
    assert result['agrees'], result
    return path, result


def test_dropout_is_evaluated_away(make_classifier, deploy_cfg, tmp_path):
    found = make_classifier(small(VIT, 32, neck=None), 32)
    path, _ = export(found, found.image, deploy_cfg(CLS, 32), tmp_path)
    kinds = [x.op_type for x in onnx.load(path).graph.node]
    assert kinds.count('Softmax') == 3  # two of attention
    assert 'Dropout' not in kinds


def test_group_norm_is_no_plugin(make_classifier, deploy_cfg, tmp_path):
    backbone = dict(type='PoolFormer', arch=STAGES)
    found = make_classifier(small(backbone, 32), 64)
    name = 'classification_tensorrt'
    path, _ = export(found, found.image, deploy_cfg(name, 64), tmp_path)
    assert {x.domain for x in onnx.load(path).graph.node} == {''}
    assert check_tensorrt(path)['10'] == []


def test_free_axes_are_tried(make_classifier, deploy_cfg, tmp_path):
    found = make_classifier(lambda model: None, 32)
    _, result = export(found, found.image, deploy_cfg(CLS, dynamic=True),
                       tmp_path)
    for what in ('head', 'head, two images', 'head, another size'):
        assert result[what]['values'] >= 2
    assert result['head, two images']['values'] == 4


def test_axes_that_are_not_free(make_classifier, deploy_cfg, tmp_path):
    """The graph says that any size will do, and holds one size inside."""
    found = make_classifier(lambda model: None, 32)
    deployment = Deployment(
        deploy_cfg(CLS, 32), found.config, found.checkpoint)
    path, = deployment.export(found.image, str(tmp_path))
    model = onnx.load(path)
    for index, axis in ((0, 'batch'), (2, 'height'), (3, 'width')):
        model.graph.input[0].type.tensor_type.shape.dim[index].dim_param = axis
    node = next(x for x in model.graph.node if x.op_type == 'Relu')
    node.output[0], output = 'inside', node.output[0]
    model.graph.initializer.append(
        helper.make_tensor('size', onnx.TensorProto.INT64, [4],
                           [1, 16, 32, 32]))
    index = [*model.graph.node].index(node)
    model.graph.node.insert(index + 1, helper.make_node(
        'Reshape', ['inside', 'size'], [output]))
    del model.graph.value_info[:]
    onnx.save(model, path)
    result, = compare(deployment, [path], [found.image])
    assert not result['agrees']
    assert result['head']['largest'] < 1e-3


def test_shapes_are_given_for_all_graphs(deploy_cfg):
    cfg = deploy_cfg('detection-before-nms_tensorrt', 320)
    cfg.partition_config.partition_cfg *= 2
    assert len(cfg.backend_config.model_inputs) == 1
    with pytest.raises(ValueError, match='has 1 entries.*writes 2 graphs'):
        read_deploy_cfg(cfg)


def dropout_graph():
    """``x -> Dropout -> a -> Relu -> b -> Dropout -> y``, in training mode."""
    nodes = [
        helper.make_node('Dropout', ['x', 'rate', 'train'], ['a']),
        helper.make_node('Relu', ['a'], ['b']),
        helper.make_node('Dropout', ['b', 'rate', 'train'], ['y'])]
    ends = [helper.make_tensor_value_info(x, FLOAT, [2]) for x in 'xy']
    constants = [
        helper.make_tensor('rate', FLOAT, [], [0.]),
        helper.make_tensor('train', onnx.TensorProto.BOOL, [], [True])]
    return helper.make_model(
        helper.make_graph(nodes, 'g', ends[:1], ends[1:], constants))


def test_ends_keep_their_names():
    model = dropout_graph()
    drop_dropout(model)
    node, = model.graph.node
    assert [*node.input] == ['x'] and [*node.output] == ['y']


def test_parts_of_a_graph():
    part = keep_outputs(dropout_graph(), ['b'])
    assert [x.op_type for x in part.graph.node] == ['Dropout', 'Relu']
    assert [x.name for x in part.graph.output] == ['b']
