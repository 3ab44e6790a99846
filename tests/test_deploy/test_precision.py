# Copyright (c) mmbasis authors. All rights reserved.
"""Fp16 and int8 that the graph says itself."""
import os
import sys

import cv2
import numpy as np
import onnx
import pytest
import torch
import torch.nn as nn
from onnx import TensorProto, helper, numpy_helper

from mmbasis.compression import read_checkpoint
from mmbasis.deploy import (
    Deployment,
    add_precisions,
    calibration_images,
    check_precisions,
    compare_precisions,
    quantize_onnx,
    write_half,
)
from mmbasis.deploy.agreement import judge
from mmbasis.deploy.precision import _open_exactly
from mmbasis.models.int8 import (
    INT8_KEY,
    FakeQuantization,
    InputScales,
    measure_scales,
)

CLS = 'classification_onnxruntime'


def run(path, x):
    """The outputs of a graph as it stands, without ONNX Runtime's changes."""
    session = _open_exactly(str(path))
    return session.run(None, {session.get_inputs()[0].name: x})


def write(path, nodes, x=(1, 4, 8, 8), constants=None, outputs=('y', ),
          opset=13):
    """Write a graph; nodes are (operator, inputs, outputs, attributes)."""
    graph = helper.make_graph(
        [helper.make_node(kind, ins, outs, f'n{i}', **attributes)
         for i, (kind, ins, outs, attributes) in enumerate(nodes)], 'g',
        [helper.make_tensor_value_info('x', TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
         for y in outputs],
        [numpy_helper.from_array(v, k)
         for k, v in (constants or {}).items()])
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid('', opset),
                              helper.make_opsetid('other', 1)])
    model.ir_version = 8
    onnx.save(onnx.shape_inference.infer_shapes(model), str(path))
    return str(path)


def half(path, images=()):
    """Write the fp16 graph; path, and type of what each operator reads."""
    output = f'{path}.half'
    write_half(path, output, images)
    model = onnx.shape_inference.infer_shapes(onnx.load(output))
    graph = model.graph
    types = {x.name: x.type.tensor_type.elem_type
             for x in (*graph.input, *graph.value_info, *graph.output)}
    types.update({x.name: x.data_type for x in graph.initializer})
    read = {x.name: [types[y] for y in x.input if y in types]
            for x in graph.node}
    return output, read


WEIGHT = np.random.RandomState(0).randn(4, 4, 1, 1).astype('f') / 2
CONV = ('Conv', ['x', 'w'], ['a'], {})
LAST = ('Conv', ['b', 'w'], ['y'], {})
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


# --------------------------------------------------------------------- fp16
def test_fp16_between_convolutions(tmp_path):
    path = write(tmp_path / 'm.onnx', [CONV, ('Relu', ['a'], ['b'], {}), LAST],
                 constants=dict(w=WEIGHT))
    output, read = half(path)
    assert read['n0'] == [HALF] * 2 and read['n1'] == [HALF]
    graph = onnx.load(output).graph
    assert [x.op_type for x in graph.node] == [
        'Cast', 'Conv', 'Relu', 'Conv', 'Cast']
    assert [x.type.tensor_type.elem_type
            for x in (*graph.input, *graph.output)] == [FLOAT] * 2
    x = np.random.RandomState(0).randn(1, 4, 8, 8).astype('f')
    error = np.abs(run(path, x)[0] - run(output, x)[0]).max()
    assert 0 < error < .01


def test_squares_do_not_overflow(tmp_path):
    """Neighbours that stay fp32 hand fp32 on: 300 ** 2 is beyond fp16."""
    path = write(
        tmp_path / 'm.onnx',
        [CONV, ('Pow', ['a', 'two'], ['p'], {}),
         ('ReduceMean', ['p'], ['m'], dict(axes=[1])),
         ('Sqrt', ['m'], ['s'], {}), ('Div', ['a', 's'], ['b'], {}), LAST],
        constants=dict(w=WEIGHT, two=np.float32(2)))
    output, read = half(path)
    for name in ('n1', 'n2', 'n3'):
        assert set(read[name]) == {FLOAT}
    x = np.full((1, 4, 8, 8), 600, 'f')
    ours, theirs = run(output, x)[0], run(path, x)[0]
    assert np.abs(ours - theirs).max() < .01 * np.abs(theirs).max()


