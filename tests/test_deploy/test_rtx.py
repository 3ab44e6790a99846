# Copyright (c) mmbasis authors. All rights reserved.
"""NVIDIA's parser and builder, and the kernels of its engines."""
import json
import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mmbasis.deploy import build_engine, builder_at_hand, rtx
from mmbasis.deploy.engines import Engine, Kernel, Refusal, read_kernels

needs_builder = pytest.mark.skipif(
    not builder_at_hand(), reason='needs the extra trt-check')


def save(path, nodes, inputs, outputs, constants=(), opset=17):
    """Write a graph; inputs and outputs are names with shapes, of floats."""

    def values(named):
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in named.items()
        ]

    graph = helper.make_graph(
        nodes, 'graph', values(inputs), values(outputs),
        [numpy_helper.from_array(np.asarray(x), k) for k, x in constants])
    opsets = [
        helper.make_opsetid('', opset),
        helper.make_opsetid('mmdeploy', 1)
    ]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(path))
    return str(path)


def network(path, batch=2):
    """Two convolutions with an activation, of inner width 5."""
    weights = [('a', np.ones((5, 3, 3, 3), 'f')),
               ('b', np.ones((4, 5, 1, 1), 'f'))]
    nodes = [
        helper.make_node('Conv', ['x', 'a'], ['y'], name='basis'),
        helper.make_node('Conv', ['y', 'b'], ['z'], name='coefficients'),
        helper.make_node('Relu', ['z'], ['out'], name='activation')
    ]
    return save(path, nodes, dict(x=[batch, 3, 'h', 16]),
                dict(out=[batch, 4, 'h2', 14]), weights)


# ------------------------------------------------------------- with a builder
@needs_builder
def test_kernels_and_what_they_fuse(tmp_path):
    engine = build_engine(network(tmp_path / 'a.onnx'))
    assert engine.size > 0 and not engine.refusals and not engine.refused
    convolutions = [x for x in engine.kernels if x.nodes]
    assert [x.nodes for x in convolutions] == [
        ('basis', ), ('coefficients', 'activation')]
    assert not any(x.copies for x in convolutions)
    # from the layout of the input to that of convolutions
    assert 0 < len(engine.copies) == len(engine.kernels) - 2
    assert re.match(r'TensorRT for RTX \d+\.\d+', engine.summary()['builder'])
    assert json.loads(json.dumps(engine.summary()))['kernels'] == len(
        engine.kernels)


@needs_builder
def test_what_is_refused_is_named(tmp_path):
    nodes = [
        helper.make_node('Unique', ['x'], ['a'], name='first'),
        helper.make_node('Magic', ['x'], ['b'], name='second',
                         domain='mmdeploy'),
        helper.make_node('TRTBatchedNMS', ['x', 'x'], ['c'], name='third',
                         domain='mmdeploy')]
    engine = build_engine(
        save(tmp_path / 'a.onnx', nodes, dict(x=[1, 8, 1, 4]),
             dict(a=None, b=None, c=None)))
    assert [(x.node, x.operator, x.own_limit) for x in engine.refusals] == [
        ('first', 'Unique', False), ('second', 'Magic', False),
        ('third', 'TRTBatchedNMS', True)]
    assert engine.refused and not engine.kernels
    assert 'Unique first: UNSUPPORTED_NODE' in str(engine.refusals[0])


LIMITS = dict(
    NonMaxSuppression=[[1, 20, 4], [1, 3, 20]],
    NonZero=[[3, 4]],
    RoiAlign=[[1, 4, 16, 16], [5, 4]],
    DeformConv=[[1, 3, 8, 8], [4, 3, 3, 3], [1, 18, 6, 6]])


@needs_builder
@pytest.mark.parametrize('operator', LIMITS)
@pytest.mark.parametrize('name', ['', 'here'])
def test_limits_of_this_builder(tmp_path, operator, name):
    inputs = dict(zip('xyz', LIMITS[operator]))
    constants = dict(
        NonMaxSuppression=[('k', np.array([5])), ('t', np.array([.5], 'f'))],
        RoiAlign=[('i', np.zeros(5, 'int64'))]).get(operator, [])
    node = helper.make_node(
        operator, [*inputs, *(k for k, _ in constants)], ['out'], name=name)
    path = save(tmp_path / 'a.onnx', [node], inputs, dict(out=None), constants,
                19)
    if operator in ('NonMaxSuppression', 'NonZero'):
        model = onnx.load(path)
        model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
        onnx.save(model, path)
    engine = build_engine(path)
    assert {x.operator for x in engine.refusals} == {operator}
    assert not engine.refused


