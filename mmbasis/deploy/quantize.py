# Copyright (c) mmbasis authors. All rights reserved.
"""Int8: calibration data for TensorRT, static scales for ONNX Runtime."""
import copy
import os
from typing import Iterator, List, Optional

import numpy as np
from mmengine.registry import DATASETS

from .export import Deployment


def calibration_images(deployment: Deployment, count: int) -> List[np.ndarray]:
    """Preprocessed training images.

    They pass through the model's test pipeline, like the images that the
    network will see.

    Args:
        deployment (Deployment): Its model config has a ``train_dataloader``
            and a test pipeline.
        count (int): How many images, spread evenly over the dataset.

    Returns:
        list[ndarray]: Each ``(1, 3, H, W)``, float32.

    Raises:
        ValueError: If the dataset is smaller than that.
    """
    cfg = deployment.model_cfg
    config = copy.deepcopy(cfg.train_dataloader.dataset)
    while config.get('dataset') is not None:  # RepeatDataset and the like
        config = config.dataset
    test = cfg.test_dataloader.dataset
    config.pipeline = copy.deepcopy(test.pipeline)
    config.test_mode = True
    dataset = DATASETS.build(config)
    if len(dataset) < count:
        raise ValueError(f'calibration asks for {count} images, but the '
                         f'training set holds {len(dataset)}')
    images = []
    for index in range(count):
        sample = dataset[index * len(dataset) // count]
        image = sample['inputs'].permute(1, 2, 0).numpy()
        if 'img_path' in sample['data_samples']:
            image = sample['data_samples'].img_path
        images.append(deployment.create_input(image)[1].numpy())
    return images


def write_calibration(path: str,
                      images: List[np.ndarray],
                      partition: bool = False) -> None:
    """Write calibration data as MMDeploy's TensorRT calibrator reads it.

    Args:
        path (str): The HDF5 file.
        images (list[ndarray]): Each ``(1, 3, H, W)``.
        partition (bool): The graph is the first part of a detector that is
            cut before non-maximum suppression. Defaults to False.
    """
    import h5py
    temporary = f'{path}.tmp{os.getpid()}'
    name = 'partition0' if partition else 'end2end'
    with h5py.File(temporary, 'w') as file:
        group = file.create_group(f'calib_data/{name}/input')
        for index, image in enumerate(images):
            group.create_dataset(
                str(index), data=image, compression='gzip', compression_opts=4)
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

    class Reader(quantization.CalibrationDataReader):

        def __init__(self, name: str) -> None:
            self.feeds: Iterator[dict] = ({name: x} for x in images)

        def get_next(self) -> Optional[dict]:
            return next(self.feeds, None)

    prepared = f'{output}.tmp{os.getpid()}'
    name = onnx.load(path).graph.input[0].name
    try:
        # symbolic shapes fail on the data-dependent ones of detectors
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantization.quantize_static(
            prepared,
            output,
            Reader(name),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8)
    finally:
        if os.path.exists(prepared):
            os.remove(prepared)
