# Copyright (c) mmbasis authors. All rights reserved.
"""A process of its own for each model, with limits on memory and time."""
import ctypes
import faulthandler
import gc
import importlib
import multiprocessing
import os
import os.path as osp
import resource
import signal
import sysconfig
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from typing import Any, Callable, Dict, Iterator, List, Sequence, Tuple

import torch
from mmengine.logging import MMLogger

from .checks import CatalogueError, Checked, describe
from .configs import LIBRARIES, Entry, config_root, read_config
from .operators import install

_PR_SET_PDEATHSIG = 1

#: who is to blame, by what the dense model's error says; the first counts
CAUSES = (
    ('optional dependency', ('install', 'ImportError', 'ModuleNotFoundError',
                             'No module named', 'multi-modal dependencies')),
    ('needs a download',
     ('URLError', 'ConnectionError', 'MaxRetryError', 'OfflineMode',
      "couldn't connect", 'Name or service not known')),
    ('needs a GPU',
     ('is not implemented for CPU', 'implementation for device',
      'Default process group', 'CUDA', 'not compiled with', 'GPU', 'on CPU')),
    ('memory limit', ('MemoryError', "can't allocate memory",
                      'not enough memory', 'Cannot allocate memory')),
)


def cause_of(error: str, step: str) -> str:
    """The kind of an error of the catalogue's own."""
    for cause, signs in CAUSES:
        if any(sign in error for sign in signs):
            return cause
    return ('the config is broken'
            if step in ('read', 'build') else 'the dense model does not run')


def check(entry: Entry, report: Callable[[str], None]) -> Dict[str, Any]:
    """Check one model.

    Returns:
        dict: The facts, and ``status``: ``passed``, ``failed`` (by us),
        ``catalogue`` (the dense model fails) or ``limit``; with ``cause``
        and ``error``.
    """
    start = time.time()
    facts: Dict[str, Any] = dict(step='read')
    result: Dict[str, Any] = dict(status='passed')
    try:
        if entry.error:
            raise CatalogueError(entry.error)
        cfg = read_config(entry.library, entry.configs[0])
        checked = Checked(entry.library, cfg, report, entry.thorough)
        facts = checked.facts
        checked.run()
    except CatalogueError as error:
        result = dict(status='catalogue', error=str(error))
        result['cause'] = cause_of(str(error), facts['step'])
    except BaseException as error:
        text = describe(error)
        result = dict(status='failed', error=text, cause='ours')
        result['traceback'] = traceback.format_exc()[-3000:]
    if cause_of(result.get('error', ''), facts['step']) == 'memory limit':
        result.update(status='limit', cause='memory limit')
    for key in result.keys() & {'error', 'traceback'}:
        result[key] = without_folders(result[key])
    return dict(
        result,
        **facts,
        seconds=round(time.time() - start, 1),
        cpu_seconds=round(time.process_time(), 1))


def without_folders(text: str) -> str:
    """A message without the folders of this machine that packages are in."""
    root = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
    folders = {*sysconfig.get_paths().values(), root}
    for folder in sorted(folders, key=len, reverse=True):
        text = text.replace(folder + os.sep, '')
    return text


def _child(entry: Entry, connection: Connection, memory_gb: float,
           seconds: float, work: Callable) -> None:
    # nobody waits for the result when the parent is killed
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    warnings.simplefilter('ignore')
    faulthandler.disable()
    MMLogger.get_instance('mmengine', log_level='ERROR')
    torch.set_num_threads(1)
    limit = int(_address_space() + memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    limit = max(1, round(seconds))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    # some configs name others from where the library's repository lies
    os.chdir(osp.dirname(config_root(entry.library)))
    connection.send(work(entry, connection.send))


def _address_space() -> int:
    """What the process maps already: libraries, mostly."""
    with open('/proc/self/statm') as file:
        return int(file.read().split()[0]) * resource.getpagesize()


class _Running:
    """A process at work on one model."""

    def __init__(self, entry: Entry, memory_gb: float, seconds: float,
                 work: Callable) -> None:
        context = multiprocessing.get_context('fork')
        self.entry, self.step, self.start = entry, 'start', time.time()
        self.seconds = seconds
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_child, args=(entry, theirs, memory_gb, seconds, work))
        self.process.start()
        theirs.close()

    def result(self) -> Dict[str, Any]:
        """The result, empty while there is none."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if isinstance(message, dict):
                    return self._finish(message)
                self.step = message
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            text = f'the process died with exit code {code}'
            if -code == signal.SIGXCPU:
                return self._finish(self._late())
            if -code in (signal.SIGKILL, signal.SIGABRT):
                # by the system, or by C++ that got no memory
                return self._finish(self._died('limit', 'memory limit', text))
            return self._finish(self._died('failed', 'ours', text))
        # a process that waits takes no CPU time
        if time.time() - self.start > 10 * self.seconds:
            self.process.kill()
            return self._finish(self._late())
        return {}

    def _late(self) -> Dict[str, Any]:
        return self._died('limit', 'time limit',
                          f'longer than {self.seconds:.0f} s')

    def _died(self, status: str, cause: str, error: str) -> Dict[str, Any]:
        return dict(
            status=status,
            cause=cause,
            error=error,
            step=self.step,
            built=self.step not in ('start', 'read', 'build'),
            seconds=round(time.time() - self.start, 1))

    def _finish(self, result: Dict[str, Any]) -> Dict[str, Any]:
        self.process.join()
        self.connection.close()
        return result


def load_libraries() -> None:
    """Import what the models need, once for all processes."""
    os.environ.update(HF_HUB_OFFLINE='1', TRANSFORMERS_OFFLINE='1')
    for library in LIBRARIES:
        for part in ('datasets', 'models'):
            importlib.import_module(f'{library}.{part}')
    install()
    gc.freeze()  # what is there by now is not looked at again and again


def check_all(entries: Sequence[Entry],
              jobs: int = 1,
              memory_gb: float = 6,
              seconds: float = 600,
              work: Callable = check
              ) -> Iterator[Tuple[Entry, Dict[str, Any]]]:
    """Check models in processes of their own.

    Args:
        entries (Sequence[Entry]): The models.
        jobs (int): How many at a time. Defaults to 1.
        memory_gb (float): What each may allocate. Defaults to 6.
        seconds (float): CPU time that each may take. Defaults to 600.
        work (Callable): What is done with each, see :func:`check`.

    Yields:
        tuple[Entry, dict]: Model and result, in the order in which they are
        ready.
    """
    load_libraries()
    waiting = list(entries)
    running: List[_Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(
                    _Running(waiting.pop(0), memory_gb, seconds, work))
            time.sleep(.1)
            for one in list(running):
                result = one.result()
                if result:
                    running.remove(one)
                    yield one.entry, result
    finally:
        for one in running:
            one.process.kill()
