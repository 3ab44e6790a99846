# Copyright (c) mmbasis authors. All rights reserved.
"""What the processes of a distributed run do together, and how they end
together: every meeting has a name and a time limit.

All of it goes over a group of its own, by gloo, whatever the run uses for its
gradients: gloo notices at once that a process has died, keeps its time limit
on every step, and leaves no kernel behind on a GPU.
"""
import math
import os
import weakref
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Callable, Iterator, List, NamedTuple, Optional

import torch
import torch.distributed as dist
from mmengine.dist import get_rank, get_world_size
from torch import Tensor

#: seconds that processes wait for each other: a data pass of one may take that
#: much longer than that of another
TIMEOUT_KEY, TIMEOUT = 'MMBASIS_DIST_TIMEOUT', 1800.

# in the store of the run, by rank: to how many steps it came, and the last
_COUNT, _STEP = 'mmbasis/{}/count', 'mmbasis/{}/step'


class ProcessError(RuntimeError):
    """Another process failed, does not come, or does something else."""


class _Note(NamedTuple):
    """What a process says when it comes to a step."""
    step: str
    value: Any
    #: the step in which it failed, and with what
    failed: Optional[str] = None


class _State:
    """Of this process. The group itself belongs to PyTorch: what we held, its
    threads would not survive the interpreter."""
    group: Callable[[], Any] = staticmethod(lambda: None)
    count = 0
    shares_errors = False


def time_limit() -> float:
    """Seconds that processes wait for each other, ``$MMBASIS_DIST_TIMEOUT`` or
    1800; a :class:`ValueError` unless it is a positive number."""
    text = os.environ.get(TIMEOUT_KEY, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f'{TIMEOUT_KEY} is {text!r}: give a positive number '
                         'of seconds that processes wait for each other')
    return seconds


def together(step: str, value: Any = None) -> List[Any]:
    """What each process has to say at a step that all of them come to.

    Args:
        step (str): What is being done, for the error.
        value (Any): A small value that can be pickled. Defaults to None.

    Returns:
        list: The values by rank; the value alone where there is one process.

    Raises:
        ProcessError: On all processes, if one failed, came to another step,
            died, or did not come within :func:`time_limit`.
    """
    if get_world_size() == 1:
        return [value]
    return [x.value for x in _exchange(_Note(step, value))]


def sum_over_processes(step: str, *tensors: Tensor, op: str = 'sum') -> None:
    """Add up tensors over processes, in place.

    Args:
        step (str): What is being done, for the error.
        *tensors (Tensor): Floating-point, of the same shapes on all
            processes.
        op (str): Or their ``'mean'``, ``'max'``. Defaults to ``'sum'``.

    Raises:
        ProcessError: As in :func:`together`, and if shapes differ.
    """
    world = get_world_size()
    if world == 1:
        return
    shapes = together(step, [tuple(x.shape) for x in tensors])
    if any(x != shapes[0] for x in shapes):
        raise ProcessError(f'{step}: processes have other shapes, by rank '
                           f'{shapes}')
    code = dist.ReduceOp.MAX if op == 'max' else dist.ReduceOp.SUM
    for tensor in tensors:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        sent = tensor.detach().to('cpu', dtype).contiguous()
        with _named(step):
            dist.all_reduce(sent, code, _State.group())
        if op == 'mean':
            sent = sent / world
        tensor.detach().copy_(sent)


@contextmanager
def shared_errors(step: str) -> Iterator[None]:
    """What one process raises inside, ends all of them at the next step that
    they come to, with the cause. Nothing inside may wait for other processes
    but by this module. Inside of another such block it does nothing.

    Args:
        step (str): What is being done, for the error.

    Raises:
        ProcessError: If another process failed; see :func:`together`.
    """
    if get_world_size() == 1 or _State.shares_errors:
        yield
        return
    together(f'start of {step}')  # a death is noticed from here on
    _State.shares_errors = True
    try:
        yield
        together(f'end of {step}')
    except ProcessError:
        raise  # all know
    except Exception as error:
        _tell(step, error)
        raise
    finally:
        _State.shares_errors = False


def _tell(step: str, error: Exception) -> None:
    """Let the others know of an error, which is raised in any case."""
    failed = f'{type(error).__name__}: {error}'
    with suppress(ProcessError):  # they failed, too, or are gone
        _exchange(_Note(step, None, failed))


def _exchange(note: _Note) -> List[_Note]:
    """The notes of all processes, if all of them are well and came to the same
    step."""
    notes: List[Any] = [None] * get_world_size()
    with _named(note.step):
        _join(note.step)
        dist.all_gather_object(notes, note, _State.group())
    failed = [f'rank {rank} failed in {x.step}: {x.failed}'
              for rank, x in enumerate(notes) if x.failed is not None]
    if failed:
        raise ProcessError('; '.join(failed))
    if any(x.step != note.step for x in notes):
        steps = ', '.join(f'rank {i}: {x.step}' for i, x in enumerate(notes))
        raise ProcessError(f'processes came to different steps ({steps}): '
                           'their data or models differ')
    return notes


def _join(step: str) -> None:
    """Say how far this process is, and make the group if there is none."""
    store, rank = _store(), get_rank()
    store.set(_STEP.format(rank), step)
    _State.count = store.add(_COUNT.format(rank), 1)
    if _State.group() is None:
        limit = timedelta(seconds=time_limit())
        store.wait([_STEP.format(x) for x in range(get_world_size())], limit)
        _State.group = weakref.ref(
            dist.new_group(backend='gloo', timeout=limit))


def _store() -> Any:
    """The store of the run, where processes leave notes."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def _named(step: str) -> Iterator[None]:
    """Say in which step processes lost each other, and which of them."""
    try:
        yield
    except RuntimeError as error:  # PyTorch has no class for most of these
        first, *_ = str(error).splitlines() or ['']
        raise ProcessError(
            f'rank {get_rank()} waited in {step}, but {_missing()} (waited '
            f'for at most {time_limit():g} s, {TIMEOUT_KEY}: {first[:300]})'
        ) from error


def _missing() -> str:
    """Which processes are behind, and where they were last."""
    found = []
    try:
        store = _store()
        for rank in range(get_world_size()):
            count = store.add(_COUNT.format(rank), 0)  # get() would wait
            if count < _State.count:
                found.append(f'rank {rank} did not come: it was last in ' + (
                    store.get(_STEP.format(rank)).decode() if count else
                    'nothing'))
    except RuntimeError:
        found.append('rank 0, which keeps the books of the run, is gone')
    return '; '.join(found) or 'a process went away in the middle of it'
