# Copyright (c) mmbasis authors. All rights reserved.
"""Wrong graphs are told from the right one, whatever is wrong."""
import numpy as np
import onnx
import pytest
import torch
from onnx.numpy_helper import from_array, to_array

from mmbasis.deploy import Deployment, check_weights, compare
from mmbasis.deploy.compare import difference, find_candidates, is_close

CLS = 'classification_onnxruntime_static-32x32'
CUT = 'detection_onnxruntime_before-nms_static-320x320'


class Right:
    """A deployment, its right graph, and images."""

    def __init__(self, found, deploy_cfg, images, folder):
        self.found, self.images, self.folder = found, images[:1], folder
        self.deploy_cfg = deploy_cfg
        self.deployment = Deployment(deploy_cfg, found.config,
                                     found.checkpoint)
        self.file, = self.deployment.export(images[0], str(folder))

    def agrees(self, path):
        result, = compare(self.deployment, [path], self.images)
        return result['agrees']

    def edited(self, edit):
        """The graph after ``edit(graph, weights)`` with its initializers."""
        model = onnx.load(self.file)
        graph = model.graph
        weights = {x.name: to_array(x).copy() for x in graph.initializer}
        edit(graph, weights)
        del graph.initializer[:]
        graph.initializer.extend(from_array(v, k) for k, v in weights.items())
        path = str(self.folder / 'wrong.onnx')
        onnx.save(model, path)
        return path


@pytest.fixture(scope='module')
def right_classifier(classifier, repo_root, image_paths, tmp_path_factory):
    from mmengine.config import Config
    cfg = Config.fromfile(str(repo_root / f'configs/deploy/{CLS}.py'))
    return Right(classifier, cfg, image_paths,
                 tmp_path_factory.mktemp('right'))


@pytest.fixture(scope='module')
def right_detector(make_detector, repo_root, detector_images,
                   tmp_path_factory):
    from mmengine.config import Config
    cfg = Config.fromfile(str(repo_root / f'configs/deploy/{CUT}.py'))
    cfg.onnx_config.input_shape = (64, 64)
    found = make_detector('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 64,
                          **{'model.bbox_head.num_classes': 3})
    return Right(found, cfg, detector_images, tmp_path_factory.mktemp('right'))


