# Copyright (c) mmbasis authors. All rights reserved.
import pytest
from mmengine.config import Config

from mmbasis.utils.runner import _with_pipeline, calibration_dataloader
from tests.toy import ToyImages  # noqa: F401

TEST = [dict(type='Resize')]


@pytest.mark.parametrize(
    'dataset, expected', [
        (dict(type='A', pipeline=[]), dict(type='A', pipeline=TEST)),
        (dict(type='Repeat', times=3, dataset=dict(type='A', pipeline=[])),
         dict(type='Repeat', times=3, dataset=dict(type='A', pipeline=TEST))),
        (dict(
            type='Concat',
            datasets=[
                dict(type='A', pipeline=[]),
                dict(type='B', pipeline=[])
            ]),
         dict(
             type='Concat',
             datasets=[
                 dict(type='A', pipeline=TEST),
                 dict(type='B', pipeline=TEST)
             ])),
        (dict(
            type='MultiImageMixDataset',
            dataset=dict(type='A', pipeline=[]),
            pipeline=[dict(type='Mosaic')]), dict(type='A', pipeline=TEST)),
    ],
    ids=lambda d: d['type'])
def test_transforms_of_testing(dataset, expected):
    assert _with_pipeline(dataset, TEST) == expected


def test_annotations_are_loaded_before_the_image_is_resized():
    image, boxes, resize = (
        dict(type=name)
        for name in ('LoadImageFromFile', 'LoadAnnotations', 'Resize'))
    train = dict(type='A', pipeline=[image, boxes, dict(type='Flip')])
    for test in ([image, resize, boxes], [image, resize]):
        made = _with_pipeline(dict(train), test)
        assert made['pipeline'] == [image, boxes, resize]


def test_training_images_in_an_order_of_their_own():
    loader = dict(
        batch_size=4,
        num_workers=0,
        dataset=dict(type='ToyImages'),
        sampler=dict(type='InfiniteSampler'),
        collate_fn=dict(type='default_collate'))
    cfg = Config(dict(train_dataloader=loader))
    a, b = (list(calibration_dataloader(cfg, 0)) for _ in range(2))
    assert len(a) == 8
    labels = [x['data_samples'].tolist() for x in a]
    assert labels == [x['data_samples'].tolist() for x in b]
    assert labels != sorted(labels)
    assert cfg.train_dataloader.sampler.type == 'InfiniteSampler'
    with pytest.raises(KeyError, match='train_dataloader'):
        calibration_dataloader(Config(dict(model={})), 0)
