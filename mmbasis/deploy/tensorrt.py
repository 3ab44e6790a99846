# Copyright (c) mmbasis authors. All rights reserved.
"""What TensorRT needs on the device, without TensorRT."""
import os.path as osp
from typing import Dict

from .export import Deployment, precisions


def trtexec_commands(deployment: Deployment, path: str,
                     index: int = 0) -> Dict[str, str]:
    """The commands that build the engine on the device, without MMDeploy, for
    each TensorRT version. In int8, 8.5 measures the speed with made-up scales,
    unless the graph has its own or ``--calib`` names a calibration cache.

    Args:
        deployment (Deployment): The engine is fp32 unless it is for TensorRT.
        path (str): The ONNX file.
        index (int): Which of the graphs it is. Defaults to the first.
    """
    file = osp.basename(path)
    engine = f'{osp.splitext(file)[0]}.engine'
    parts = ['trtexec', f'--onnx={file}', f'--saveEngine={engine}']
    given = deployment.deploy_cfg.backend_config.get('model_inputs')
    shapes = given[index].input_shapes if given else {}
    ranges = []
    for which in ('min', 'opt', 'max'):
        # a graph of fixed shapes refuses them
        text = ','.join(f'{name}:{"x".join(map(str, x[f"{which}_shape"]))}'
                        for name, x in shapes.items()
                        if x['min_shape'] != x['max_shape'])
        if text:
            ranges.append(f'--{which}Shapes={text}')
    lowered = [f'--{x}' for x in precisions(deployment.deploy_cfg)]
    # 8.5 lowers, also what the file states; 10 takes the file's word
    stated = ['--stronglyTyped'] if _states_precision(path) else lowered
    return {
        '8.5': ' '.join(parts + lowered + ranges),
        '10': ' '.join(parts + stated + ranges)
    }


def _states_precision(path: str) -> bool:
    """Whether a graph holds fp16 weights or quantisation of its own."""
    import onnx
    graph = onnx.load(path, load_external_data=False).graph
    return any(x.data_type == onnx.TensorProto.FLOAT16
               for x in graph.initializer) or any(
                   x.op_type == 'QuantizeLinear' for x in graph.node)
