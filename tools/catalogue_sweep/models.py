# Copyright (c) mmbasis authors. All rights reserved.
"""Models of the catalogue, with weights that let errors be seen."""
from collections import Counter
from contextlib import contextmanager
from typing import Any, Dict, Iterator, Tuple
from unittest.mock import patch

import torch
import torch.nn as nn
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import MODELS, init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

from mmbasis.quirks import repair

from .configs import without_pretrained

#: Parameters that are all smaller than this do not count: residual branches
#: that start at zero, layer scales of 1e-6, offsets.
NEGLIGIBLE = 1e-2
#: of a normalised layer, as a fraction of its mean square
SMALLEST_VARIANCE = 1e-2
#: proposals and detections; hundreds only take time
REGIONS = 16


def architecture(cfg: Config) -> ConfigDict:
    """The model's config without weights from elsewhere, with its data
    preprocessor, and with few regions to look at."""
    model = without_pretrained(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', cfg.data_preprocessor)
    # teachers are compared with nothing here, their weights do not matter
    if 'teacher_ckpt' in model:
        model.teacher_ckpt = None
    _set_all(model, 'rpn', 'max_per_img', REGIONS)
    _set_all(model, 'rpn_proposal', 'max_per_img', REGIONS)
    _set_all(model, 'sampler', 'num', REGIONS)
    for name in ('rcnn', 'test_cfg'):
        _set_all(model, name, 'max_per_img', REGIONS)
    # PointRend does not bear an image without detections, and guided anchors
    # not one without anchors
    _set_all(model, 'rcnn', 'score_thr', 0.)
    _set_all(model, 'bbox_head', 'loc_filter_thr', 0.)
    _set_all(model, 'rpn_head', 'loc_filter_thr', 0.)
    # MMCV's normalisation over processes cannot even be built in one
    for _, section in _sections(model):
        if section.get('type') == 'MMSyncBN':
            section['type'] = 'BN'
    return model


def _sections(config: Any, name: str = '') -> Iterator[Tuple[str, dict]]:
    """All sections of a config, with their names; those in lists have the name
    of the list."""
    if isinstance(config, dict):
        yield name, config
        for child_name, child in config.items():
            yield from _sections(child, child_name)
    elif isinstance(config, (list, tuple)):
        for child in config:
            yield from _sections(child)


def _set_all(config: Any, name: str, key: str, value: Any) -> None:
    """Overwrite a key in all sections of a name."""
    for found, section in _sections(config):
        if found == name and key in section:
            section[key] = value


def build(cfg: Config) -> nn.Module:
    """Build and initialise a model on the CPU.

    Raises:
        Exception: Whatever the catalogue raises.
    """
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    # some heads and moving averages ask the run how far it is
    for key, value in dict(epoch=0, max_iters=1000).items():
        MessageHub.get_current_instance().update_info(key, value)
    model = repair(MODELS.build(architecture(cfg)))
    if hasattr(model, 'init_weights'):
        model.init_weights()
    preprocessor = model.data_preprocessor
    if isinstance(
            getattr(preprocessor, 'batch_augments', None), nn.ModuleList):
        # detectors' ask for a run in progress, or for images in full size
        preprocessor.batch_augments = None
    enliven(model)
    model.eval()  # whose result is None where a model overrides it so (LAD)
    return model


@contextmanager
def uninitialized() -> Iterator[None]:
    """Random numbers are not drawn for parameters: they are loaded next."""

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    with patch.multiple(torch.Tensor, uniform_=keep, normal_=keep):
        yield


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Make all branches of a freshly initialised model count.

    A branch that starts at zero would hide whatever is wrong behind it.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        if NEGLIGIBLE < parameter.abs().max() < float('inf'):
            continue
        if parameter.dim() > 1:
            fan_in = parameter[0].numel()
            nn.init.normal_(parameter, std=fan_in**-0.5)
        elif name.endswith('bias'):
            nn.init.normal_(parameter, std=.1)
        else:
            nn.init.uniform_(parameter, .5, 1)


@torch.no_grad()
def settle_norms(model: nn.Module, forward: Any) -> None:
    """Give batch normalisations the statistics of an example, one after the
    other, so that each sees what the ones before it do with theirs.

    No channel is amplified more than the average one: where maps have shrunk
    to a few points, some hardly vary, and rounding would grow from layer to
    layer.

    Args:
        model (nn.Module): The model, in evaluation mode.
        forward (Callable): Runs the model on the example.
    """
    calls: Dict[nn.Module, int] = Counter()

    def settle(norm: nn.Module, args: Tuple[torch.Tensor]) -> None:
        x = args[0].transpose(0, 1).flatten(1)
        variance, mean = torch.var_mean(x, 1, unbiased=False)
        least = max(variance.mean(), SMALLEST_VARIANCE * x.square().mean())
        calls[norm] += 1  # a shared one gets the mean over its uses
        norm.running_mean.lerp_(mean, 1 / calls[norm])
        norm.running_var.lerp_(variance.clamp_min(least), 1 / calls[norm])

    handles = [
        x.register_forward_pre_hook(settle) for x in model.modules()
        if isinstance(x, _BatchNorm) and x.running_mean is not None
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
