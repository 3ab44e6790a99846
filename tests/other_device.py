# Copyright (c) mmbasis authors. All rights reserved.
"""A device that is not the CPU, on a machine that has no other.

Tensors on it say that they are on ``meta`` (which, alone of the devices that
are not there, has autograd), but hold values, which are computed on the CPU.
As on a GPU, an operator refuses tensors of two devices, unless one is a
number.
"""
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from mmbasis.running.passes import Pass

OTHER = torch.device('meta')
aten = torch.ops.aten
#: these take tensors of one device and fill those of another
MOVES = {aten.copy_.default, aten._to_copy.default}
#: indices may be on the CPU
INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default,
         aten._index_put_impl_.default}


class There(torch.Tensor):
    """A tensor on the other device."""

    # not among attributes that users copy from tensor to tensor
    __slots__ = ('value', )

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(),
            storage_offset=value.storage_offset(), dtype=value.dtype,
            device=OTHER)

    def __init__(self, value):
        self.value = value

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    given = [x for x in tree_flatten((args, kwargs))[0]
             if isinstance(x, torch.Tensor)]
    wanted = kwargs.get('device')
    there = any(isinstance(x, There) for x in given)
    if func not in MOVES and there:
        first = [args[0]] if func in INDEX else given
        wrong = [x for x in first if not isinstance(x, There) and x.dim()]
        if wrong:
            raise RuntimeError(
                f'{func}: expected all tensors to be on the same device, but '
                f'found {[tuple(x.shape) for x in wrong]} on the CPU')
    out = there if wanted is None else torch.device(wanted) == OTHER
    if wanted is not None:
        kwargs = dict(kwargs, device='cpu')
    bare = tree_map(lambda x: x.value if isinstance(x, There) else x,
                    (args, kwargs))
    result = func(*bare[0], **bare[1])
    # operators in place return what they were given
    known = {id(x.value): x for x in given if isinstance(x, There)}

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        if id(x) in known:
            return known[id(x)]
        return There(x) if out else x

    return tree_map(wrap, result)


class Elsewhere(TorchDispatchMode):
    """Makes tensors on the other device where ``device`` says so."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


@contextmanager
def other_device():
    """The other device, also in the threads of passes."""
    run = Pass._run

    def elsewhere(self):
        with Elsewhere():
            run(self)

    with Elsewhere(), patch.object(Pass, '_run', elsewhere):
        yield OTHER