@needs_builder
def test_dynamic_inputs_get_a_profile(tmp_path):
    path = network(tmp_path / 'a.onnx', 'n')
    assert build_engine(path).size > 0
    sizes = [(1, 3, 16, 16), (2, 3, 32, 16), (2, 3, 64, 16)]
    assert build_engine(path, '12.0', dict(x=sizes)).size > 0
    with pytest.raises(ValueError, match=r'input x .*\[-1, 3, -1, 16\]'):
        build_engine(path, shapes=dict(x=[(1, 3, 16, 17)] * 3))


@needs_builder
def test_targets_and_files(tmp_path):
    with pytest.raises(ValueError, match="'8.7'.*8.6, 8.9.*Orin"):
        build_engine('any.onnx', '8.7')
    with pytest.raises(FileNotFoundError, match='any.onnx'):
        build_engine('any.onnx')
    (tmp_path / 'a.onnx').write_bytes(b'no graph')
    assert build_engine(str(tmp_path / 'a.onnx')).refused


@needs_builder
def test_a_builder_that_does_not_end(tmp_path):
    engine = build_engine(network(tmp_path / 'a.onnx'), seconds=.01)
    assert engine.refused and 'did not end in 0.01 s' in str(
        engine.refusals[0])


# --------------------------------------------------------- without a builder
def test_a_builder_that_crashes(tmp_path, monkeypatch):
    path = network(tmp_path / 'a.onnx')
    monkeypatch.setattr(rtx, 'find_spec', lambda name: name)
    # as when the libraries do not load
    monkeypatch.setattr(rtx.sys, 'executable', '/bin/false')
    engine = build_engine(path)
    assert engine.refused and 'exit status 1' in str(engine.refusals[0])


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(rtx, 'find_spec', lambda name: None)
    assert not rtx.builder_at_hand()
    with pytest.raises(ModuleNotFoundError,
                       match=r"pip install 'mmbasis\[trt-check\]'"):
        rtx.check_capability('8.6')


@pytest.mark.parametrize('name, kind, copies', [
    ('__myl_Move_myl0_0', 'kgen', True),
    ('__myl_CastConc_myl0_0', 'kgen', True),
    ('__myl_Conc_myl0_38', 'runtime_function', True),
    ('__myl_ReshTranReshMove_myl3_1', 'kgen', True),
    ('__myl_TranMean_myl0_67', 'kgen', False),
    ('__myl_FcAddRelu_myl0_34', 'runtime_fusion', False),
    ('/conv/Conv_myl0_1', 'correlation', False),
    ('reformatted copy', 'Reformat', True),
])
def test_copies(name, kind, copies):
    assert Kernel(name, kind).copies == copies


LOG = """Engine generation completed
Layers:
Name: __mye1, LayerType: wait, Inputs: [], Outputs: []
Name: /a/Conv_myl0_2, LayerType: correlation, Inputs: [ { Name: x, \
Dimensions: [1] }], Metadata: [ONNX Layer: /a/Conv][ONNX Layer: /a/Relu]
Name: __myl_Move_myl0_3, LayerType: kgen, Inputs: [], Metadata: \

I/O Tensors:
 Name: x, IOMode: Input, LayerType: none"""


def test_log_of_the_builder():
    assert read_kernels(LOG) == (
        Kernel('/a/Conv_myl0_2', 'correlation', ('/a/Conv', '/a/Relu')),
        Kernel('__myl_Move_myl0_3', 'kgen'))
    assert read_kernels('no layers') == ()


def test_only_own_limits_are_no_refusal():
    mine = Refusal('a', 'NonZero', 'no', True)
    assert not Engine('8.6', (mine, )).refused
    assert not Engine('8.6', (mine, )).summary()['built']
    assert Engine('8.6', (mine, Refusal('b', 'Det', 'no'))).refused
    assert 'limit of this builder' in str(mine)