def test_what_follows_the_last_layer_stays(tmp_path):
    """Coordinates of boxes, which fp16 rounds to a pixel."""
    path = write(
        tmp_path / 'm.onnx',
        [CONV, ('Mul', ['a', 'small'], ['d'], {}),
         ('Add', ['d', 'grid'], ['y'], {})],
        constants=dict(w=WEIGHT, small=np.float32(.01),
                       grid=np.full((1, 1, 8, 8), 1300.3, 'f')))
    output, read = half(path)
    assert read['n0'] == [HALF] * 2 and read['n2'] == [FLOAT] * 2
    x = np.random.RandomState(0).randn(1, 4, 8, 8).astype('f')
    assert np.abs(run(path, x)[0] - run(output, x)[0]).max() < 1e-3


@pytest.mark.parametrize('value', [1e-12, 1e9])
def test_constants_that_fp16_cannot_hold(tmp_path, value):
    path = write(
        tmp_path / 'm.onnx',
        [CONV, ('Add', ['a', 'c'], ['e'], {}), ('Sub', ['e', 'c'], ['b'], {}),
         LAST], constants=dict(w=WEIGHT, c=np.float32(value)))
    _, read = half(path)
    assert read['n0'] == [HALF] * 2
    assert read['n1'] == read['n2'] == [FLOAT] * 2


def test_a_constant_of_both_precisions_and_a_resize(tmp_path):
    """Each operator gets its own, exactly; scales stay fp32."""
    path = write(
        tmp_path / 'm.onnx',
        [('Constant', [], ['c'],
          dict(value=numpy_helper.from_array(np.float32(1.0001)))),
         CONV, ('Mul', ['a', 'c'], ['r'], {}),
         ('Resize', ['r', '', 'scales'], ['b'], dict(mode='nearest')),
         LAST[:2] + (['z'], {}), ('Mul', ['z', 'c'], ['y'], {})],
        constants=dict(w=WEIGHT, scales=np.float32([1, 1, 2, 2])))
    output, read = half(path)
    assert read['n2'] == [HALF] * 2 and read['n5'] == [FLOAT] * 2
    assert read['n3'] == [HALF, FLOAT]
    values = {x.name: numpy_helper.to_array(x)
              for x in onnx.load(output).graph.initializer}
    assert values['c'] == np.float32(1.0001)
    x = np.random.RandomState(0).randn(1, 4, 8, 8).astype('f')
    assert np.allclose(run(path, x)[0], run(output, x)[0], atol=.02)


def test_sizes_are_computed_as_before(tmp_path):
    """Floats that come from shapes: 2049 is no number of fp16."""
    path = write(
        tmp_path / 'm.onnx',
        [CONV, ('Shape', ['a'], ['s'], {}),
         ('Cast', ['s'], ['f'], dict(to=FLOAT)),
         ('Mul', ['f', 'one'], ['g'], {}),
         ('Cast', ['g'], ['i'], dict(to=TensorProto.INT64)),
         ('Expand', ['a', 'i'], ['b'], {}), LAST],
        x=(1, 4, 1, 2049), constants=dict(w=WEIGHT, one=np.ones(1, 'f')))
    output, read = half(path)
    assert FLOAT in read['n3'] and HALF not in read['n3']
    assert run(output, np.ones((1, 4, 1, 2049), 'f'))[0].shape[-1] == 2049


def test_output_that_is_read_inside(tmp_path):
    path = write(tmp_path / 'm.onnx',
                 [('Conv', ['x', 'w'], ['b'], {}), LAST],
                 constants=dict(w=WEIGHT), outputs=('y', 'b'))
    output, read = half(path)
    assert read['n0'] == read['n1'] == [HALF] * 2
    x = np.random.RandomState(0).randn(1, 4, 8, 8).astype('f')
    for a, b in zip(run(path, x), run(output, x)):
        assert a.dtype == b.dtype == np.float32
        assert np.allclose(a, b, atol=.02)


def test_types_that_nobody_knows(tmp_path):
    path = write(tmp_path / 'm.onnx',
                 [CONV, ('Odd', ['a'], ['b'], dict(domain='other')), LAST],
                 constants=dict(w=WEIGHT))
    with pytest.raises(ValueError, match='other::Odd'):
        half(path)
    assert os.listdir(tmp_path) == ['m.onnx']


