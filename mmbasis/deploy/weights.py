# Copyright (c) mmbasis authors. All rights reserved.
"""Does an exported graph hold the weights that the plan says, and no dense
ones in their place?"""
import copy
from typing import Any, Callable, Dict, Iterable, List, Sequence

import numpy as np
import torch
import torch.nn as nn

from ..compression.surgery import basis_layers
from ..layers import BasisLayer
from .export import Deployment

#: smallest cosine between rows of weights that are the same
_COSINE = 1 - 1e-5


def check_weights(deployment: Deployment,
                  files: Sequence[str]) -> Dict[str, Any]:
    """Look for the weights of all basis layers in exported files, by shape and
    value. Exporters fold normalizations into the last part of a layer, which
    scales its rows.

    Args:
        deployment (Deployment): What was exported, in fp32 or fp16.
        files (Sequence[str]): The ONNX files.

    Returns:
        dict: ``params`` that the files hold, ``planned`` ones of the weights
        of basis layers among them, and ``unused``: layers that take no part
        in prediction and are not in the files.

    Raises:
        RuntimeError: If a layer is missing, or dense weights stand in its
            place.
    """
    planned = {name: copy.deepcopy(layer).fold_norm()
               for name, layer in basis_layers(deployment.model)}
    model = deployment.build_rewritable()
    exported = dict(basis_layers(model))
    lost = sorted(planned.keys() - exported.keys())
    if lost:
        raise RuntimeError(
            f'MMDeploy merged {len(lost)} basis layers before the export '
            f'({", ".join(lost[:3])}, …): the graph would be that of another '
            'network. Does a method of the model merge its branches that '
            'mmbasis/compression/merging.py does not know?')
    tensors = [x for path in files for x in read_floats(path)]
    unused = [name for name, layer in planned.items()
              if not _holds(tensors, layer)]
    if unused:
        _check_replaced(planned, unused, tensors, model)
    return dict(
        params=sum(x.size for x in tensors),
        planned=sum(x.numel() for name, layer in planned.items()
                    if name not in unused for x in layer.weights),
        unused=unused)


def read_floats(path: str) -> List[np.ndarray]:
    """The floating-point tensors that an ONNX file holds and uses."""
    import onnx
    from onnx.numpy_helper import to_array
    graph = onnx.load(path).graph
    used = {name for node in graph.node for name in node.input}
    values = [x for x in graph.initializer if x.name in used]
    for node in graph.node:
        if node.op_type == 'Constant':
            values += [x.t for x in node.attribute if x.name == 'value']
    arrays = map(to_array, values)
    return [x for x in arrays if np.issubdtype(x.dtype, np.floating)]


def _check_replaced(planned: Dict[str, BasisLayer], missing: List[str],
                    tensors: List[np.ndarray], model: nn.Module) -> None:
    """Raise an error if weights that other layers of the model do not have
    stand where layers are missing."""
    own = {x for name in missing for x in model.get_submodule(name).weights}
    known = _arrays(x for x in model.parameters()
                    if x.dim() > 1 and x not in own)
    strange = [x.shape for x in tensors if x.ndim > 1
               and not any(_is_like(x, y) for y in known)]
    for name in missing:
        dense = tuple(planned[name].weight.shape[:2])
        shapes = [tuple(x.shape) for x in planned[name].weights]
        found = [x for x in strange if x[:2] in (dense, dense[::-1])
                 or x in shapes or x[::-1] in shapes]
        if found:
            raise RuntimeError(
                f'the graph does not hold the basis layer {name}, whose '
                f'weights are of shapes {shapes}; found weights of shape '
                f'{found[0]} that are not of the model ({len(missing)} of '
                f'{len(planned)} layers are missing). The file is of another '
                'model, or a rewriter merged the layer')


def _arrays(weights: Iterable[torch.Tensor]) -> List[np.ndarray]:
    return [x.detach().cpu().numpy() for x in weights]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    """To the precision of fp16."""
    return bool(np.abs(a - b).max() <= 1e-3 * np.abs(b).max())


def _parallel(a: np.ndarray, b: np.ndarray) -> bool:
    """But for a factor for each row."""
    a, b = [x.reshape(len(x), -1).astype(float) for x in (a, b)]
    of_a, of_b = [np.linalg.norm(x, axis=1) for x in (a, b)]
    alike = np.abs((a * b).sum(1)) >= _COSINE * of_a * of_b
    return bool((alike & ((of_a > 0) == (of_b > 0))).all())


def _is_like(tensor: np.ndarray, weight: np.ndarray,
             alike: Callable[..., bool] = _parallel) -> bool:
    """Whether a tensor is a weight; linear layers are exported transposed."""
    if tensor.shape == weight.shape and alike(tensor, weight):
        return True
    return (tensor.ndim == 2 and tensor.shape[::-1] == weight.shape
            and alike(tensor.T, weight))


def _holds(tensors: List[np.ndarray], layer: BasisLayer) -> bool:
    *first, last = _arrays(layer.weights)
    return any(_is_like(x, last) for x in tensors) and all(
        any(_is_like(x, weight, _equal) for x in tensors) for weight in first)
