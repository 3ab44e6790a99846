# Copyright (c) mmbasis authors. All rights reserved.
"""Export through MMDeploy and what comes out of it."""
import os
import tarfile

import onnx
import pytest
import torch

from mmbasis.compression import read_checkpoint
from mmbasis.deploy import (
    Deployment,
    check_tensorrt,
    check_weights,
    compare,
    evaluate_onnx,
    match_boxes,
    open_onnx,
)
from mmbasis.deploy.compare import is_close
from mmbasis.utils import load_config
from mmbasis.utils.runner import evaluate

CLS = 'classification_onnxruntime'
DET = 'detection_onnxruntime'
CUT = 'detection-before-nms_onnxruntime'
PLAIN = 'detection-before-nms_tensorrt'


def operators(path):
    return {node.op_type for node in onnx.load(path).graph.node}


# -------------------------------------------------------------- classifiers
@pytest.fixture(scope='module')
def exported(classifier, repo_root, image_paths, tmp_path_factory):
    """A deployment and its ONNX file."""
    deployment = Deployment(
        str(repo_root / f'configs/deploy/{CLS}.py'), classifier.config,
        classifier.checkpoint)
    folder = str(tmp_path_factory.mktemp('onnx'))
    return deployment, deployment.export(image_paths[0], folder)


def test_classifier_agrees_and_is_folded(exported, classifier, image_paths,
                                         assert_builds):
    deployment, files = exported
    assert classifier.plan.norm
    for result in compare(deployment, files, image_paths[:3]):
        assert result['agrees'] and result['top1']
        assert result['head']['values'] == 2
        assert is_close(result['head']) and is_close(result['scores'])
    assert 'BatchNormalization' not in operators(files[0])
    assert_builds(files[0])


def test_file_is_as_small_as_its_parameters(exported):
    deployment, files = exported
    params = sum(p.numel() for p in deployment.model.parameters())
    assert os.path.getsize(files[0]) == pytest.approx(4 * params, rel=.15)


def test_mmdeploys_own_api_takes_the_config(classifier, deploy_cfg,
                                            image_paths, tmp_path):
    from mmdeploy.apis import build_task_processor, torch2onnx
    cfg = load_config(classifier.config)
    torch2onnx(image_paths[0], str(tmp_path), 'end2end.onnx', deploy_cfg(CLS),
               cfg, classifier.checkpoint, 'cpu')
    task = build_task_processor(cfg, deploy_cfg(CLS), 'cpu')
    model = task.build_pytorch_model(classifier.checkpoint)
    # the bare class, nothing of the wrapper, nothing in the middle
    assert type(model).__name__ == 'ImageClassifier'
    assert not any(k.startswith('architecture') for k in model.state_dict())
    assert all(m.norm is None for m in model.modules() if hasattr(m, 'basis'))
    open_onnx(str(tmp_path / 'end2end.onnx'))


def test_evaluator_of_mmdeploy_equals_the_runner(exported, tmp_path):
    deployment, files = exported
    metrics = evaluate_onnx(deployment, files, str(tmp_path))
    cfg = deployment.model_cfg.copy()
    cfg.work_dir = str(tmp_path)
    assert metrics == pytest.approx(evaluate(cfg, deployment.model))
    assert 'accuracy/top1' in metrics


def test_dynamic_shapes(classifier, deploy_cfg, image_paths, tmp_path,
                        assert_builds):
    deployment = Deployment(
        deploy_cfg(CLS, dynamic=True), classifier.config,
        classifier.checkpoint)
    files = deployment.export(image_paths[0], str(tmp_path))
    session = open_onnx(files[0])
    x = torch.randn(3, 3, 48, 40)
    with torch.no_grad():
        theirs = deployment.model(x, mode='tensor').softmax(1)
    ours, = session.run(None, {'input': x.numpy()})
    assert torch.allclose(torch.from_numpy(ours), theirs, atol=1e-5)
    assert_builds(files[0])


# ---------------------------------------------------------------- detectors
@pytest.fixture(scope='module')
def retinanet(make_detector):
    return make_detector('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 160,
                         **{'model.bbox_head.num_classes': 3})


