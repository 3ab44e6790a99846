# Copyright (c) mmbasis authors. All rights reserved.
"""Back to dense, where a layer is not worth its factors."""
import os.path as osp
from dataclasses import replace
from typing import Any, Dict, List, Tuple, Union

import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import init_default_scope

from ..compression import (
    attach_plan,
    basis_layers,
    get_plan,
    load_weights,
    plan_of,
    read_checkpoint,
    save_checkpoint,
)
from ..compression.surgery import replace_modules
from ..models import build_compressed, dense_architecture, standalone_config
from ..planning import CompressionPlan, DensePlan, LatencyTable


def merge_layers(model: nn.Module, names: List[str],
                 reason: str) -> CompressionPlan:
    """Merge basis layers of a model to dense, in place.

    Args:
        model (nn.Module): The compressed model; it is the same function
            afterwards.
        names (list[str]): The layers.
        reason (str): Goes into the plan.

    Returns:
        CompressionPlan: The plan of the model now, which it carries.

    Raises:
        ValueError: If the model carries no plan.
    """
    plan = get_plan(model)
    if plan is None:
        raise ValueError(f'this {type(model).__name__} carries no plan: only '
                         'a compressed model has layers to merge')
    modules = dict(basis_layers(model))
    replacements: Dict[nn.Module, nn.Module] = {}
    layers, dense = dict(plan.layers), dict(plan.dense)
    for name in names:
        entry = layers.pop(name)
        layer = replacements[modules[name]] = modules[name].to_dense()
        bias = layer.bias is not None
        params = layer.weight.numel() + (layer.bias.numel() if bias else 0)
        dense[name] = DensePlan(
            reason, True, entry.shape, entry.macs[0], params, bias=bias)
    replace_modules(model, replacements)
    plan = replace(plan, layers=layers, dense=dense)
    attach_plan(model, plan)
    return plan


def _target(deploy_cfg: Union[str, Config]) -> Dict[str, str]:
    """Back end and precision that a deploy config is for."""
    if isinstance(deploy_cfg, str):
        deploy_cfg = Config.fromfile(deploy_cfg)
    backend = deploy_cfg.backend_config
    common = backend.get('common_config') or {}
    precision = next((p for p in ('int8', 'fp16') if common.get(f'{p}_mode')),
                     'fp32')
    return dict(backend=backend.type, precision=precision)


def _slow_layers(plan: CompressionPlan,
                 latencies: LatencyTable) -> Dict[str, Dict[str, Any]]:
    """Layers of a plan that are not faster as a basis."""
    return {
        name: dict(
            rank=entry.rank,
            basis_ms=latencies.cost(name, entry.rank),
            dense_ms=latencies.cost(name, None))
        for name, entry in plan.layers.items() if name in latencies.curves
        and not latencies.is_faster(name, entry.rank)
    }


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
    latencies = LatencyTable.load(table, **_target(deploy_cfg))
    content = read_checkpoint(checkpoint)
    plan = plan_of(content)
    if plan is None:
        return model_cfg, checkpoint, {}
    planned = plan.planner.get('table') or {}
    latencies.check(device=planned.get('device'))
    slow = _slow_layers(plan, latencies)
    if not slow:
        return model_cfg, checkpoint, {}
    init_default_scope(model_cfg.get('default_scope', 'mmengine'))
    architecture = dense_architecture(model_cfg)
    model = build_compressed(architecture, plan)
    load_weights(model, content, checkpoint)
    plan = merge_layers(model, list(slow), 'merged: not faster as a basis')
    merged = osp.abspath(osp.join(work_dir, 'merged.pth'))
    meta = {k: v for k, v in content.get('meta', {}).items() if k != 'mmbasis'}
    save_checkpoint(model, plan, merged, meta)
    dense_cfg = Config(dict(model_cfg.to_dict(), model=architecture))
    return standalone_config(dense_cfg, plan, merged), merged, slow
