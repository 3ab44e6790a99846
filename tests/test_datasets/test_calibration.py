# Copyright (c) mmbasis authors. All rights reserved.
"""Annotations lie on the image that the network sees, however a config says
how images are loaded."""
import json
import random
import sys
import types

import cv2
import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform, LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import (
    LoadAnnotations,
    PackDetInputs,
    RandomFlip,
    Resize,
)
from mmengine.config import Config
from mmengine.dataset import ConcatDataset, default_collate, pseudo_collate
from mmengine.registry import (
    DATASETS,
    TRANSFORMS,
    DefaultScope,
    init_default_scope,
)
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

from mmbasis.datasets import calibration_dataloader
from tests.toy import ToyImages, ToyNet

SIZES = {1: (60, 80), 2: (100, 50), 3: (64, 64), 4: (60, 80)}  # h, w
#: x, y, w, h
BOXES = {i: [[8, 6, 20, 30], [20 + i, 16, 12, 18]] for i in SIZES}
IMAGE = dict(type='LoadImageFromFile')
ANNOTATIONS = dict(type='LoadAnnotations', with_bbox=True)
FLIP = dict(type='RandomFlip', prob=1.)
RESIZE = dict(type='Resize', scale=(160, 120), keep_ratio=True)
PACK = dict(type='PackDetInputs', meta_keys=('img_id', 'img_shape'))
TRAINING = [IMAGE, ANNOTATIONS, FLIP, dict(type='PackDetInputs')]
TESTING = [IMAGE, RESIZE, ANNOTATIONS, PACK]


@TRANSFORMS.register_module(force=True)
class MyBoxes(LoadAnnotations):
    """A subclass of another name."""


@TRANSFORMS.register_module(force=True)
class ReadTruth(BaseTransform):
    """Neither a subclass nor a name that says what it does."""

    def transform(self, results):
        boxes = [x['bbox'] for x in results['instances']]
        results['gt_bboxes'] = np.float32(boxes)
        results['gt_bboxes_labels'] = np.zeros(len(boxes), np.int64)
        return results


@TRANSFORMS.register_module(force=True)
class ImageAndTruth(LoadImageFromFile):
    """Loads both."""

    def transform(self, results):
        return ReadTruth().transform(super().transform(results))


@TRANSFORMS.register_module(force=True)
class ImageOnlyResize(BaseTransform):
    """Forgets the boxes."""

    def transform(self, results):
        results['img'] = cv2.resize(results['img'], (160, 120))
        results['img_shape'] = (120, 160)
        return results


@TRANSFORMS.register_module(force=True)
class ImageOnlyFlip(BaseTransform):
    """Forgets the boxes."""

    def transform(self, results):
        results['img'] = results['img'][:, ::-1]
        return results


@DATASETS.register_module(force=True)
class MyWrapper(Dataset):
    """A wrapper with names of its own, and transforms over a dataset."""

    def __init__(self, source, pipeline=()):
        self.source = DATASETS.build(source)
        self.pipeline = [TRANSFORMS.build(x) for x in pipeline]
        self.metainfo = self.source.metainfo

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        sample = self.source[index]
        for step in self.pipeline:
            sample = step(sample)
        return sample


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """Four images of three sizes, two boxes and masks in each."""
    folder = tmp_path_factory.mktemp('coco')
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (h, w) in SIZES.items():
        cv2.imwrite(
            str(folder / f'{i}.png'), rng.integers(0, 255, (h, w, 3),
                                                   np.uint8))
        cv2.imwrite(str(folder / f'{i}_seg.png'), np.zeros((h, w), np.uint8))
        images.append(dict(id=i, file_name=f'{i}.png', height=h, width=w))
        for x, y, bw, bh in BOXES[i]:
            corners = [x, y, x + bw, y, x + bw, y + bh, x, y + bh]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i,
                    category_id=1,
                    bbox=[x, y, bw, bh],
                    area=bw * bh,
                    iscrowd=0,
                    segmentation=[corners]))
    (folder / 'coco.json').write_text(
        json.dumps(
            dict(
                images=images,
                annotations=annotations,
                categories=[dict(id=1, name='thing')])))
    return folder