def test_values_beyond_fp16(tmp_path):
    """Where the images show them, their operators stay fp32."""
    path = write(tmp_path / 'm.onnx', [
        CONV, ('Mul', ['a', 'c'], ['l'], {}), ('Mul', ['l', 'd'], ['b'], {}),
        LAST], constants=dict(w=WEIGHT, c=np.float32(1e4), d=np.float32(1e-4)))
    x = np.full((1, 4, 8, 8), 100, 'f')
    _, read = half(path)
    assert read['n1'] == [HALF] * 2
    output, read = half(path, [x])
    assert read['n0'] == [HALF] * 2 == read['n3']
    assert read['n1'] == read['n2'] == [FLOAT] * 2
    assert compare_precisions(path, output, [x])['y']['relative'] < .01


def test_numbers_that_are_lost_are_told(tmp_path):
    path = write(tmp_path / 'm.onnx', [CONV, ('Relu', ['a'], ['b'], {}), LAST],
                 constants=dict(w=WEIGHT))
    other = write(tmp_path / 'n.onnx', [CONV, ('Log', ['a'], ['b'], {}), LAST],
                  constants=dict(w=-np.abs(WEIGHT)))
    x = np.ones((1, 4, 8, 8), 'f')
    with pytest.raises(ValueError, match='n.onnx: the output y is not finite'):
        compare_precisions(path, other, [x])


# --------------------------------------------------------------------- int8
@pytest.fixture(scope='module')
def deployment(make_classifier, deploy_cfg):
    """Of a classifier without normalisations in the middle."""
    found = make_classifier()
    return Deployment(deploy_cfg(CLS, 32), found.config, found.checkpoint)


@pytest.fixture(scope='module')
def exported(deployment, image_paths, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp('precision'))
    path, = deployment.export(image_paths[0], folder)
    return path, calibration_images(deployment, 12)


@pytest.fixture(scope='module')
def calibrated(deployment, image_paths):
    """Scales as a training in int8 begins with them."""
    from mmpretrain.structures import DataSample
    return measure_scales(deployment.model, [
        dict(inputs=torch.from_numpy(cv2.imread(x)).permute(2, 0, 1)[None],
             data_samples=[DataSample()]) for x in image_paths])


@pytest.mark.parametrize('backend', ['onnxruntime', 'tensorrt'])
def test_int8_of_both_back_ends(exported, tmp_path, backend):
    path, images = exported
    small = str(tmp_path / 'int8.onnx')
    quantize_onnx(path, small, images, backend)
    outputs = [np.array([run(p, x)[0] for x in images[:6]])
               for p in (path, small)]
    # close, and not the same
    assert 0 < np.abs(outputs[0] - outputs[1]).max() < .1
    assert os.listdir(tmp_path) == ['int8.onnx']
    graph = onnx.load(small).graph
    nodes = {y: x for x in graph.node for y in x.output}
    convs = [x for x in graph.node if x.op_type == 'Conv']
    assert len(convs) > 10
    if backend == 'onnxruntime':
        assert os.path.getsize(small) < .6 * os.path.getsize(path)
        return
    values = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    for conv in convs:
        for name, axes in zip(conv.input, (0, 1)):
            pair = nodes[name], nodes[nodes[name].input[0]]
            assert [x.op_type for x in pair] == [
                'DequantizeLinear', 'QuantizeLinear']
            zero = values[pair[0].input[2]]
            assert zero.dtype == np.int8 and not zero.any()
            # one step per output channel of the weights
            assert values[pair[0].input[1]].ndim == axes
        assert all(x in values for x in conv.input[2:])  # the bias
    # a layer and its activation are not torn apart
    relus = [x for x in graph.node if x.op_type == 'Relu']
    assert relus and not any(
        nodes[x.input[0]].op_type == 'DequantizeLinear' for x in relus)


@pytest.mark.parametrize('backend', ['onnxruntime', 'tensorrt'])
def test_trained_scales_are_in_the_graph(exported, deployment, calibrated,
                                         tmp_path, backend):
    """The graph is the network that was trained in int8."""
    path, images = exported
    model = deployment.model
    # other steps than a calibration would find
    scales = InputScales({k: 1.5 * v for k, v in calibrated.layers.items()})
    small = str(tmp_path / 'int8.onnx')
    quantize_onnx(path, small, images, backend, scales)
    graph = onnx.load(small).graph
    values = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    found = {float(values[x.input[1]]) for x in graph.node
             if x.op_type == 'QuantizeLinear' and not values[x.input[1]].ndim}
    assert {float(np.float32(v)) for v in scales.layers.values()} <= found

    rounding = FakeQuantization(model, scales)
    with torch.no_grad():
        theirs = [model(torch.from_numpy(x), mode='tensor').softmax(1).numpy()
                  for x in images]
    rounding.remove()
    ours, before = ([run(p, x)[0] for x in images] for p in (small, path))
    errors = [np.linalg.norm(np.subtract(x, theirs)) for x in (ours, before)]
    # ONNX Runtime's rounds shortcuts, too
    assert errors[0] < dict(tensorrt=.3, onnxruntime=3)[backend] * errors[1]

    other = InputScales(dict(nothing=1.))
    with pytest.raises(ValueError, match='none of its operators.*nothing'):
        quantize_onnx(path, small, images, backend, other)


