# Copyright (c) mmbasis authors. All rights reserved.
"""Bare compressed models for test, inference and deployment."""
from __future__ import annotations

import copy
from typing import Any

import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import init_default_scope

from .. import compression
from ..compression.merging import override_merging
from ..planning import CompressionPlan
from ..quirks import repair
from ..registry import MODELS
from ..utils import as_text_config, load_config


def build_compressed(architecture: dict,
                     plan: compression.PlanLike) -> nn.Module:
    """Build a model from its dense config and give it the structure that a
    plan describes; its weights are as before training."""
    model = repair(MMENGINE_MODELS.build(architecture))
    module: Any
    for module in model.modules():
        # those weights are dense, and the compressed ones come afterwards
        configs = _init_configs(module)
        others = [x for x in configs if not _is_pretrained(x)]
        if len(others) < len(configs):
            module.init_cfg = others or None
    plan = compression.as_plan(plan)
    compression.apply_plan(model, plan, project=False)
    if plan.norm:  # MMDeploy calls it, which folds these
        override_merging(model, 'switch_to_deploy')
    return model


# ``type='mmbasis.X'`` ends here
MODELS.build_compressed = build_compressed


def build_dense(cfg: Config) -> nn.Module:
    """Build the dense model of a config, spelled in whichever way."""
    return repair(MMENGINE_MODELS.build(dense_architecture(cfg)))


def pretrained_configs(module: nn.Module) -> list[dict]:
    """The configs that initialise a whole module with trained weights."""
    return [
        x for x in _init_configs(module)
        if _is_pretrained(x) and not x.get('prefix')
    ]


def _init_configs(module: nn.Module) -> list[dict]:
    configs = getattr(module, 'init_cfg', None) or []
    return [configs] if isinstance(configs, dict) else list(configs)


def _is_pretrained(config: Any) -> bool:
    return isinstance(config, dict) and _last_name(
        config.get('type')) in ('Pretrained', 'PretrainedInit')


def _last_name(type_: Any) -> str:
    """Name of a type that a config gives as a class or as a string."""
    return getattr(type_, '__name__', str(type_)).rpartition('.')[2]


def standalone_config(cfg: Config, plan: CompressionPlan,
                      checkpoint: str) -> Config:
    """The config of a compressed model: for test, inference, deployment and
    further training, with any tool of the ecosystem.

    Args:
        cfg (Config): The config of the dense model, not changed.
        plan (CompressionPlan): The plan.
        checkpoint (str): The compressed weights, which training starts from.

    Returns:
        Config: All types are strings, so that ``pretty_text`` can be loaded.

    Raises:
        TypeError: If the config holds an object that no text can name.
    """
    cfg = as_text_config(cfg)
    model = dense_architecture(cfg)
    cfg.model = dict(
        model, type=f'mmbasis.{_without_scope(model.type)}',
        plan=plan.to_dict())
    given = cfg.get('custom_imports') or {}
    names = given.get('imports') or []
    names = [names] if isinstance(names, str) else names
    imports = list(dict.fromkeys([*names, 'mmbasis']))
    cfg.custom_imports = {
        'allow_failed_imports': False, **given, 'imports': imports
    }
    hooks = [
        hook for hook in cfg.get('custom_hooks') or []
        if _last_name(hook['type']) != 'BasisCompressionHook'
    ]
    # keeps the plan in the checkpoints of further training
    cfg.custom_hooks = hooks + [dict(type='mmbasis.BasisCompressionHook')]
    cfg.load_from, cfg.resume = checkpoint, False
    return cfg


def _without_scope(type_: str) -> str:
    """A type behind ``mmbasis.``, where a second scope would count alone
    (MMRotate has ``'mmdet.RetinaNet'``): then the path of its class."""
    scope, _, name = type_.partition('.')
    if scope not in MMENGINE_MODELS.children or not name or '.' in name:
        return type_
    found = MMENGINE_MODELS.get(type_)
    return f'{found.__module__}.{found.__qualname__}'


def dense_architecture(cfg: Config) -> ConfigDict:
    """The config of the dense model, whichever way a config spells it."""
    model = ConfigDict(copy.deepcopy(cfg.model))
    if _last_name(model.type) == 'BasisModel' and 'architecture' in model:
        wrapper, model = model, model.architecture
        if wrapper.get('data_preprocessor') is not None:
            model.setdefault('data_preprocessor', wrapper.data_preprocessor)
    if model.pop('plan', None) is not None:
        model.type = model.type[len('mmbasis.'):]
    return model


def load_compressed(config: str | Config, checkpoint: str,
                    device: str = 'cpu') -> nn.Module:
    """Build a bare compressed model, in evaluation mode.

    Args:
        config (str | Config): The dense config that the checkpoint was
            compressed from, or the one that was written beside it.
        checkpoint (str): A checkpoint that mmbasis wrote.
        device (str): Defaults to ``'cpu'``.

    Raises:
        ValueError: If the checkpoint carries no plan.
        RuntimeError: If the weights do not fit.
    """
    cfg = load_config(config) if isinstance(config, str) else config
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    content = compression.read_checkpoint(checkpoint)
    plan = compression.plan_of(content)
    if plan is None:
        raise ValueError(f'{checkpoint} carries no compression plan: it is of '
                         'a dense model, or not written by mmbasis')
    model = build_compressed(dense_architecture(cfg), plan)
    compression.load_weights(model, content, checkpoint)
    model.to(device)  # apart: some models override these without a result
    model.eval()
    return model
