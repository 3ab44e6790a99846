# Copyright (c) mmbasis authors. All rights reserved.
"""Calibration data for int8 of TensorRT 8.5, as MMDeploy reads it."""
from typing import Dict, Iterable, Iterator, List

import numpy as np
import torch
import torch.nn as nn

from ..utils.io import whole_file
from .configs import first_input
from .export import Deployment

#: regions of an image that are kept: their features are large, and MMDeploy's
#: calibrator repeats them to the size of its batch
REGIONS = 64


def write_calibration(path: str, deployment: Deployment,
                      images: List[np.ndarray]) -> None:
    """Write the inputs of each graph to HDF5, as MMDeploy's TensorRT
    calibrator reads them: groups ``calib_data/<graph>/<input>``.

    Args:
        path (str): The file.
        deployment (Deployment): Says which graphs there are; its model makes
            the features of the regions for the second one of a two-stage
            detector.
        images (list[ndarray]): Each ``(N, 3, H, W)``, see
            :func:`calibration_images`.
    """
    import h5py
    first = 'end2end' if deployment.partition is None else 'partition0'
    data: Dict[str, Iterable[np.ndarray]] = {
        f'{first}/{first_input(deployment.deploy_cfg)}': images
    }
    if deployment.partition == 'two_stage':
        data['partition1/bbox_feats'] = _region_features(
            deployment.model, images)
    with whole_file(path) as temporary, h5py.File(temporary, 'w') as file:
        for name, arrays in data.items():
            group = file.create_group(f'calib_data/{name}')
            for index, array in enumerate(arrays):
                group.create_dataset(
                    str(index), data=array, compression='gzip')


@torch.no_grad()
def _region_features(model: nn.Module,
                     images: List[np.ndarray]) -> Iterator[np.ndarray]:
    """What enters the heads of the regions, ``(regions, C, h, w)``, for each
    batch of images."""
    from mmdet.structures import DetDataSample
    found: List[torch.Tensor] = []
    handle = model.roi_head.bbox_head.register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0]))
    try:
        for image in images:
            size = image.shape[-2:]
            meta = dict(img_shape=size, ori_shape=size, pad_shape=size,
                        batch_input_shape=size, scale_factor=(1., 1.))
            samples = [DetDataSample(metainfo=meta) for _ in image]
            model(torch.from_numpy(image), samples, mode='predict')
            features = found.pop()
            # the best proposals stand first: spread over all of them
            yield features[::-(-len(features) // REGIONS)].numpy()
    finally:
        handle.remove()