def convs(graph):
    """Bases in the middle of the network."""
    found = [x for x in graph.node if x.op_type == 'Conv'
             and x.input[1].endswith('basis.weight')]
    return found[len(found) // 3:]


def scaled(graph, weights):
    weights[convs(graph)[0].input[1]] *= 1.02


def without_bias(graph, weights):
    # those in front are the strongest
    node = next(x for x in graph.node if x.op_type == 'Conv'
                and len(x.input) > 2)
    weights[node.input[2]][:] = 0


def swapped_channels(graph, weights):
    weight = weights[convs(graph)[0].input[1]]
    weight[[0, 1]] = weight[[1, 0]]


def another_seed(graph, weights):
    random = np.random.RandomState(3)
    for node in convs(graph):
        weight = weights[node.input[1]]
        weights[node.input[1]] = random.normal(
            0, weight.std(), weight.shape).astype(weight.dtype)


def without_activation(graph, weights):
    node = [x for x in graph.node if x.op_type == 'Relu'][2]
    node.op_type = 'Identity'


def shifted_padding(graph, weights):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == 'pads' and [*attribute.ints] == [1] * 4:
                attribute.ints[:] = [0, 0, 2, 2]
                return
    raise AssertionError('no padded convolution')


def images_as_they_are(graph, weights):
    """Mean and standard deviation applied once more."""
    weights['mean'] = np.full((1, 3, 1, 1), .5, np.float32)
    name = graph.input[0].name
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = 'normalised'
    graph.node.insert(0, onnx.helper.make_node('Sub', [name, 'mean'],
                                               ['normalised']))


def blue_for_red(graph, weights):
    node = next(x for x in graph.node if x.op_type == 'Conv')
    weights[node.input[1]] = weights[node.input[1]][:, ::-1].copy()


def permuted_labels(graph, weights):
    """Rows of the last layer before the scores."""
    for node in reversed(graph.node):
        if node.op_type in ('Gemm', 'Conv') and (
                node.op_type == 'Gemm' or 'retina_cls' in node.name):
            for name in node.input[1:]:
                weights[name] = weights[name][::-1].copy()
            return
    raise AssertionError('no last layer')


def zeroed(graph, weights):
    weights[convs(graph)[1].input[1]][:] = 0


EDITS = [scaled, without_bias, swapped_channels, another_seed,
         without_activation, shifted_padding, images_as_they_are,
         blue_for_red, permuted_labels, zeroed]


def test_the_right_classifier(right_classifier):
    assert right_classifier.agrees(right_classifier.file)
    assert right_classifier.agrees(
        right_classifier.edited(lambda graph, weights: None))


@pytest.mark.parametrize('edit', EDITS, ids=lambda x: x.__name__)
def test_wrong_classifiers(right_classifier, edit):
    assert not right_classifier.agrees(right_classifier.edited(edit))


def test_the_right_detector(right_detector):
    assert right_detector.agrees(
        right_detector.edited(lambda graph, weights: None))


@pytest.mark.parametrize('edit', EDITS, ids=lambda x: x.__name__)
def test_wrong_detectors(right_detector, edit):
    assert not right_detector.agrees(right_detector.edited(edit))


def test_nothing_compared_is_a_failure(right_detector, monkeypatch):
    """No box passes the threshold."""
    head = right_detector.deployment.model.bbox_head
    monkeypatch.setitem(head.test_cfg, 'score_thr', 2.)
    result, = compare(right_detector.deployment, [right_detector.file],
                      right_detector.images)
    assert not result['agrees'] and 'no box was compared' in result['reason']
    assert is_close(result['bbox_head'])


@pytest.fixture(scope='module')
def dense_file(right_classifier, classifier, image_paths, tmp_path_factory):
    dense = Deployment(right_classifier.deploy_cfg, classifier.dense_cfg,
                       classifier.dense_checkpoint)
    return dense.export(image_paths[0], str(tmp_path_factory.mktemp('d')))[0]


def test_the_dense_graph(right_classifier, dense_file):
    """It has all layers of the compressed one, of the same input and output,
    and nearly its function."""
    assert not right_classifier.agrees(dense_file)
    with pytest.raises(RuntimeError, match='does not hold the basis layer b'):
        check_weights(right_classifier.deployment, [dense_file])


def test_weights_of_the_right_graph(right_classifier):
    found = check_weights(right_classifier.deployment, [right_classifier.file])
    model = right_classifier.deployment.model
    planned = sum(x.numel() for m in model.modules() if hasattr(m, 'parts')
                  for x in m.weights)
    assert found['planned'] == planned and found['unused'] == []
    # normalizations are folded, which leaves one bias of two
    params = sum(x.numel() for x in model.parameters())
    assert found['params'] == pytest.approx(params, rel=.1)


@pytest.mark.parametrize('edit', [scaled, swapped_channels, zeroed],
                         ids=lambda x: x.__name__)
def test_weights_of_wrong_graphs(right_classifier, edit):
    """They have the right shapes."""
    with pytest.raises(RuntimeError, match='does not hold the basis layer b'):
        check_weights(right_classifier.deployment,
                      [right_classifier.edited(edit)])


def test_a_graph_without_raw_outputs(right_classifier):
    model = onnx.load(right_classifier.file)
    del model.metadata_props[:]
    path = str(right_classifier.folder / 'plain.onnx')
    onnx.save(model, path)
    with pytest.raises(RuntimeError, match='no raw output to compare'):
        right_classifier.agrees(path)


def test_differences_are_relative():
    theirs = torch.tensor([100., 100.1, 100.2])
    found = difference(theirs + torch.tensor([0, 0, .001]), theirs)
    assert found['values'] == 3
    assert found['largest'] == pytest.approx(.005, rel=.1)
    # next to the norm it would be nothing
    assert found['relative'] < 1e-5 and not is_close(found)
    assert not is_close(difference(theirs + torch.nan, theirs))
    assert not is_close(difference(theirs[:2], theirs))
    assert is_close(difference(theirs * 0, theirs * 0))


def test_detections_among_candidates():
    boxes = torch.tensor([[0., 0, 9, 9], [5, 5, 20, 20]])
    scores = torch.tensor([[.9, .1], [.2, .7]])
    detections = boxes + .2, torch.tensor([.9, .7]), torch.tensor([0, 1])
    found = find_candidates(boxes, scores, detections)
    assert found['compared'] == 2 and found['unmatched'] == 0
    assert found['pixels'] == pytest.approx(.2, rel=1e-3)
    wrong = detections[0], detections[1], torch.tensor([1, 1])
    assert find_candidates(boxes, scores, wrong)['unmatched'] == 1