def test_report_of_precisions(exported, deployment, calibrated, image_paths,
                              tmp_path):
    path, _ = exported
    content = read_checkpoint(deployment.checkpoint)
    content['meta'][INT8_KEY] = calibrated.to_dict()
    trained = str(tmp_path / 'trained.pth')
    torch.save(content, trained)
    kept, deployment.checkpoint = deployment.checkpoint, trained
    try:
        report = add_precisions(
            deployment, [path], ['fp16', 'int8'], image_paths[:2],
            str(tmp_path), num_calibration=4, evaluate=True)
    finally:
        deployment.checkpoint = kept
    for precision, entry in report.items():
        (file, size), = entry['files'].items()
        assert file == path.replace('.onnx', f'-{precision}.onnx')
        assert size == os.path.getsize(file) < .6 * os.path.getsize(path)
        assert entry['agrees']
        assert 0 < entry['comparison']['output']['relative'] < .3
        assert 'accuracy/top1' in entry['metrics']
    assert report['int8']['scales'] == 'trained'


# ------------------------------------------------------------------ verdicts
def changed(path, output, edit):
    """The graph after ``edit(graph, weights)`` with its initializers."""
    model = onnx.load(path)
    weights = {x.name: numpy_helper.to_array(x).copy()
               for x in model.graph.initializer}
    edit(model.graph, weights)
    del model.graph.initializer[:]
    model.graph.initializer.extend(
        numpy_helper.from_array(v, k) for k, v in weights.items())
    onnx.save(model, str(output))
    return str(output)


def weight_of(graph, node, weights):
    """The name of a node's weight, which may be rounded to int8 in front."""
    made = {y: x for x in graph.node for y in x.output}
    name = node.input[1]
    while name not in weights:
        name = made[name].input[0]
    return name


def layers_of(graph):
    return [x for x in graph.node if x.op_type in ('Conv', 'Gemm')]


def empty(graph, weights):
    # one in a residual branch may be worth less than int8
    weights[weight_of(graph, layers_of(graph)[0], weights)][:] = 0


