# Copyright (c) mmbasis authors. All rights reserved.
"""Differences between versions of the libraries, known nowhere else."""
import functools
import inspect
import pickle
from importlib.util import find_spec
from typing import Any, Optional, Tuple

import numpy as np
import torch
import torch.onnx
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.logging import HistoryBuffer


def _history_attribute(owner: Any, name: str) -> Any:
    """``getattr`` for MMEngine's checkpoints: the built-in one could run any
    code that a pickle names."""
    if owner is not HistoryBuffer:
        raise pickle.UnpicklingError(
            f'this checkpoint asks for {name!r} of {owner!r}, which MMEngine '
            'never does: do not trust it')
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read
    histories, arrays and numbers, which MMEngine saves for resuming. The
    forks' MMEngine takes them off the list behind each of its loads. Before
    torch 2.4 there is no such list."""
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return
    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(0).__reduce__()[0]
    allowed = [HistoryBuffer, np.ndarray, np.dtype,
               (_history_attribute, 'builtins.getattr')]
    allowed += {type(np.dtype(code)) for code in 'fdeilLqQbBhH?'}
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed += [(scalar, f'{module}.scalar'),
                    (array, f'{module}._reconstruct')]
    torch.serialization.add_safe_globals(allowed)


def _keep_tracing_exporter() -> None:
    """Make the tracing exporter, which MMDeploy's rewriters need, the default
    again: since torch 2.9 that is ``dynamo=True``."""
    export = torch.onnx.export
    default = inspect.signature(export).parameters.get('dynamo')
    if default is not None and default.default is not False:
        torch.onnx.export = functools.partial(export, dynamo=False)


def repair_partition() -> None:
    """Let MMDeploy cut graphs with onnx >= 1.17, whose own method is fast."""
    from mmdeploy.core.optimizers import extractor
    from onnx.utils import Extractor
    name = '_dfs_search_reachable_nodes'
    own = getattr(Extractor, name, None)
    # MMDeploy's takes the arguments of onnx < 1.17
    if own and len(inspect.signature(own).parameters) != 4:
        setattr(extractor, f'{name}_fast', own)


def repair_roi_align() -> None:
    """Let MMDeploy export RoIAlign for ONNX Runtime with torch >= 2.9, which
    dropped a function that its symbolic calls."""
    from torch.onnx import symbolic_opset9
    name = '_cast_Long'
    if not hasattr(symbolic_opset9, name):
        setattr(symbolic_opset9, name, lambda g, x, _: g.op(
            'Cast', x, to_i=torch.onnx.TensorProtoDataType.INT64))


@functools.lru_cache(maxsize=None)
def repair_static_methods() -> None:
    """Make MMDeploy restore static methods as such: as plain functions, Swin
    no longer runs after any export."""
    from mmdeploy.core.rewriters import function_rewriter as rewriter
    put, methods = rewriter._set_func, {}

    def put_static(path: str, function: Any) -> None:
        owner = rewriter.import_function(path)[1]
        before = getattr(owner, '__dict__', {}).get(path.rpartition('.')[2])
        if isinstance(before, staticmethod):
            methods[before.__func__] = before
        put(path, methods.get(function, function))

    rewriter._set_func = put_static


def autocast_dtype(device_type: str) -> Optional[torch.dtype]:
    """The type that autocast computes in on ``'cuda'``, ``'cpu'``, …; None
    where it is off, or there is none."""
    if hasattr(torch, 'get_autocast_dtype'):  # since torch 2.4
        amp: Any = torch  # what mypy's torch does not have
        on = (amp.amp.is_autocast_available(device_type)
              and amp.is_autocast_enabled(device_type))
        return torch.get_autocast_dtype(device_type) if on else None
    if device_type == 'cpu':
        on, dtype = (torch.is_autocast_cpu_enabled(),
                     torch.get_autocast_cpu_dtype())
    else:
        on, dtype = (torch.is_autocast_enabled(),
                     torch.get_autocast_gpu_dtype())
    return dtype if on else None


def max_onnx_opset() -> int:
    """The newest ONNX opset that the tracing exporter of this torch writes."""
    from torch.onnx import _constants
    return _constants.ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET


def _find_configs_by_import_name() -> None:
    """Let ``library::config`` find the library by its import name. MMEngine
    asks for a distribution, such as ``mmsegmentation`` for ``mmseg``, whose
    fork is called otherwise, and would have pip install it over the fork."""
    MODULE2PACKAGE['mmbasis'] = 'mmbasis'
    for module in MODULE2PACKAGE:
        if find_spec(module) is not None:
            MODULE2PACKAGE[module] = module


def _inherit_own_configs_without_scope() -> None:
    """Let ``_base_ = 'mmbasis::…'`` inherit a config as a file would be.
    MMEngine would write the scope ``mmbasis`` into it, but the types in our
    configs are those of their ``default_scope``."""
    find = Config._get_cfg_path

    def find_without_scope(cfg_path: str,
                           filename: str) -> Tuple[str, Optional[str]]:
        path, scope = find(cfg_path, filename)
        return path, None if scope == 'mmbasis' else scope

    Config._get_cfg_path = staticmethod(find_without_scope)


allow_mmengine_checkpoints()
_find_configs_by_import_name()
_inherit_own_configs_without_scope()
_keep_tracing_exporter()