@pytest.fixture(autouse=True)
def scope():
    init_default_scope('mmdet')
    yield
    init_default_scope('mmengine')


def dataset(folder, pipeline, **kwargs):
    return dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='coco.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=('thing', )),
        pipeline=pipeline,
        **kwargs)


def config(train, test=None, val=None, **kwargs):
    loaders = dict(train=train, val=val, test=test)
    return Config(
        {
            f'{k}_dataloader': dict(
                dict(
                    batch_size=2,
                    num_workers=0,
                    dataset=v,
                    sampler=dict(type='DefaultSampler')), **kwargs)
            for k, v in loaders.items() if v is not None
        })


def check(source, count=4, masks=False):
    """Each box is the original times the scale of the image; the samples."""
    samples = []
    for batch in calibration_dataloader(source, 0):
        for image, sample in zip(batch['inputs'], batch['data_samples']):
            height, width = SIZES[sample.img_id]
            scale = torch.tensor(
                [image.shape[2] / width, image.shape[1] / height] * 2)
            assert max(image.shape[1:]) > 110  # scaled, as in testing
            boxes = torch.tensor(BOXES[sample.img_id]).float()
            boxes[:, 2:] += boxes[:, :2]
            found = sample.gt_instances.bboxes
            found = getattr(found, 'tensor', found)
            torch.testing.assert_close(found, boxes * scale)
            if masks:
                assert_masks(sample.gt_instances.masks, found, image)
            samples.append(sample)
    assert len(samples) == count
    return samples


def assert_masks(masks, boxes, image):
    assert (masks.height, masks.width) == image.shape[1:]
    for mask, box in zip(masks.to_ndarray(), boxes):
        y, x = mask.nonzero()
        extent = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert np.abs(np.subtract(extent, box.numpy())).max() <= 3


MASKED = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
LOADERS = {
    'as a class': dict(type=LoadAnnotations, with_bbox=True),
    'scope': dict(type='mmdet.LoadAnnotations', with_bbox=True),
    'path': dict(type='mmdet.datasets.transforms.LoadAnnotations'),
    'subclass': dict(type='MyBoxes'),
    'own': dict(type='ReadTruth'),
    'own class': dict(type=ReadTruth),
    'tracking': dict(type='MyTrack'),
    'panoptic': dict(
        type='LoadPanopticAnnotations', with_mask=False, with_seg=False),
    'composed': dict(type='Compose', transforms=[ANNOTATIONS]),
    'chosen': dict(type='RandomChoice', transforms=[[ANNOTATIONS]]),
    'mapped': dict(type='KeyMapper', transforms=[ANNOTATIONS]),
}


@pytest.fixture
def panopticapi(monkeypatch):
    """What LoadPanopticAnnotations imports, which is on no index."""
    module = types.ModuleType('panopticapi')
    module.utils = types.ModuleType('panopticapi.utils')
    module.utils.rgb2id = None
    monkeypatch.setitem(sys.modules, 'panopticapi', module)
    monkeypatch.setitem(sys.modules, 'panopticapi.utils', module.utils)


@pytest.mark.parametrize('where', ['both', 'training', 'testing first'])
@pytest.mark.parametrize('name', list(LOADERS))
def test_loader(coco, panopticapi, name, where):
    loader = LOADERS[name]
    testing = [IMAGE, RESIZE, PACK]
    if where == 'both':
        testing.insert(2, loader)
    elif where == 'testing first':
        testing[1:1] = [loader]
    check(
        config(
            dataset(coco, [IMAGE, loader, FLIP, PACK]),
            dataset(coco, testing, test_mode=True)))


@TRANSFORMS.register_module(force=True)
class MyTrack(TRANSFORMS.get('mmdet.LoadTrackAnnotations')):
    """MMDetection's for videos, where instances have numbers."""

    def transform(self, results):
        for i, instance in enumerate(results['instances']):
            instance['instance_id'] = i
        return super().transform(results)