def mirrored(graph, weights):
    layers = layers_of(graph)
    name = weight_of(graph, layers[len(layers) // 3], weights)
    weights[name] = weights[name][::-1].copy()


def other_labels(graph, weights):
    """Rows of the last layer, or of that of the detector's classes."""
    node = [x for x in layers_of(graph)
            if x.op_type == 'Gemm' or 'retina_cls' in x.name][-1]
    for name in (weight_of(graph, node, weights), *node.input[2:]):
        if name in weights:
            weights[name] = weights[name][::-1].copy()


def linear(graph, weights):
    for node in graph.node:
        if node.op_type == 'Relu':
            node.op_type = 'Identity'


BROKEN = [empty, mirrored, other_labels, linear]


def agrees(path, other, images, precision):
    found = compare_precisions(path, other, images, precision)
    for one in found.values():
        assert one['agrees'] is ('reason' not in one)
    return all(x['agrees'] for x in found.values())


@pytest.fixture(scope='module')
def lowered(exported, tmp_path_factory):
    """The classifier in both precisions, and images."""
    return _lowered(*exported, tmp_path_factory.mktemp('lowered'))


def _lowered(path, images, folder):
    files = dict(fp16=str(folder / 'fp16.onnx'), int8=str(folder / 'i8.onnx'))
    write_half(path, files['fp16'], images[:2])
    quantize_onnx(path, files['int8'], images, 'tensorrt')
    return path, files, images[:3]


def check_verdicts(lowered, precision, names, folder):
    """The graph agrees; with something broken in it, it does not."""
    path, files, images = lowered
    found = compare_precisions(path, files[precision], images, precision)
    assert names <= {*found}
    assert agrees(path, files[precision], images, precision), found
    for edit in BROKEN:
        wrong = changed(files[precision], folder / 'wrong.onnx', edit)
        assert not agrees(path, wrong, images, precision), edit.__name__


@pytest.mark.parametrize('precision', ['fp16', 'int8'])
def test_verdicts_on_a_classifier(lowered, tmp_path, precision):
    check_verdicts(lowered, precision, {'output', 'head[0]:0'}, tmp_path)


@pytest.fixture(scope='module')
def small_detector(make_detector):
    return make_detector('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 64,
                         **{'model.bbox_head.num_classes': 3})


@pytest.fixture(scope='module')
def lowered_detector(small_detector, deploy_cfg, detector_images,
                     tmp_path_factory):
    folder = tmp_path_factory.mktemp('detector')
    found = Deployment(deploy_cfg('detection-before-nms_onnxruntime', 64),
                       small_detector.config, small_detector.checkpoint)
    path, = found.export(detector_images[0], str(folder))
    return _lowered(path, [found.create_input(x)[1].numpy()
                           for x in detector_images], folder)


@pytest.mark.parametrize('precision', ['fp16', 'int8'])
def test_verdicts_on_a_detector(lowered_detector, tmp_path, precision):
    check_verdicts(lowered_detector, precision, {'boxes', 'bbox_head[0]:0'},
                   tmp_path)


def candidates(count=60):
    random = np.random.RandomState(0)
    corner = random.rand(count, 2) * 200
    boxes = np.concatenate([corner, corner + 5 + 40 * random.rand(count, 2)],
                           1)
    return boxes[None], random.rand(1, count, 3)


def verdict(boxes, scores, precision='fp16'):
    theirs = dict(zip(('boxes', 'scores'), candidates()))
    return judge([dict(boxes=boxes, scores=scores)], [theirs],
                 {'boxes', 'scores'}, precision)['boxes']


def test_candidates_may_swap_places():
    boxes, scores = candidates()
    assert verdict(boxes, scores)['unmatched'] == 0
    order = np.random.RandomState(1).permutation(60)
    assert verdict(boxes[:, order], scores[:, order])['agrees']
    # cut off a little elsewhere, as TopK does
    assert verdict(boxes[:, 1:], scores[:, 1:] + 1e-4)['compared'] > 100
    assert verdict(boxes[:, 1:], scores[:, 1:] + 1e-4)['agrees']
    assert verdict(boxes + .3, scores - .005)['agrees']
    assert verdict(boxes + 4, scores, 'int8')['agrees']


@pytest.mark.parametrize('change', [
    lambda boxes, scores: (boxes + 4, scores),
    lambda boxes, scores: (boxes, scores[..., ::-1]),
    lambda boxes, scores: (boxes[:, ::-1], scores),
    lambda boxes, scores: (boxes, scores * .5),
    lambda boxes, scores: (boxes[:, :40], scores[:, :40]),
    lambda boxes, scores: (boxes[:, :0], scores[:, :0]),
])
def test_candidates_that_are_others(change):
    found = verdict(*change(*candidates()))
    assert not found['agrees'] and 'have no partner' in found['reason']


def test_detections_have_labels():
    boxes, scores = candidates()
    best = scores[0].argmax(1)[None]
    dets = np.concatenate([boxes, scores.max(2)[..., None]], 2)
    theirs = dict(dets=dets, labels=best)
    for labels, right in ((best, True), ((best + 1) % 3, False)):
        found = judge([dict(dets=dets, labels=labels)], [theirs],
                      {'dets', 'labels'}, 'fp16')
        assert [*found] == ['dets'] and found['dets']['agrees'] is right


def test_a_constant_hides_no_error():
    random = np.random.RandomState(0)
    x = random.randn(1, 3, 4, 4)
    for offset in (0, 50):
        found = judge([dict(x=x * 1.1 + offset)], [dict(x=x + offset)],
                      set(), 'fp16')['x']
        assert not found['agrees'] and 'of its variation' in found['reason']
    # what rounding takes from a large constant does not count
    half = (x + 50).astype(np.float16)
    assert judge([dict(x=half)], [dict(x=x + 50)], set(), 'fp16')['x'][
        'agrees']


def test_scores_are_judged_as_logits():
    """A class that is certain does not hide the others."""
    logits = np.array([[12., 1, 0, -1]])
    wrong = np.array([[12., -1, 0, 1]])
    found = [judge([dict(y=softmax(x))], [dict(y=softmax(logits))], set(),
                   'fp16')['y'] for x in (logits * 1.01, wrong)]
    assert [x['agrees'] for x in found] == [True, False]


def softmax(x):
    return np.exp(x) / np.exp(x).sum(1, keepdims=True)


# ------------------------------------------------------ refused before export
def test_plugins_are_refused_before_the_export(
        small_detector, deployment, deploy_cfg, detector_images, repo_root,
        monkeypatch, tmp_path):
    from mmcv.ops import ModulatedDeformConv2dPack
    whole = Deployment(deploy_cfg('detection_tensorrt', 64),
                       small_detector.config, small_detector.checkpoint)
    for precision in ('fp16', 'int8'):
        with pytest.raises(ValueError, match='TRTBatchedNMS.*before-nms'):
            check_precisions(whole, [precision])
    check_precisions(whole, [])
    for name in ('detection-before-nms_tensorrt', 'detection_onnxruntime'):
        check_precisions(
            Deployment(deploy_cfg(name, 64), small_detector.config,
                       small_detector.checkpoint), ['fp16', 'int8'])
    check_precisions(deployment, ['fp16', 'int8'])
    try:
        deployment.model.offsets = ModulatedDeformConv2dPack(3, 3, 3)
        with pytest.raises(ValueError, match='offsets is a ModulatedDeform'):
            check_precisions(deployment, ['int8'])
    finally:
        del deployment.model.offsets

    monkeypatch.syspath_prepend(str(repo_root / 'tools'))
    import deploy as tool
    folder = tmp_path / 'new'
    monkeypatch.setattr(sys, 'argv', [
        'deploy.py', str(repo_root / 'configs/deploy/detection_tensorrt.py'),
        small_detector.config, small_detector.checkpoint, detector_images[0],
        '--input-shape', '64x64', '--work-dir', str(folder), '--precision',
        'fp16'])
    with pytest.raises(SystemExit, match='--precision fp16 of a whole graph'):
        tool.main()
    assert not [*folder.glob('*.onnx')]


# ---------------------------------------------------- rounding while training
def test_rounded_values():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 2))
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    scales = InputScales({'0.0': .05, '2': .05})
    names = [name for name, _ in model.named_parameters()]
    rounding = FakeQuantization(model, scales)
    rounded = model(x)
    assert not torch.equal(rounded, expected)
    assert torch.allclose(rounded, expected, atol=.1)
    # what is read is a multiple of the step
    seen = []
    model[0][0].register_forward_hook(
        lambda m, args, y: seen.append((args[0], m.weight)))
    model(x).sum().backward()
    steps = seen[0][0] / .05
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert [name for name, _ in model.named_parameters()] == names
    assert model[0][0].weight is model[0][0]._parameters['weight']
    assert model[0][0].weight.grad.abs().sum() > 0
    rounding.remove()
    model.train()
    assert torch.equal(model(x), expected)