def test_one_stage_detector(retinanet, deploy_cfg, detector_images, tmp_path,
                            assert_builds):
    """Before and after non-maximum suppression."""
    whole = Deployment(
        deploy_cfg(DET, 160), retinanet.config, retinanet.checkpoint)
    files = whole.export(detector_images[0], str(tmp_path))
    results = compare(whole, files, detector_images)
    assert all(x['agrees'] for x in results), results
    assert sum(x['boxes']['compared'] for x in results) > 20
    assert_builds(files[0])

    cut = Deployment(
        deploy_cfg(CUT, 160), retinanet.config, retinanet.checkpoint)
    files = cut.export(detector_images[0], str(tmp_path))
    assert [os.path.basename(x) for x in files] == ['partition0.onnx']
    assert 'NonMaxSuppression' not in operators(files[0])
    for result in compare(cut, files, detector_images):
        assert result['agrees'] and result['boxes']['compared'] > 0
        assert result['bbox_head']['largest'] < 1e-4
    assert_builds(files[0])


def test_tensorrt_without_plugins(retinanet, deploy_cfg, detector_images,
                                  tmp_path, assert_builds):
    name = 'detection-before-nms_tensorrt'
    deployment = Deployment(
        deploy_cfg(name, 160), retinanet.config, retinanet.checkpoint)
    files = deployment.export(detector_images[0], str(tmp_path))
    assert check_tensorrt(files[0]) == {'8.5': [], '10': []}
    assert_builds(files[0])
    # a standard graph, so ONNX Runtime can vouch for it
    assert all(x['agrees']
               for x in compare(deployment, files, detector_images))


def test_tensorrt_with_plugin_is_named(retinanet, deploy_cfg, detector_images,
                                       tmp_path, assert_builds):
    deployment = Deployment(
        deploy_cfg('detection_tensorrt', 160), retinanet.config,
        retinanet.checkpoint)
    files = deployment.export(detector_images[0], str(tmp_path))
    assert any('mmdeploy::TRTBatchedNMS' in x
               for x in check_tensorrt(files[0])['8.5'])
    assert_builds(files[0])
    # ONNX Runtime takes the part in front of it
    for result in compare(deployment, files, detector_images):
        assert 'mmdeploy::TRTBatchedNMS' in result['skipped']
        assert result['agrees'] and result['bbox_head']['values'] > 1000


SLOW = [
    ('mmdet::ssd/ssd300_coco.py', 300),
    ('mmdet::detr/detr_r50_8xb2-150e_coco.py', 160),
    ('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py', 160),
    ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 160),
    ('mmdet::yolox/yolox_tiny_8xb8-300e_coco.py', 160),
    ('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 160),
    ('mmdet::dcnv2/faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py', 160),
]


@pytest.mark.slow
@pytest.mark.parametrize('config, size', SLOW)
def test_other_detectors(make_detector, deploy_cfg, detector_images, tmp_path,
                         config, size, assert_builds):
    found = make_detector(config, size)
    cfg = load_config(found.config)
    for name in (DET, CUT, PLAIN):
        deployment = Deployment(
            deploy_cfg(name, size, model_cfg=cfg), cfg, found.checkpoint)
        files = deployment.export(detector_images[0], str(tmp_path))
        results = compare(deployment, files, detector_images)
        assert all(x['agrees'] for x in results), results
        assert not check_weights(deployment, files)['unused']
        if name == PLAIN:
            assert {x.domain for x in onnx.load(files[0]).graph.node} == {''}
        for path in files:
            assert_builds(path)


@pytest.mark.slow
def test_trained_detector(shared_data, deploy_cfg, tmp_path, assert_builds):
    """RTMDet, with the border that MMDeploy's own rewriter forgets."""
    images = []
    with tarfile.open(shared_data / 'bccd.tar.gz') as file:
        for member in file:
            if member.name.endswith('.jpg') and len(images) < 2:
                file.extract(member, tmp_path)
                images.append(str(tmp_path / member.name))
    cfg = load_config(str(shared_data / 'rtmdet_tiny_bccd.py'))
    weights = str(shared_data / 'rtmdet_tiny_bccd.pth')
    for name in (DET, CUT):
        deployment = Deployment(deploy_cfg(name, 320), cfg.copy(), weights)
        files = deployment.export(images[0], str(tmp_path))
        results = compare(deployment, files, images)
        assert all(x['agrees'] for x in results), results
        assert all(x['boxes']['compared'] > 10 for x in results)
        assert_builds(files[0])


