# Copyright (c) mmbasis authors. All rights reserved.
"""Back to dense, where a layer is not worth its factors."""
import os.path as osp
from dataclasses import replace
from typing import Any, Dict, List, Tuple, Union

import torch.nn as nn
from mmengine.config import Config

from ..compression import (
    attach_plan,
    get_plan,
    plan_of,
    read_checkpoint,
    save_checkpoint,
)
from ..compression.surgery import replace_modules
from ..models import load_compressed, standalone_config
from ..planning import CompressionPlan, DensePlan, LatencyTable
from .export import precisions, read_deploy_cfg


def merge_layers(model: nn.Module, names: List[str],
                 reason: str) -> CompressionPlan:
    """Merge basis layers of a compressed model to dense, in place, with a
    reason for the plan; the plan of the model now, which it carries."""
    plan = get_plan(model)
    if plan is None:
        raise ValueError(f'this {type(model).__name__} carries no plan: only '
                         'a compressed model has layers to merge')
    replacements: Dict[nn.Module, nn.Module] = {}
    layers, dense = dict(plan.layers), dict(plan.dense)
    for name in names:
        entry, layer = layers.pop(name), model.get_submodule(name)
        merged = replacements[layer] = layer.to_dense()
        params = sum(x.numel() for x in merged.parameters(recurse=False))
        dense[name] = DensePlan(reason, True, entry.shape, entry.macs[0],
                                params, merged.bias is not None)
    replace_modules(model, replacements)
    plan = replace(plan, layers=layers, dense=dense)
    attach_plan(model, plan)
    return plan


def merge_slow_layers(deploy_cfg: Union[str, Config], model_cfg: Config,
                      checkpoint: str, table: str,
                      work_dir: str) -> Tuple[Config, str, Dict[str, Any]]:
    """Merge the layers that the latency table does not show to be faster.

    Args:
        deploy_cfg (str | Config): Has the table's back end and precision.
        model_cfg (Config): Of the compressed model, or of the dense one.
        checkpoint (str): The compressed weights.
        table (str): The latency table.
        work_dir (str): Gets ``merged.pth`` where a layer was merged.

    Returns:
        tuple[Config, str, dict]: Config and checkpoint of the result, and
        for each merged layer its rank and what it took, ms.

    Raises:
        ValueError: If the table is of another back end, precision or model,
            or of another device than the plan was made for.
    """
    deploy_cfg = read_deploy_cfg(deploy_cfg)
    latencies = LatencyTable.load(
        table,
        backend=deploy_cfg.backend_config.type,
        precision=(['fp32'] + precisions(deploy_cfg))[-1])
    content = read_checkpoint(checkpoint)
    plan = plan_of(content)
    slow = _slow_layers(plan, latencies) if plan is not None else {}
    if not slow:
        return model_cfg, checkpoint, {}
    model = load_compressed(model_cfg, checkpoint)
    plan = merge_layers(model, list(slow), 'merged: not faster as a basis')
    merged = osp.abspath(osp.join(work_dir, 'merged.pth'))
    save_checkpoint(model, plan, merged, content.get('meta', {}))
    return standalone_config(model_cfg, plan, merged), merged, slow


def _slow_layers(plan: CompressionPlan,
                 latencies: LatencyTable) -> Dict[str, Dict[str, Any]]:
    """Layers of a plan that are not faster as a basis on the plan's device."""
    latencies.check(device=(plan.planner.get('table') or {}).get('device'))
    return {
        name: dict(
            rank=entry.rank,
            basis_ms=latencies.cost(name, entry.rank),
            dense_ms=latencies.cost(name, None))
        for name, entry in plan.layers.items() if name in latencies.curves
        and entry.form == 'output'
        and not latencies.is_faster(name, entry.rank)
    }
