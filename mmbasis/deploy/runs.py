# Copyright (c) mmbasis authors. All rights reserved.
"""One input through the exported graph and through the PyTorch model."""
import copy
import os.path as osp
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from .graphs import (
    Calls,
    flat_tensors,
    heads,
    is_of_regions,
    keep_outputs,
    read_taps,
)


def open_onnx(path: str) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        RuntimeError: If the file needs operators that ONNX Runtime lacks.
    """
    import onnx
    from mmdeploy.backend.onnxruntime import ORTWrapper
    try:
        return ORTWrapper(path, 'cpu').sess
    except Exception as error:  # its errors have no common class
        nodes = onnx.load(path, load_external_data=False).graph.node
        custom = sorted({
            f'{x.domain}::{x.op_type}'
            for x in nodes if x.domain not in ('', 'ai.onnx')
        })
        if not custom:
            raise
        raise RuntimeError(
            f'{osp.basename(path)} needs the custom operators '
            f'{", ".join(custom)}, which neither ONNX Runtime nor '
            f"MMDeploy's library for it has: {error}") from error


class Graph:
    """An exported file in ONNX Runtime, which also returns raw outputs.

    Args:
        path (str): The ONNX file.

    Raises:
        RuntimeError: If it needs operators that ONNX Runtime lacks and that
            do not stand behind all raw outputs.
    """

    def __init__(self, path: str) -> None:
        import onnx
        self.path, model = path, onnx.load(path)
        #: raw outputs by name, see :func:`mmbasis.deploy.graphs.tapped`
        self.taps: Dict[str, str] = read_taps(model)
        #: why only the part up to the raw outputs runs, if that is so
        self.skipped: Optional[str] = None
        self.outputs = [x.name for x in model.graph.output]
        try:
            self._open(model, [*self.outputs, *self.taps.values()])
        except RuntimeError as error:
            self.taps = {k: v for k, v in self.taps.items()
                         if not is_of_regions(k)}
            if not self.taps:
                raise
            self.skipped, self.outputs = str(error), []
            self._open(model, [*self.taps.values()])
        self.input = self._session.get_inputs()[0]

    def _open(self, model: Any, names: List[str]) -> None:
        import onnx
        with tempfile.TemporaryDirectory() as folder:
            path = osp.join(folder, osp.basename(self.path))
            onnx.save(keep_outputs(model, names), path)
            self._session = open_onnx(path)

    def run(self, x: Tensor) -> Tuple[Dict[str, Tensor], List[Tensor]]:
        """Raw outputs by name, and the outputs, of an input."""
        names = [x.name for x in self._session.get_outputs()]
        dtype = torch.float16 if 'float16' in self.input.type else x.dtype
        values = self._session.run(
            None, {self.input.name: x.to(dtype).numpy()})
        found = dict(zip(names, map(torch.from_numpy, values)))
        return ({k: found[v].to(x.dtype) if found[v].is_floating_point()
                 else found[v] for k, v in self.taps.items()},
                [found[k] for k in self.outputs])


@dataclass
class Reference:
    """What the untouched PyTorch model computes."""
    #: the samples that it returns
    predictions: Any = None
    #: outputs of the heads and, of those that see regions, inputs, by name
    tensors: Dict[str, Tensor] = field(default_factory=dict)
    #: module, and arguments, of each call of a head that sees regions
    calls: Dict[str, tuple] = field(default_factory=dict)


@torch.no_grad()
def run_pytorch(model: Any, inputs: Tensor, samples: list) -> Reference:
    """Run a model on a batch, of which everything is image, as the graph takes
    it: nothing is masked or cropped as padding.

    Args:
        model (nn.Module): Of MMPretrain or MMDetection.
        inputs (Tensor): ``(N, 3, H, W)``.
        samples (list): One of its data samples; not changed.
    """
    size = tuple(inputs.shape[-2:])
    samples = [copy.deepcopy(samples[0]) for _ in inputs]
    for sample in samples:
        sample.set_metainfo(dict(
            img_shape=size, ori_shape=size, pad_shape=size,
            batch_input_shape=size, scale_factor=(1., 1.)))
    found, calls = Reference(), Calls()

    def record(name: str, args: tuple, outputs: Any) -> None:
        call = calls.next(name)
        if is_of_regions(name):
            found.calls[call] = model.get_submodule(name), args
        for sign, values in (('<', args), (':', outputs)):
            for index, x in enumerate(flat_tensors(values)):
                # later steps may change it in place
                found.tensors[f'{call}{sign}{index}'] = x.clone()

    with ExitStack() as stack:
        for name, module in heads(model).items():
            handle = module.register_forward_hook(
                lambda _, *x, name=name: record(name, *x))
            stack.callback(handle.remove)
        found.predictions = model(inputs, samples, mode='predict')
    return found