def test_loads_image_and_annotations_at_once(coco):
    both = dict(type='ImageAndTruth')
    for testing in ([IMAGE, RESIZE, PACK], [both, RESIZE, PACK],
                    [both, RESIZE, ANNOTATIONS, PACK]):
        check(
            config(dataset(coco, [both, FLIP, PACK]), dataset(coco, testing)))


def test_several_loaders_and_masks(coco):
    masks = dict(type='LoadAnnotations', with_bbox=False, with_mask=True)
    for loaders in ([MASKED], [ANNOTATIONS, masks]):
        check(
            config(
                dataset(coco, [IMAGE, *loaders, FLIP, PACK]),
                dataset(coco, TESTING)),
            masks=True)


def test_segmentation_maps_are_scaled(coco):
    seg = dict(type='LoadAnnotations', with_seg=True)
    parts = [
        dict(
            dataset(coco, [IMAGE, *steps]),
            data_prefix=dict(img='', seg=''),
            seg_map_suffix='_seg.png')
        for steps in ([seg, FLIP, PACK], [RESIZE, seg, PACK])
    ]
    for batch in calibration_dataloader(config(*parts), 0):
        for image, sample in zip(batch['inputs'], batch['data_samples']):
            assert sample.gt_sem_seg.shape == image.shape[1:]
    check(config(*parts))


def test_empty_annotations_of_testing_do_not_count(coco):
    empty = dict(type='LoadEmptyAnnotations')
    check(
        config(
            dataset(coco, TRAINING), dataset(coco, [IMAGE, RESIZE, empty,
                                                    PACK])))


def test_filters_stay(coco):
    keep = dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1))
    check(
        config(
            dataset(coco, [IMAGE, ANNOTATIONS, keep, FLIP, PACK]),
            dataset(coco, [IMAGE, RESIZE, ANNOTATIONS, keep, PACK])))


def test_images_that_are_padded_all_around(coco):
    """As CornerNet and CenterNet see them in testing."""
    pad = dict(
        type='RandomCenterCropPad',
        ratios=None,
        border=None,
        mean=[0, 0, 0],
        std=[1, 1, 1],
        to_rgb=True,
        test_mode=True,
        test_pad_mode=['logical_or', 127])
    pack = dict(PACK, meta_keys=('img_id', 'img_shape', 'border'))
    image = dict(IMAGE, to_float32=True)
    loader = calibration_dataloader(
        config(
            dataset(coco, TRAINING),
            dataset(coco, [image, pad, ANNOTATIONS, pack])), 0)
    for batch in loader:
        for sample in batch['data_samples']:
            boxes = sample.gt_instances.bboxes.tensor[:, :2]
            place = boxes - torch.tensor(BOXES[sample.img_id])[:, :2]
            assert (place > 10).all()
            top, _, left, _ = sample.border
            assert (place == torch.tensor([left, top])).all()


def test_inferencer_loader(coco):
    testing = [dict(type='InferencerLoader'), RESIZE, PACK]
    check(config(dataset(coco, TRAINING), dataset(coco, testing)))


def test_other_ways_to_read_images(coco):
    check(
        config(
            dataset(coco, TRAINING),
            dataset(coco, [dict(type=LoadImageFromFile), *TESTING[1:]])))


@pytest.mark.parametrize('wrap', [
    lambda d: dict(type='ConcatDataset', datasets=[d]),
    lambda d: dict(type='RepeatDataset', times=1, dataset=d),
    lambda d: dict(type=ConcatDataset, datasets=[d]),
    lambda d: dict(type='MyWrapper', source=d),
    lambda d: dict(
        type='MyWrapper',
        source=dict(type='RepeatDataset', times=1, dataset=d)),
])
@pytest.mark.parametrize('split', ['train', 'test', 'val'])
def test_wrapped_datasets(coco, wrap, split):
    parts = dict(train=dataset(coco, TRAINING), test=dataset(coco, TESTING))
    if split == 'val':
        parts['val'] = parts.pop('test')
    parts[split] = wrap(parts[split])
    check(config(**parts))


