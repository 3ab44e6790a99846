# Copyright (c) mmbasis authors. All rights reserved.
import pytest
import torch
from mmengine.hub import get_config
from mmengine.registry import MODELS, init_default_scope

from mmbasis.quirks import repair


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
    yield
    init_default_scope('mmengine')


def test_ssd_head():
    config = get_config('mmdet::ssd/ssd300_coco.py').model
    config.backbone.init_cfg = None
    model = MODELS.build(config).eval()
    batch = model.data_preprocessor(
        dict(
            inputs=[torch.zeros(3, 300, 300, dtype=torch.uint8)],
            data_samples=[sample()]))
    with torch.no_grad():
        with pytest.raises(AttributeError, match='loss_cls'):
            model(**batch, mode='predict')
        assert repair(model) is model
        assert len(model(**batch, mode='predict')) == 1
    assert repair(model).bbox_head.loss_cls is None


def sample():
    from mmdet.structures import DetDataSample
    return DetDataSample(
        metainfo=dict(
            img_shape=(300, 300),
            ori_shape=(300, 300),
            scale_factor=(1., 1.),
            img_id=0))


def test_other_models_stay_as_they_are():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    before = dict(vars(model[0]))
    repair(model)
    assert vars(model[0]) == before
