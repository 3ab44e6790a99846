# Copyright (c) mmbasis authors. All rights reserved.
"""PyTorch: TorchScript files, on CUDA if there is a device, else the CPU."""
import numpy as np

from .backends import Session
from .inputs import make_input
from .util import BenchError

_PRECISIONS = {
    'torch.float32': 'fp32',
    'torch.float16': 'fp16',
    'torch.bfloat16': 'bf16'
}


class TorchSession(Session):
    """A TorchScript module with one fixed input."""

    def __init__(self, module, data, device, info):
        super().__init__({'input': tuple(data.shape)}, info)
        self._module, self._data, self._device = module, data, device
        self.on_cpu = device == 'cpu'

    def infer(self):
        """Copies the input, runs the module, copies the output back."""
        import torch
        with torch.no_grad():
            return _to_host(self._module(self._data.to(self._device)))

    def close(self):
        """Drops the module."""
        self._module = None


def _to_host(value):
    # Copying waits for the device, so the time is that of the whole work.
    if isinstance(value, dict):
        return {k: _to_host(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_host(v) for v in value]
    return value.cpu()


def load(path, options):
    """Loads a TorchScript file.

    Args:
        path (str): saved by ``torch.jit.save``.
        options (Options): ``shapes`` must hold the shape of the input.

    Raises:
        BenchError: no shape, a precision that does not fit, or a bad file.
    """
    import torch
    if len(options.shapes) != 1:
        raise BenchError('a TorchScript file does not state the shape of its '
                         'input: give one --input-shape 1x3x224x224')
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if options.precision == 'int8' or (options.precision == 'fp16'
                                       and device == 'cpu'):
        raise BenchError('PyTorch on {} does not run {} here'.format(
            device, options.precision))
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        module = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as e:
        raise BenchError('{} is not a TorchScript file: {}. Save it by '
                         'torch.jit.trace(model, input).save(path)'.format(
                             path,
                             str(e).splitlines()[0])) from e
    dtypes = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = torch.half if options.precision == 'fp16' else \
        dtypes[0] if dtypes else torch.float32
    if options.precision == 'fp32' and dtype != torch.float32:
        raise BenchError('{} is stored in {}: leave out --precision'.format(
            path, str(dtype).replace('torch.', '')))
    data = torch.from_numpy(
        make_input('input',
                   list(options.shapes.values())[0], np.float32,
                   options.images))
    data = data.to(dtype)
    if options.precision == 'fp16':
        module = module.half()
    info = dict(
        version=torch.__version__,
        precision=_PRECISIONS.get(str(dtype), str(dtype)),
        device=device,
        threads=torch.get_num_threads())
    return TorchSession(module, data, device, info)