def test_parts_with_transforms_of_their_own(coco):
    train = dict(
        type='ConcatDataset',
        datasets=[
            dataset(coco, TRAINING),
            dataset(coco, [IMAGE, dict(type='ReadTruth'), PACK]),
            dict(
                type='ClassBalancedDataset',
                oversample_thr=.1,
                dataset=dataset(coco, [IMAGE, MASKED, FLIP, PACK]))
        ])
    samples = check(config(train, dataset(coco, TESTING)), 12)
    assert sum('masks' in x.gt_instances for x in samples) == 4


def test_images_are_not_mixed(coco):
    mix = [
        dict(type='Mosaic', img_scale=(160, 120)),
        dict(type='RandomFlip', prob=1.), PACK
    ]
    loads = [IMAGE, ANNOTATIONS]
    for train in (dict(
            type='MultiImageMixDataset',
            dataset=dataset(coco, loads),
            pipeline=mix),
                  dict(
                      type='MyWrapper',
                      source=dataset(coco, loads),
                      pipeline=[dict(type='RandomFlip', prob=1.), PACK]),
                  dict(
                      type='RepeatDataset',
                      times=1,
                      dataset=dataset(coco, loads + mix))):
        check(config(train, dataset(coco, TESTING)))


def test_augmentation_in_testing(coco):
    tta = dict(
        type='TestTimeAug',
        transforms=[[RESIZE, dict(RESIZE, scale=(320, 240))],
                    [dict(type='RandomFlip', prob=0.)], [ANNOTATIONS], [PACK]])
    check(config(dataset(coco, TRAINING), dataset(coco, [IMAGE, tta])))


def test_padding_of_testing(coco):
    pad = dict(type='Pad', size=(170, 170), pad_val=dict(img=(114, ) * 3))
    cfg = config(
        dataset(coco, [IMAGE, MASKED, FLIP, PACK]),
        dataset(coco, [IMAGE, RESIZE, pad, ANNOTATIONS, PACK]))
    for batch in calibration_dataloader(cfg, 0):
        for image, sample in zip(batch['inputs'], batch['data_samples']):
            assert image.shape == (3, 170, 170)
            height, width = SIZES[sample.img_id]
            scale = min(160 / max(height, width), 120 / min(height, width))
            x, y, w, h = BOXES[sample.img_id][0]
            np.testing.assert_allclose(
                sample.gt_instances.bboxes.tensor[0],
                np.multiply([x, y, x + w, y + h], scale),
                rtol=.02)


def test_broadcast_over_frames(coco):

    def video(loader, steps):
        return [
            dict(type='Frames'),
            dict(type='TransformBroadcaster', transforms=steps),
            dict(type='FirstFrame'), PACK
        ]

    @TRANSFORMS.register_module(name='Frames', force=True)
    class Frames(BaseTransform):

        def transform(self, results):
            return {key: [value] * 2 for key, value in results.items()}

    @TRANSFORMS.register_module(name='FirstFrame', force=True)
    class FirstFrame(BaseTransform):

        def transform(self, results):
            return {key: value[0] for key, value in results.items()}

    loader = dict(type='ReadTruth')
    check(
        config(
            dataset(coco, video(loader, [IMAGE, loader])),
            dataset(coco, video(loader, [IMAGE, RESIZE, loader]))))


def test_loss_finds_the_meta_information_of_training(coco):
    pack = dict(type='PackDetInputs', meta_keys=('img_id', 'ori_shape'))
    samples = check(
        config(
            dataset(coco, [IMAGE, ANNOTATIONS, FLIP, pack]),
            dataset(coco, TESTING)))
    assert all({'img_shape', 'ori_shape'} <= set(x.metainfo_keys())
               for x in samples)


def test_validation_stands_in_and_training_after_it(coco):
    check(config(dataset(coco, TRAINING), val=dataset(coco, TESTING)))
    cfg = config(dataset(coco, [IMAGE, ANNOTATIONS, RESIZE, PACK]))
    check(cfg)


