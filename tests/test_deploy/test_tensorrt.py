# Copyright (c) mmbasis authors. All rights reserved.
"""The check against TensorRT's operators, and commands for the device."""
import numpy as np
import pytest

from mmbasis.deploy import Deployment, check_tensorrt, trtexec_commands
from mmbasis.deploy.operators import MAX_OPSET

onnx = pytest.importorskip('onnx')
helper = onnx.helper


def problems(tmp_path, nodes, opset=13, constants=(), domain=''):
    """What is wrong with a graph of these nodes from x to y."""
    value = onnx.TensorProto.FLOAT
    graph = helper.make_graph(nodes, 'graph', [
        helper.make_tensor_value_info('x', value, [1, 3, 8, 8]),
        helper.make_tensor_value_info('k', onnx.TensorProto.INT64, [1])
    ], [helper.make_tensor_value_info('y', value, None)], [
        onnx.numpy_helper.from_array(np.asarray(array), name)
        for name, array in constants
    ])
    opsets = [helper.make_opsetid('', opset)]
    if domain:
        opsets.append(helper.make_opsetid(domain, 1))
    path = str(tmp_path / 'graph.onnx')
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return check_tensorrt(path)


def test_plain_operators_pass(tmp_path):
    nodes = [
        helper.make_node('Relu', ['x'], ['a']),
        helper.make_node('TopK', ['a', 'five'], ['y', 'i'])
    ]
    constants = [('five', np.array([5]))]
    assert problems(
        tmp_path, nodes, constants=constants) == {
            '8.5': [],
            '10': []
        }


@pytest.mark.parametrize('node, text', [
    (helper.make_node('TopK', ['x', 'many'],
                      ['y', 'i']), 'K is 4000, the largest is 3840'),
    (helper.make_node('Dropout', ['x', 'half', 'yes'],
                      ['y']), 'training_mode is not'),
    (helper.make_node('Dropout', ['x', 'half', 'b'],
                      ['y']), 'training_mode must be a constant'),
    (helper.make_node('Unsqueeze', ['x', 'k'], ['y']), 'axes must be'),
    (helper.make_node(
        'MaxPool', ['x'], ['y'], kernel_shape=[2, 2],
        dilations=[2, 2]), 'dilations'),
    (helper.make_node('MaxPool', ['x'], ['y', 'i'],
                      kernel_shape=[2, 2]), 'Indices'),
    (helper.make_node('Unique', ['x'], ['y']), 'Unique: not supported'),
])
def test_restrictions(tmp_path, node, text):
    constants = [('many', np.array([4000])), ('half', np.float32(.5)),
                 ('yes', np.array(True))]
    found = problems(tmp_path, [node], constants=constants)
    for version in ('8.5', '10'):
        assert len(found[version]) == 1 and text in found[version][0]


def test_versions_differ(tmp_path):
    node = helper.make_node('Gelu', ['x'], ['y'])
    found = problems(tmp_path, [node], opset=20)
    assert [x.split(':')[0] for x in found['8.5']] == ['opset 20', 'Gelu']
    assert found['10'] == []


def test_what_the_tables_do_not_know_is_refused(tmp_path):
    node = helper.make_node('Novelty', ['x'], ['y'])
    for found in problems(tmp_path, [node]).values():
        assert found == ['Novelty: not supported']


def test_every_operator_of_onnx_is_judged(tmp_path):
    """Those that came after a version's newest opset are refused, too."""
    first = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if not schema.domain:
            since = first.get(schema.name, schema.since_version)
            first[schema.name] = min(since, schema.since_version)
    refused = problems(
        tmp_path, [helper.make_node(name, ['x'], ['y']) for name in first])
    for version, newest in MAX_OPSET.items():
        lines = set(refused[version])
        assert lines.issuperset(
            f'{name}: not supported' for name, since in first.items()
            if since > newest)


@pytest.mark.parametrize('node, text', [
    (helper.make_node('Slice', ['x', 'a', 'b', 'k'], ['y']), 'axes must be'),
    (helper.make_node('TopK', ['x', 'k'], ['y', 'i']), 'K must be'),
    (helper.make_node('CumSum', ['x', 'k'], ['y']), 'axis must be'),
    (helper.make_node('Resize', ['x', '', 's'], ['y'],
                      mode='cubic'), "mode='cubic' is not"),
])
def test_what_only_matters_to_the_old_one(tmp_path, node, text):
    constants = [('a', np.array([0])), ('b', np.array([2])),
                 ('s', np.array([1., 1, 2, 2], np.float32))]
    found = problems(tmp_path, [node], constants=constants)
    assert text in found['8.5'][0] and found['10'] == []


@pytest.mark.parametrize('opset', [11, 13])
def test_sizes_are_followed_to_where_they_count(tmp_path, opset):
    """K is 3 · 8 · 8 · 21, of the shape of the input."""
    axes = dict(axes=[0]) if opset < 13 else {}
    nodes = [
        helper.make_node('Shape', ['x'], ['s']),
        helper.make_node('Gather', ['s', 'i'], ['c']),
        helper.make_node('Mul', ['c', 'many'], ['m']),
        helper.make_node('Unsqueeze', ['m', 'zero'][:1 + (opset > 12)], ['K'],
                         **axes),
        helper.make_node('TopK', ['x', 'K'], ['y', 'j'])
    ]
    constants = [('i', np.array(1)), ('many', np.array(8 * 8 * 21)),
                 ('zero', np.array([0]))]
    found = problems(tmp_path, nodes, opset, constants)
    assert found['10'] == ['TopK: K is 4032, the largest is 3840']


def test_custom_operators_are_named(tmp_path):
    node = helper.make_node('Magic', ['x'], ['y'], domain='mmdeploy')
    found = problems(tmp_path, [node], domain='mmdeploy')
    assert 'mmdeploy::Magic: a custom operator' in found['10'][0]


def test_commands_for_the_device(classifier, deploy_cfg, tmp_path):
    path = str(tmp_path / 'end2end.onnx')
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1])
            for name in 'xy')
    graph = helper.make_graph([helper.make_node('Relu', ['x'], ['y'])],
                              'graph', [x], [y])
    onnx.save(helper.make_model(graph), path)

    def commands(*args, **kwargs):
        cfg = deploy_cfg('classification_tensorrt', *args, **kwargs)
        return trtexec_commands(
            Deployment(cfg, classifier.config, classifier.checkpoint), path)

    plain = 'trtexec --onnx=end2end.onnx --saveEngine=end2end.engine'
    assert commands(32) == {'8.5': plain, '10': plain}
    lowered = f'{plain} --fp16'
    assert commands(
        32, precision='fp16') == {'8.5': lowered, '10': lowered}
    assert commands(
        224, dynamic=True, batch=8, precision='int8')['8.5'] == (
            f'{plain} --fp16 --int8 --minShapes=input:1x3x224x224 '
            '--optShapes=input:8x3x224x224 --maxShapes=input:8x3x224x224')
    # a file of fp16 says so itself to those that are strongly typed
    graph.initializer.append(
        onnx.numpy_helper.from_array(np.ones(1, np.float16), 'half'))
    onnx.save(helper.make_model(graph), path)
    assert commands(32, precision='fp16') == {
        '8.5': lowered, '10': f'{plain} --stronglyTyped'}
