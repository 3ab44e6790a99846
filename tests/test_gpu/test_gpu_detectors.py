# Copyright (c) mmbasis authors. All rights reserved.
"""Detectors, whose predictions go through NMS on the device."""
import pytest
import torch
import torch.nn as nn

import mmbasis
from mmbasis.compression import basis_layers

pytestmark = pytest.mark.gpu

BUDGET = dict(type='BudgetPlanner', macs=.5)


def images_on(device, count=2, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator).to(device)


def test_detector_of_torchvision(device, torchvision_ops):
    detection = torchvision_ops.models.detection
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1))
    backbone.out_channels = 32
    anchors = detection.anchor_utils.AnchorGenerator(
        ((16, 32), ), ((1., ), ))
    net = detection.RetinaNet(
        backbone, 3, 64, 64, anchor_generator=anchors, score_thresh=0.,
        detections_per_img=7).to(device).eval()
    # in training it wants targets, which a batch of images has not
    planner = dict(BUDGET, loss_aware=False)
    plan = mmbasis.compress(net, planner, [images_on(device)])
    totals = plan.totals()['macs']
    assert totals['after'] <= .5 * totals['before']
    assert {x.device for x in net.parameters()} == {device}
    with torch.no_grad():
        found = net(list(images_on(device)))
    for one in found:
        assert len(one['boxes']) == 7
        assert {x.device for x in one.values()} == {device}
        assert one['boxes'].isfinite().all()


@pytest.mark.slow  # on a CPU, tests/test_tools/test_detector.py is enough
def test_detector_of_mmdet(tmp_path, device):
    """Its own config, training loss and NMS, where MMDetection is."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmcv.ops')
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.utils import register_all_modules
    from mmengine.hub import get_config
    from mmengine.structures import InstanceData
    register_all_modules()
    cfg = get_config('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py')
    cfg.model.backbone.init_cfg = None
    cfg.model.bbox_head.num_classes = 3
    cfg.model.test_cfg.score_thr = 0.
    cfg.model.data_preprocessor.batch_augments = None
    net = MODELS.build(cfg.model).to(device).eval()

    def sample():
        found = DetDataSample(metainfo=dict(
            img_shape=(64, 64), ori_shape=(64, 64), pad_shape=(64, 64),
            batch_input_shape=(64, 64), scale_factor=(1., 1.)))
        found.gt_instances = InstanceData(
            bboxes=torch.tensor([[8., 8., 40., 48.]]),
            labels=torch.tensor([1]))
        return found

    # as a data loader yields them, on the CPU
    batch = dict(inputs=list(255 * images_on('cpu')),
                 data_samples=[sample(), sample()])
    plan = mmbasis.compress(net, BUDGET, [batch])
    assert len(dict(basis_layers(net))) == len(plan.layers) > 10
    with torch.no_grad():
        found = net.test_step(batch)
    for one in found:
        boxes = one.pred_instances.bboxes
        assert boxes.device == device and len(boxes)
        assert boxes.isfinite().all()
