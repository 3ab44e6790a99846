# Copyright (c) mmbasis authors. All rights reserved.
"""Registries of mmbasis: children of MMEngine's, in the scope ``mmbasis``."""
from typing import Any, Callable, Optional, Union

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


DATASETS = Registry('dataset', parent=registry.DATASETS, scope='mmbasis')
HOOKS = Registry('hook', parent=registry.HOOKS, scope='mmbasis')
MODELS = CompressedModels('model', parent=registry.MODELS, scope='mmbasis')
OPTIM_WRAPPERS = Registry(
    'optim_wrapper', parent=registry.OPTIM_WRAPPERS, scope='mmbasis')
PLANNERS = Registry('planner', scope='mmbasis')
#: kinds of dense layers, see :class:`mmbasis.layers.DenseKind`
LAYER_KINDS = Registry('layer kind', scope='mmbasis')
#: ways to run a model, see :class:`mmbasis.running.Adapter`
ADAPTERS = Registry('adapter', scope='mmbasis')
