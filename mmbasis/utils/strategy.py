# Copyright (c) mmbasis authors. All rights reserved.
"""Which strategies of MMEngine's ``FlexibleRunner`` can compress."""
from typing import Any

from mmengine.config import Config

#: what to do instead, by the strategy that cannot
_INSTEAD = dict(
    FSDPStrategy='it keeps the parameters of many layers as one flat shard, '
    'so no layer can be replaced',
    DeepSpeedStrategy='its engine holds the parameters and their optimizer, '
    'so no layer can be replaced',
    ColossalAIStrategy='its booster holds the parameters and their optimizer, '
    'so no layer can be replaced')


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy under which layers cannot be replaced.

    Args:
        strategy (BaseStrategy | type | str): The strategy, its class, or the
            name of this.

    Raises:
        RuntimeError: Unless it is that of a single device or DDP, or derived
            from these.
    """
    if isinstance(strategy, str):
        names = [strategy.rpartition('.')[2]]
    else:
        cls = strategy if isinstance(strategy, type) else type(strategy)
        names = [x.__name__ for x in cls.__mro__]
    for name in names:  # from the class to what it is derived from
        if name in _INSTEAD:
            raise RuntimeError(
                f'{names[0]} cannot train a model that is compressed: '
                f"{_INSTEAD[name]}. Use strategy=dict(type='DDPStrategy'), or "
                "runner_type='Runner'; a compressed model is small enough to "
                'fit on each GPU')
        if name in ('SingleDeviceStrategy', 'DDPStrategy'):
            return
    if not isinstance(strategy, str):  # a name alone says too little
        raise RuntimeError(
            f'{names[0]} is no strategy under which layers can be replaced: '
            "use strategy=dict(type='DDPStrategy') or "
            "dict(type='SingleDeviceStrategy'), or derive it from these")


def check_config(cfg: Config) -> None:
    """:func:`check_strategy` of a config that compresses, before anything is
    built."""
    kind = (cfg.get('strategy') or {}).get('type')
    types = [hook.get('type') for hook in cfg.get('custom_hooks') or []
             if isinstance(hook, dict)] + [cfg.model.get('type')]
    names = [str(getattr(x, '__name__', x)) for x in types]
    if kind is not None and any(
            x.startswith('mmbasis.') or x.rpartition('.')[2] in (
                'BasisCompressionHook', 'BasisModel') for x in names):
        check_strategy(kind)
