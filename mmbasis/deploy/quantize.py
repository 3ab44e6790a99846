# Copyright (c) mmbasis authors. All rights reserved.
"""Int8: calibration data for TensorRT, static scales for ONNX Runtime."""
import copy
import os
import os.path as osp
import tempfile
from typing import List, Optional

import numpy as np
from mmengine.registry import DATASETS

from .export import Deployment


def calibration_images(deployment: Deployment, count: int) -> List[np.ndarray]:
    """Training images, preprocessed by the model's test pipeline.

    Args:
        deployment (Deployment): Its model config has a ``train_dataloader``
            and a test pipeline.
        count (int): How many images, spread evenly over the dataset.

    Returns:
        list[ndarray]: Each ``(1, 3, H, W)``, float32.

    Raises:
        ValueError: If the dataset is smaller than that.
    """
    config = copy.deepcopy(deployment.model_cfg.train_dataloader.dataset)
    while config.get('dataset') is not None:  # RepeatDataset and the like
        config = config.dataset
    config.update(pipeline=[], test_mode=True)
    dataset = DATASETS.build(config)
    if len(dataset) < count:
        raise ValueError(f'calibration asks for {count} images, but the '
                         f'training set holds {len(dataset)}')
    images = []
    for index in range(count):
        sample = dataset[index * len(dataset) // count]
        image = sample['img'] if 'img' in sample else sample['img_path']
        images.append(deployment.create_input(image)[1].numpy())
    return images


def write_calibration(path: str, images: List[np.ndarray],
                      partition: bool) -> None:
    """Write calibration data as MMDeploy's TensorRT calibrator reads it.

    Args:
        path (str): The HDF5 file.
        images (list[ndarray]): Each ``(1, 3, H, W)``.
        partition (bool): The graph is the first part of a detector that is
            cut before non-maximum suppression.
    """
    import h5py
    temporary = f'{path}.tmp{os.getpid()}'
    name = 'partition0' if partition else 'end2end'
    with h5py.File(temporary, 'w') as file:
        group = file.create_group(f'calib_data/{name}/input')
        for index, image in enumerate(images):
            group.create_dataset(str(index), data=image, compression='gzip')
    os.replace(temporary, path)


def quantize_onnx(path: str, output: str, images: List[np.ndarray]) -> None:
    """Static int8 for ONNX Runtime: convolutions and matrix products, weights
    per channel, scales from images.

    Args:
        path (str): The ONNX file, with one input.
        output (str): The int8 file to write.
        images (list[ndarray]): Each ``(1, 3, H, W)``.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    name = onnx.load(path).graph.input[0].name
    feeds = ({name: x} for x in images)

    class Reader(quantization.CalibrationDataReader):

        def get_next(self) -> Optional[dict]:
            return next(feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = osp.join(folder, 'prepared.onnx')
        # symbolic shapes fail on the data-dependent ones of detectors
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            output,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8)
