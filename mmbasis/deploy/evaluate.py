# Copyright (c) mmbasis authors. All rights reserved.
import copy
from typing import Dict, List

from .export import Deployment


def evaluate_onnx(deployment: Deployment, files: List[str],
                  work_dir: str) -> Dict[str, float]:
    """Run MMDeploy's evaluator on exported files, in ONNX Runtime.

    Args:
        deployment (Deployment): Its model config has a test set.
        files (list[str]): The ONNX files.
        work_dir (str): For the log.

    Returns:
        dict[str, float]: The evaluator's metrics.
    """
    model = deployment.task.build_backend_model(
        files,
        data_preprocessor_updater=deployment.task.update_data_preprocessor)
    loader = copy.deepcopy(deployment.model_cfg.test_dataloader)
    axes = deployment.deploy_cfg.onnx_config.get('dynamic_axes') or {}
    if 0 not in axes.get('input', {}):
        loader.batch_size = 1
    runner = deployment.task.build_test_runner(
        model, work_dir, dataloader=loader)
    return {k: float(v) for k, v in runner.test().items()}
