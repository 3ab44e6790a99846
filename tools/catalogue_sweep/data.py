# Copyright (c) mmbasis authors. All rights reserved.
"""Two synthetic images with whatever annotations a model may ask for."""
from typing import Any, List, Optional

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import default_collate

#: image sizes to try, the smallest at which the dense model works counts
SIZES = {'mmdet': (96, 128, 320, 512), 'mmpretrain': (96, )}


def sizes(library: str, cfg: Config) -> List[int]:
    """Image sizes to try, smallest first; the config's own comes last."""
    found = list(SIZES[library])
    if library == 'mmpretrain':
        own = _own_size(cfg)
        found = [x for x in found if x < own] + [own]
    return found


def _pipeline(cfg: Config, split: str) -> list:
    loader = cfg.get(f'{split}_dataloader') or {}
    dataset = loader.get('dataset') or {}
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset.get('pipeline') or []


def _own_size(cfg: Config) -> int:
    """The size that the transforms of a classifier end with, or that a
    backbone without a pipeline is made for."""
    for split in ('test', 'train'):
        for step in reversed(_pipeline(cfg, split)):
            size = step.get('crop_size') or step.get('scale')
            size = size if isinstance(size, (tuple, list)) else [size]
            if isinstance(size[0], int):
                return size[0]
    backbone = cfg.model.get('backbone') or {}
    size = backbone.get('img_size')
    return size if isinstance(size, int) else 224


def make_batch(cfg: Config, model: torch.nn.Module, size: int) -> Any:
    """A batch as the dataloader of a config yields it.

    Args:
        cfg (Config): The config.
        model (nn.Module): Its model, whose data preprocessor says what is
            wanted.
        size (int): Side of the images.
    """
    np.random.seed(0)
    torch.manual_seed(0)
    preprocessor = type(model.data_preprocessor).__name__
    if preprocessor in ('ClsDataPreprocessor', 'ImgDataPreprocessor'):
        return _classified(model, size)
    if preprocessor in ('SelfSupDataPreprocessor', 'TwoNormDataPreprocessor',
                        'VideoDataPreprocessor'):
        return _by_pipeline(cfg)
    if preprocessor == 'TrackDataPreprocessor':
        from mmdet.testing import demo_track_inputs
        data = demo_track_inputs(
            num_frames=2,
            image_shapes=(3, size, size),
            num_items=[2],
            with_mask=True)
        for sample in data['data_samples']:
            sample.set_metainfo(dict(key_frames_inds=[0], ref_frames_inds=[1]))
        return data
    if preprocessor == 'ReIDDataPreprocessor':
        return _identified(size)
    return _detected(cfg, model, size)


def _by_pipeline(cfg: Config) -> Any:
    """Through the config's own transforms, for views and masks."""
    from mmcv.transforms import Compose
    steps = [x for x in _pipeline(cfg, 'train') if 'Load' not in x['type']]
    transform = Compose(steps)
    samples = []
    for _ in range(2):
        image = np.random.randint(0, 255, (256, 256, 3), np.uint8)
        samples.append(
            transform(
                dict(
                    img=image,
                    img_shape=(256, 256),
                    ori_shape=(256, 256),
                    gt_label=0)))
    return default_collate(samples)


def _batch_size(model: torch.nn.Module) -> int:
    """Masked convolutions (guided anchors) take one image at a time in test
    mode, which is also how mmbasis calibrates."""
    names = {type(module).__name__ for module in model.modules()}
    return 1 if 'MaskedConv2d' in names else 2


def _classified(model: torch.nn.Module, size: int) -> Any:
    from mmpretrain.structures import DataSample
    head = type(getattr(model, 'head', None)).__name__
    several = 'MultiLabel' in head or 'CSRA' in head
    mean = getattr(model.data_preprocessor, 'mean', None)
    channels = 3 if mean is None else len(mean)
    return dict(
        inputs=torch.randint(0, 256, (2, channels, size, size)).byte(),
        data_samples=[
            DataSample().set_gt_label([label] if several else label)
            for label in (0, 1)
        ])


def _identified(size: int) -> Any:
    from mmdet.structures import ReIDDataSample
    return dict(
        inputs=[torch.randint(0, 256, (2, 3, 2 * size, size)).byte()],
        data_samples=[ReIDDataSample().set_gt_label([0, 1])])


def _detected(cfg: Config, model: torch.nn.Module, size: int) -> Any:
    """Boxes, masks where they are loaded in training, a semantic map, and
    proposals for a model that does not make them."""
    from mmdet.testing import demo_mm_inputs, demo_mm_proposals
    count = _batch_size(model)
    shapes = [(3, size, size)] * count
    data = demo_mm_inputs(
        count,
        shapes,
        num_items=[3, 2][:count],
        sem_seg_output_strides=_map_stride(cfg),
        with_mask=True,
        with_semantic=True)
    proposals = demo_mm_proposals(shapes, 50)
    for sample, proposal in zip(data['data_samples'], proposals):
        # a class that every detector has
        sample.gt_instances.labels.zero_()
        if not getattr(model, 'with_rpn', False):
            sample.proposals = proposal
        _enlarge(sample.gt_instances, size)
        if not _loads_masks(cfg.get('train_dataloader')):
            # which some assigners would trip over
            del sample.gt_instances.masks
    return data


def _enlarge(instances: Any, size: int) -> None:
    """Boxes that no network overlooks, and masks that fill them."""
    from mmdet.structures.mask import BitmapMasks
    count = len(instances)
    starts = torch.arange(count, dtype=torch.float32) * size / 8
    instances.bboxes = torch.stack(
        [starts, starts, starts + size / 2, starts + size / 2], 1)
    masks = np.zeros((count, size, size), np.uint8)
    for mask, box in zip(masks, instances.bboxes.int().tolist()):
        mask[box[1]:box[3], box[0]:box[2]] = 1
    instances.masks = BitmapMasks(masks, size, size)


def _loads_masks(config: Any) -> bool:
    if isinstance(config, dict):
        default = config.get('type') == 'LoadPanopticAnnotations'
        return bool(config.get('with_mask', default)) or any(
            map(_loads_masks, config.values()))
    return isinstance(config, (list, tuple)) and any(map(_loads_masks, config))


def _map_stride(cfg: Config) -> int:
    """By how much a pipeline reduces semantic maps."""
    scale: Optional[float] = None
    for step in _pipeline(cfg, 'train') + list(cfg.get('train_pipeline', [])):
        if step.get('type') == 'SegRescale':
            scale = step.get('scale_factor')
    return round(1 / scale) if scale else 1
