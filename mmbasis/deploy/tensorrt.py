# Copyright (c) mmbasis authors. All rights reserved.
"""What TensorRT needs on the device, without TensorRT."""
import os.path as osp
from typing import List

import numpy as np

from ..utils.io import whole_file
from .export import Deployment, precisions


def write_calibration(path: str, images: List[np.ndarray],
                      partition: bool) -> None:
    """Write images of shape ``(1, 3, H, W)`` to HDF5, as MMDeploy's TensorRT
    calibrator reads it, for a graph that is whole or the first part of a
    detector (``partition``)."""
    import h5py
    name = 'partition0' if partition else 'end2end'
    with whole_file(path) as temporary, h5py.File(temporary, 'w') as file:
        group = file.create_group(f'calib_data/{name}/input')
        for index, image in enumerate(images):
            group.create_dataset(str(index), data=image, compression='gzip')


def trtexec_command(deployment: Deployment, path: str, index: int = 0) -> str:
    """The command that builds the engine on the device, without MMDeploy. In
    int8, speed is measured with made-up scales, unless ``--calib`` names a
    calibration cache.

    Args:
        deployment (Deployment): The engine is fp32 unless it is for TensorRT.
        path (str): The ONNX file.
        index (int): Which of the graphs it is. Defaults to the first.
    """
    file = osp.basename(path)
    engine = f'{osp.splitext(file)[0]}.engine'
    parts = ['trtexec', f'--onnx={file}', f'--saveEngine={engine}']
    parts += [f'--{x}' for x in precisions(deployment.deploy_cfg)]
    given = deployment.deploy_cfg.backend_config.get('model_inputs')
    shapes = given[index].input_shapes if given else {}
    for which in ('min', 'opt', 'max'):
        # a graph of fixed shapes refuses them
        text = ','.join(f'{name}:{"x".join(map(str, x[f"{which}_shape"]))}'
                        for name, x in shapes.items()
                        if x['min_shape'] != x['max_shape'])
        if text:
            parts.append(f'--{which}Shapes={text}')
    return ' '.join(parts)
