# Copyright (c) mmbasis authors. All rights reserved.
"""Differences between versions of the libraries: the only file that asks for
versions."""
import functools
import inspect
import pickle
import sys
from typing import Any, Iterable, List, Tuple

import numpy as np
import torch
import torch.onnx
from mmengine.logging import HistoryBuffer


def _history_attribute(owner: Any, name: str) -> Any:
    """``getattr`` as MMEngine's checkpoints need it, and for nothing else: in
    a pickle the built-in one would open the door to any code."""
    if owner is not HistoryBuffer:
        raise pickle.UnpicklingError(
            f'this checkpoint asks for {name!r} of {owner!r}, which MMEngine '
            'never does: do not trust it')
    return getattr(owner, name)


def _allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, the default since torch 2.6, read
    histories, arrays and numbers, which MMEngine saves for resuming."""
    if not hasattr(torch.serialization, 'add_safe_globals'):
        return
    scalar = np.float64(0).__reduce__()[0]
    array = np.zeros(0).__reduce__()[0]
    allowed = [HistoryBuffer, np.ndarray, np.dtype]
    allowed += {type(np.dtype(code)) for code in 'fdeilLqQbBhH?'}
    allowed.append((_history_attribute, 'builtins.getattr'))
    for module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
        allowed += [(scalar, f'{module}.scalar'),
                    (array, f'{module}._reconstruct')]
    torch.serialization.add_safe_globals(allowed)


def _keep_tracing_exporter() -> None:
    """Make the tracing exporter, which MMDeploy's rewriters need, the default
    again: since torch 2.9 that is ``dynamo=True``."""
    export = torch.onnx.export
    default = inspect.signature(export).parameters.get('dynamo')
    if default is None or default.default is False:
        return

    @functools.wraps(export)
    def export_by_tracing(*args, **kwargs):
        kwargs.setdefault('dynamo', False)
        return export(*args, **kwargs)

    torch.onnx.export = export_by_tracing


def repair_partition() -> None:
    """Let MMDeploy cut graphs with onnx >= 1.17, where the method that it
    replaces has other arguments; onnx's own is as fast there."""
    from mmdeploy.core.optimizers import extractor
    from onnx.utils import Extractor
    name = '_dfs_search_reachable_nodes'
    own = getattr(Extractor, name, None)
    theirs = getattr(extractor, f'{name}_fast', None)
    counts = {
        len(inspect.signature(x).parameters)
        for x in (own, theirs) if x is not None
    }
    if len(counts) == 2:
        setattr(extractor, f'{name}_fast', own)


@functools.lru_cache(maxsize=None)
def repair_static_methods() -> None:
    """Make MMDeploy restore the static methods that it rewrote.

    Its rewriter restores plain functions, which take the object for their
    first argument: Swin no longer runs after any export.
    """
    from mmdeploy.core.rewriters.function_rewriter import FunctionRewriter
    enter, leave = FunctionRewriter.enter, FunctionRewriter.exit

    @functools.wraps(enter)
    def enter_noting(self, *args, **kwargs):
        self.static_methods = _static_methods(self._registry._rewrite_records)
        return enter(self, *args, **kwargs)

    @functools.wraps(leave)
    def leave_restoring(self):
        leave(self)
        for owner, name, method in self.static_methods:
            setattr(owner, name, method)

    FunctionRewriter.enter = enter_noting
    FunctionRewriter.exit = leave_restoring


def _static_methods(paths: Iterable[str]) -> List[Tuple[type, str, Any]]:
    """Class, name and method of the static methods among dotted names."""
    found = []
    for path in paths:
        place, _, name = path.rpartition('.')
        module, _, class_name = place.rpartition('.')
        owner = getattr(sys.modules.get(module), class_name, None)
        if isinstance(owner, type) and isinstance(
                vars(owner).get(name), staticmethod):
            found.append((owner, name, vars(owner)[name]))
    return found


def max_onnx_opset() -> int:
    """The newest ONNX opset that the tracing exporter of this torch writes."""
    from torch.onnx import _constants
    return _constants.ONNX_TORCHSCRIPT_EXPORTER_MAX_OPSET


_allow_mmengine_checkpoints()
_keep_tracing_exporter()