def test_match_boxes_counts_both_directions():
    import numpy as np
    boxes = np.array([[0., 0, 10, 10], [20, 20, 40, 40], [5, 5, 9, 9]])
    ours = boxes, np.array([.9, .8, .1]), np.array([0, 1, 0])
    shifted = boxes + np.array([[.3], [0], [0]])
    result = match_boxes(ours, (shifted, *ours[1:]))
    # the lowest of a list may have been cut off in the other
    assert result['compared'] == 4 and result['unmatched'] == 0
    assert result['pixels'] == pytest.approx(.3)
    result = match_boxes(ours, (boxes[1:], ours[1][1:], ours[2][1:]))
    assert result['unmatched'] == 1
    labels = np.array([1, 1, 0])
    assert match_boxes(ours, (boxes, ours[1], labels))['unmatched'] == 2


# ---------------------------------------------------------------- bad input
@pytest.mark.parametrize('opset', [9, 18, 'new'])
def test_unsupported_opset(classifier, deploy_cfg, opset):
    cfg = deploy_cfg(CLS)
    cfg.onnx_config.opset_version = opset
    with pytest.raises(ValueError, match=f'opset_version is .*{opset}.*11 to'):
        Deployment(cfg, classifier.config, classifier.checkpoint)


def test_wrong_image_size(classifier, deploy_cfg, image_paths, tmp_path):
    deployment = Deployment(
        deploy_cfg(CLS, 224), classifier.config, classifier.checkpoint)
    with pytest.raises(ValueError, match='makes images of 32x32.*224x224'):
        deployment.export(image_paths[0], str(tmp_path))


def test_deploy_config_that_lacks_a_part(classifier, deploy_cfg):
    cfg = deploy_cfg(CLS)
    cfg.pop('backend_config')
    with pytest.raises(KeyError, match="no 'backend_config'"):
        Deployment(cfg, classifier.config, classifier.checkpoint)


def test_wrapper_checkpoint(classifier, deploy_cfg, tmp_path):
    content = read_checkpoint(classifier.checkpoint)
    content['state_dict'] = {
        f'architecture.{k}': v
        for k, v in content['state_dict'].items()
    }
    path = str(tmp_path / 'wrapper.pth')
    torch.save(content, path)
    with pytest.raises(RuntimeError, match="wrapper.*'architecture.'"):
        Deployment(deploy_cfg(CLS), classifier.config, path)


def test_dense_checkpoint_with_compressed_config(classifier, deploy_cfg):
    with pytest.raises(RuntimeError, match='dense checkpoint'):
        Deployment(
            deploy_cfg(CLS), classifier.config, classifier.dense_checkpoint)


def test_wrapper_config_without_plan(classifier, deploy_cfg):
    cfg = classifier.dense_cfg.copy()
    cfg.model = dict(type='mmbasis.BasisModel', architecture=cfg.model)
    with pytest.raises(RuntimeError, match='mmbasis.BasisModel'):
        Deployment(deploy_cfg(CLS), cfg, classifier.dense_checkpoint)


def test_dense_config_is_completed_by_the_checkpoint(classifier, deploy_cfg):
    deployment = Deployment(
        deploy_cfg(CLS), classifier.dense_cfg, classifier.checkpoint)
    assert deployment.model_cfg.model.type == 'mmbasis.ImageClassifier'


def test_static_methods_survive_mmdeploy():
    """MMDeploy's rewriter leaves them as plain functions behind."""
    import mmdeploy.codebase.mmpretrain.models  # noqa: F401
    from mmdeploy.core import FUNCTION_REWRITER, RewriterContext
    from mmdeploy.utils import IR, Backend
    from mmpretrain.models.utils import ShiftWindowMSA

    path = 'mmpretrain.models.utils.ShiftWindowMSA.get_attn_mask'
    assert path in FUNCTION_REWRITER._registry._rewrite_records
    before = vars(ShiftWindowMSA)['get_attn_mask']
    assert isinstance(before, staticmethod)
    with RewriterContext(dict(), Backend.ONNXRUNTIME.value, IR.ONNX):
        pass
    assert vars(ShiftWindowMSA)['get_attn_mask'] is before
