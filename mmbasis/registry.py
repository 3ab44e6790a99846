# Copyright (c) mmbasis authors. All rights reserved.
"""Registries of mmbasis: children of MMEngine's, in the scope ``mmbasis``."""
from typing import Any, Callable, Dict, Optional, Union

from mmengine import registry
from mmengine.registry import Registry


class CompressedModels(Registry):
    """MMEngine's ``MODELS`` for the scope ``mmbasis``.

    ``dict(type='mmbasis.X', plan=…, …)`` builds model ``X`` of whatever
    OpenMMLab library, with basis layers. The config keeps the entries that
    MMDeploy and the inferencers look for at the top of ``model``.
    """

    #: ``(architecture, plan) -> model``; the module that defines it sets it
    build_compressed: Callable[[dict, Any], Any]

    def get(self, key: str) -> Optional[Union[type, Callable]]:
        scope, name = self.split_scope_key(key)
        # another scope, not the path of a class
        known = {self.scope, 'mmengine', *registry.MODELS.children}
        if key in self._module_dict or ('.' not in name and scope in known):
            return super().get(key)

        def build(plan: Any, **architecture):
            return self.build_compressed(dict(type=key, **architecture), plan)

        return build


# importing mmbasis fills all of them
_HOME: Dict[str, Any] = dict(scope='mmbasis', locations=['mmbasis'])

DATASETS = Registry('dataset', parent=registry.DATASETS, **_HOME)
HOOKS = Registry('hook', parent=registry.HOOKS, **_HOME)
MODELS = CompressedModels('model', parent=registry.MODELS, **_HOME)
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', parent=registry.OPTIM_WRAPPERS, **_HOME)
PLANNERS = Registry('planner', **_HOME)
#: kinds of dense layers, see :class:`mmbasis.layers.DenseKind`
LAYER_KINDS = Registry('layer kind', **_HOME)
#: ways to run a model, see :class:`mmbasis.running.Adapter`
ADAPTERS = Registry('adapter', **_HOME)
