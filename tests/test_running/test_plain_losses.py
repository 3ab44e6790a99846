# Copyright (c) mmbasis authors. All rights reserved.
"""The losses of plain PyTorch models: detectors that take targets in training
alone, segmentors, and what has none."""
from collections import OrderedDict

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import mmbasis
from mmbasis.running import UnknownLossError, adapter_of

X = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASKS = (X.mean(1) > .5).long()
BUDGET = dict(type='BudgetPlanner', macs=.5, loss_aware=True, round_to=1)


class Detector(nn.Module):
    """As torchvision's: losses by name in training, detections otherwise."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 16, 3, padding=1)
        self.neck = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, images, targets=None):
        y = self.head(self.neck(self.body(images).relu()).relu())
        if not self.training:
            return [dict(boxes=x.detach()) for x in y]
        assert targets is not None, 'targets should not be none'
        wanted = torch.stack([x['map'] for x in targets])
        return dict(loss_a=(y[:, 0] - wanted).abs().mean(),
                    loss_b=y[:, 1].square().mean())


def targets_of(masks):
    return [dict(map=x.double()) for x in masks]  # moved to the precision


def test_losses_by_name_are_summed_with_targets():
    model = Detector()
    found = adapter_of(model).loss((X, targets_of(MASKS)))
    wanted = model(X, [dict(map=x.float()) for x in MASKS])
    assert torch.equal(found, wanted['loss_a'] + wanted['loss_b'])
    # a dict names them
    same = adapter_of(model).loss(
        dict(images=X, targets=[dict(map=x.float()) for x in MASKS]))
    assert torch.equal(same, found)


def test_detector_is_compressed_by_its_loss():
    torch.manual_seed(0)
    model = Detector().eval()
    plan = mmbasis.compress(model, BUDGET, [(X, targets_of(MASKS))])
    totals = plan.totals()['macs']
    assert totals['after'] <= .5 * totals['before']
    assert plan.dense['head'].reason == 'prediction layer'
    assert not model.training


def test_missing_targets_are_named():
    model = Detector()
    with pytest.raises(UnknownLossError, match=r'(?s)Detector cannot be '
                       r'trained without targets .*\(inputs, targets\)'):
        mmbasis.compress(model, BUDGET, [X])
    # by default energies count instead
    plan = mmbasis.compress(
        model, dict(type='BudgetPlanner', macs=.5, round_to=1), [X])
    assert plan.layers


def test_errors_of_a_model_with_targets_are_its_own():
    with pytest.raises(KeyError, match='map'):
        adapter_of(Detector()).loss((X, [dict(boxes=X)] * 4))


class Segmentor(nn.Module):

    def __init__(self, wrap):
        super().__init__()
        self.body = nn.Conv2d(3, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 2, 1)
        self.wrap = wrap

    def forward(self, x, scale=1.):
        assert scale == 1  # never a mask
        return self.wrap(self.last(self.body(x).relu()))


@pytest.mark.parametrize('wrap', [
    lambda y: y,
    lambda y: OrderedDict(out=y, aux=2 * y),
    lambda y: (y, y.mean()),
], ids=['tensor', 'ordered dict', 'tuple'])
@pytest.mark.parametrize('training', [True, False])
def test_masks_of_classes(wrap, training):
    torch.manual_seed(0)
    model = Segmentor(wrap).train(training)
    masks = MASKS.clone()
    masks[:, :4] = 255  # nothing is known there
    y = model.last(model.body(X).relu())
    wanted = F.cross_entropy(y[:, :, 4:], MASKS[:, 4:])
    found = adapter_of(model).loss((X, masks))
    torch.testing.assert_close(found, wanted)
    plan = mmbasis.compress(model, dict(BUDGET, prediction_layers=True),
                            [(X, masks)])
    assert plan.layers


def test_masks_of_another_size_are_none():
    with pytest.raises(UnknownLossError, match='scores of shape'):
        adapter_of(Segmentor(lambda y: y)).loss((X, MASKS[:, :4]))


DETECTORS = ['fasterrcnn_mobilenet_v3_large_320_fpn',
             'ssdlite320_mobilenet_v3_large']


@pytest.mark.parametrize('name', DETECTORS)
def test_detectors_of_torchvision(name, torchvision_ops):
    detection = torchvision_ops.models.detection
    torch.manual_seed(0)
    options = dict(min_size=64, max_size=96) if 'rcnn' in name else {}
    model = getattr(detection, name)(
        weights=None, weights_backbone=None, num_classes=4, **options)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 80)]
    boxes = torch.tensor([[5., 5, 40, 40], [20, 10, 60, 50]])
    data = images, 2 * [dict(boxes=boxes, labels=torch.tensor([1, 3]))]
    plan = mmbasis.compress(
        model, dict(BUDGET, forms=['output']), [data],
        reconstruction='local')
    totals = plan.totals()['macs']
    assert totals['after'] <= .5 * totals['before'] and plan.layers
    predictions = {k for k, x in plan.dense.items()
                   if x.reason == 'prediction layer'}
    assert predictions and all('head' in x or 'predictor' in x
                               for x in predictions)
    losses = model.train()(*data)
    assert all(x.isfinite() for x in losses.values())
    assert len(model.eval()(images)) == 2
