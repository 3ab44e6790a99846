# Copyright (c) mmbasis authors. All rights reserved.
import atexit
import os
from typing import Optional

import torch
import torch.distributed as dist
from mmengine.config import Config


def init_cpu_dist(launcher: str, cfg: Optional[Config] = None) -> None:
    """Join the processes over gloo where there is no GPU.

    MMEngine fails without a CUDA device, whatever the backend is, unless a
    process group is already there.

    Args:
        launcher (str): The tools' ``--launcher``. All but ``'pytorch'`` (that
            is ``torchrun``) change nothing.
        cfg (Config, optional): Config of the runner. Gets a model wrapper
            that names no CUDA device unless it has one. Defaults to None.

    Raises:
        RuntimeError: If the process was not started by ``torchrun``.
    """
    if launcher != 'pytorch' or torch.cuda.is_available():
        return
    if 'RANK' not in os.environ:
        raise RuntimeError(
            'launcher is pytorch, but RANK is not set: start the tool with '
            'torchrun --nproc_per_node=N tools/train.py ... '
            '--launcher pytorch')
    dist.init_process_group('gloo')
    # gloo's threads must not outlive the interpreter, which would abort
    atexit.register(_leave)
    if cfg is not None and cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            device_ids=None,
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False))


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