def test_folding_a_normalisation_changes_no_rounding():
    from torch.nn.utils import fuse_conv_bn_eval
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    nn.init.uniform_(norm.running_var, .5, 2)
    model = nn.Sequential(conv, norm).eval()
    folded = nn.Sequential(fuse_conv_bn_eval(conv, norm))
    scales = InputScales({'0': .05})
    x = torch.randn(2, 3, 8, 8)
    FakeQuantization(model, scales), FakeQuantization(folded, scales)
    assert torch.allclose(model(x), folded(x), atol=1e-5)


def test_failing_layers_are_left_as_they_were():
    model = nn.Sequential(nn.Linear(4, 2))
    FakeQuantization(model, InputScales({'0': .1}))
    with pytest.raises(RuntimeError):
        model(torch.rand(2, 3))
    assert model[0].weight is model[0]._parameters['weight']


@pytest.mark.parametrize('data', [
    dict(version=2, layers={}), dict(version=1), [1],
    dict(version=1, layers=dict(a='b')), dict(version=1, layers=dict(a=-1.)),
    dict(version=1, layers=dict(a=float('nan')))])
def test_scales_of_a_damaged_file(data):
    with pytest.raises(ValueError, match=INT8_KEY):
        InputScales.of(dict(meta={INT8_KEY: data}))
    assert InputScales.of(dict(state_dict={})) is None


def test_scales_of_another_model():
    with pytest.raises(ValueError, match='of another model.*other'):
        FakeQuantization(nn.Linear(2, 2), InputScales(dict(other=1.)))