@pytest.mark.parametrize('name', ['ImageOnlyResize', 'ImageOnlyFlip'])
def test_boxes_that_stay_behind_are_an_error(coco, name):
    cfg = config(
        dataset(coco, TRAINING),
        dataset(coco, [IMAGE, dict(type=name), ANNOTATIONS, PACK]))
    with pytest.raises(ValueError, match=f'after {name}, gt_bboxes are at'):
        calibration_dataloader(cfg, 0)


@pytest.mark.parametrize('steps', [
    [dict(type='RandomFlip', prob=1., direction='horizontal')],
    [dict(type='RandomFlip', prob=1., direction='diagonal')],
    [dict(type='Resize', scale=(31, 47)), dict(type='Resize', scale=(900, 9))],
    [dict(type='Pad', size=(256, 256), pad_val=dict(img=(255, ) * 3))],
    [dict(type='RandomCrop', crop_size=(.5, .5), crop_type='relative')],
    [dict(type='RandomShift', prob=1.), dict(type='ShearX', prob=1.)],
    [
        dict(type='Normalize', mean=[120.] * 3, std=[60.] * 3, to_rgb=True),
        dict(type='FixShapeResize', width=200, height=300)
    ],
    [dict(type='RandomGrayscale', prob=1., keep_channels=True), RESIZE],
])
def test_boxes_that_follow_are_no_error(coco, steps):
    """Whatever moves, cuts off or drops them, or changes colours."""
    # of some strong shears little is left at the border, less than the box
    random.seed(1)
    np.random.seed(1)
    testing = [IMAGE, *steps, ANNOTATIONS, PACK]
    cfg = config(dataset(coco, TRAINING), dataset(coco, testing))
    assert len(list(calibration_dataloader(cfg, 0))) == 2


def test_wrong_scale_and_masks_are_errors(coco):

    @TRANSFORMS.register_module(name='HalfBoxes', force=True)
    class HalfBoxes(TRANSFORMS.get('mmdet.Resize')):

        def _resize_bboxes(self, results):
            super()._resize_bboxes(results)
            results['gt_bboxes'].rescale_([.7, .7])

    @TRANSFORMS.register_module(name='NoMasks', force=True)
    class NoMasks(TRANSFORMS.get('mmdet.Resize')):

        def _resize_masks(self, results):
            pass

    for name, message in (('HalfBoxes', 'after HalfBoxes, gt_bboxes'),
                          ('NoMasks', 'after NoMasks, gt_masks')):
        cfg = config(
            dataset(coco, [IMAGE, MASKED, PACK]),
            dataset(coco, [IMAGE, dict(RESIZE, type=name), PACK]))
        with pytest.raises(ValueError, match=message):
            calibration_dataloader(cfg, 0)


def test_random_numbers_are_left_alone(coco):
    cfg = config(dataset(coco, TRAINING), dataset(coco, [IMAGE, FLIP, PACK]))
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    calibration_dataloader(cfg, 0)
    assert expected == (random.random(), np.random.rand(),
                        torch.rand(1).item())


def test_pure_python_config(coco, tmp_path):
    path = tmp_path / 'lazy.py'
    path.write_text(LAZY.format(root=str(coco)))
    cfg = Config.fromfile(path)
    assert cfg.train_dataloader.dataset.type is CocoDataset
    init_default_scope('mmengine')
    check(cfg)


LAZY = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import (LoadAnnotations, PackDetInputs,
                                       RandomFlip, Resize)
from mmengine.dataset import ConcatDataset, DefaultSampler
default_scope = None
common = dict(
    type=CocoDataset, data_root={root!r}, ann_file='coco.json',
    data_prefix=dict(img=''), metainfo=dict(classes=('thing', )))
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler),
    dataset=dict(common, pipeline=[
        dict(type=LoadImageFromFile),
        dict(type=LoadAnnotations, with_bbox=True),
        dict(type=RandomFlip, prob=1.), dict(type=PackDetInputs)]))
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type=DefaultSampler),
    dataset=dict(type=ConcatDataset, datasets=[dict(common, pipeline=[
        dict(type=LoadImageFromFile),
        dict(type=Resize, scale=(160, 120), keep_ratio=True),
        dict(type=LoadAnnotations, with_bbox=True),
        dict(type=PackDetInputs, meta_keys=('img_id', ))])]))
"""


def built(folder, pipeline):
    return CocoDataset(
        data_root=str(folder),
        ann_file='coco.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=('thing', )),
        pipeline=pipeline)


def test_runner_without_a_config(coco, tmp_path):
    train = built(coco, TRAINING)
    loaders = [
        DataLoader(
            ConcatDataset([x]),
            batch_size=2,
            num_workers=1,
            persistent_workers=True,
            collate_fn=pseudo_collate)
        for x in (train, built(coco, TESTING))
    ]
    runner = Runner(
        model=ToyNet(),
        work_dir=str(tmp_path),
        train_dataloader=loaders[0],
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
        test_dataloader=loaders[1],
        test_cfg=dict(),
        test_evaluator=dict(type='ToyAccuracy'),
        experiment_name=tmp_path.name,
        default_scope='mmdet')
    check(runner)
    found = calibration_dataloader(runner, 0)
    assert found.batch_size == 2 and not found.persistent_workers
    # the run's own data are as they were
    assert [type(x) for x in train.pipeline.transforms
            ] == [LoadImageFromFile, LoadAnnotations, RandomFlip,
                  PackDetInputs]
    assert [type(x) for x in loaders[1].dataset.datasets[0].pipeline.transforms
            ] == [LoadImageFromFile, Resize, LoadAnnotations, PackDetInputs]


def test_any_dataset_in_an_order_of_its_own(tmp_path):

    def order(seed):
        loader = calibration_dataloader(runner, seed)
        return [x for b in loader for x in b['data_samples'].tolist()]

    runner = Runner(
        model=ToyNet(),
        work_dir=str(tmp_path),
        train_dataloader=DataLoader(
            ToyImages(), batch_size=8, collate_fn=default_collate),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=.1)),
        experiment_name=tmp_path.name,
        default_scope='mmengine')
    assert order(0) == order(0) != order(1)
    assert order(0) != [x % 4 for x in range(32)]
    assert sorted(order(0)) == sorted(x % 4 for x in range(32))


def test_training_images_in_an_order_of_their_own():
    loader = dict(
        batch_size=4,
        num_workers=0,
        dataset=dict(type='mmengine.ToyImages'),
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


@pytest.mark.parametrize('form', [dict, tuple, list])
def test_images_of_different_sizes_are_stacked(form):

    class Sizes(Dataset):

        def __len__(self):
            return 4

        def __getitem__(self, i):
            image = torch.full((3, 8 + i, 12 - i), float(i + 1))
            return dict(
                inputs=image, label=i) if form is dict else form([image, i])

    cfg = Config(
        dict(
            train_dataloader=dict(
                batch_size=4,
                num_workers=0,
                dataset=Sizes(),
                collate_fn=dict(type='default_collate'))))
    batch, = calibration_dataloader(cfg, 0)
    images, labels = (
        batch.values() if form is dict else batch)  # type: ignore
    assert images.shape == (4, 3, 11, 12)
    for image, label in zip(images, labels):
        # the mean colour is around the image
        assert torch.equal(image, torch.full_like(image, int(label) + 1))


def test_default_scope_is_not_needed(coco):
    scope = DefaultScope.get_current_instance()
    assert scope.scope_name == 'mmdet'
    typed = [dict(x, type=f'mmdet.{x["type"]}') for x in TESTING[1:]]
    train = [dict(x, type=f'mmdet.{x["type"]}') for x in TRAINING[1:]]
    init_default_scope('mmengine')
    check(
        config(
            dict(dataset(coco, [IMAGE, *train]), type='mmdet.CocoDataset'),
            dict(dataset(coco, [IMAGE, *typed]), type='mmdet.CocoDataset')))
