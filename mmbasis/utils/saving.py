# Copyright (c) mmbasis authors. All rights reserved.
"""Checkpoints of MMEngine's runs that outlive them, whenever a run is killed.

Importing this completes MMEngine: files are written whole or not at all, a
checkpoint is removed after the one that replaces it is written, and holds
plain types and what else an exact resume needs.
"""
import os
import os.path as osp
import re
from contextlib import suppress
from functools import wraps
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch.nn as nn
from mmengine.dist import get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.utils import mkdir_or_exist

from .io import to_plain, whole_file, write_atomically
from .weights import load_from_file

#: where gradients stand in a checkpoint that were not used yet
ACCUMULATED_KEY = 'mmbasis_accumulated'
_ADVICE = ('Checkpoints at multiples of accumulative_counts iterations avoid '
           'that')
_NUMBERED = re.compile(r'(.*)_(\d+)\.pth')
_TEMPORARY = re.compile(r'(.*\.pth|last_checkpoint)\.tmp\d+')


@register_backend('local', force=True, prefixes='')
class WholeFileBackend(LocalBackend):
    """Local files, which are written whole or not at all."""

    def put(self, obj: bytes, filepath: Any) -> None:
        self._put(super().put, obj, filepath)

    def put_text(self, obj: str, filepath: Any, *args: Any,
                 **kwargs: Any) -> None:
        self._put(super().put_text, obj, filepath, *args, **kwargs)

    @staticmethod
    def _put(put: Callable, obj: Any, filepath: Any, *args: Any,
             **kwargs: Any) -> None:
        path = osp.realpath(filepath)  # a link stays one
        if osp.exists(path) and not osp.isfile(path):  # /dev/stdout
            return put(obj, filepath, *args, **kwargs)
        mkdir_or_exist(osp.dirname(path))
        with whole_file(path) as temporary:
            put(obj, temporary, *args, **kwargs)
        return None


class _LateRemoval:
    """A file backend that removes when it is told to.

    Args:
        backend (BaseStorageBackend): The backend.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._removed: List[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: Any) -> None:
        self._removed.append(str(path))

    rmtree = remove  # DeepSpeed saves folders

    def finish(self, kept: List[Optional[str]]) -> None:
        """Remove what was to be, except what was written again."""
        for path in set(self._removed) - set(kept):
            is_folder = self._backend.isdir(path)
            with suppress(FileNotFoundError):
                (self._backend.rmtree if is_folder else
                 self._backend.remove)(path)


def _removing_last(save: Callable) -> Callable:
    """Have a method of CheckpointHook remove after all is written."""

    @wraps(save)
    def method(self: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        backend = self.file_backend
        if isinstance(backend, _LateRemoval):  # inside of another
            return save(self, runner, *args, **kwargs)
        late = self.file_backend = _LateRemoval(backend)
        try:
            save(self, runner, *args, **kwargs)
        finally:
            self.file_backend = backend
        best = getattr(self, 'best_ckpt_path_dict', {}).values()
        late.finish(
            [self.last_ckpt, getattr(self, 'best_ckpt_path', None), *best])
        return None

    return method


def _save_with_step(self: Any, runner: Any, step: int, meta: dict) -> None:
    """MMEngine's, but ``last_checkpoint`` is written whole."""
    if self.max_keep_ckpts > 0 and (not self.keep_ckpt_ids
                                    or self.keep_ckpt_ids[-1] != step):
        if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
            outdated = self.file_backend.join_path(
                self.out_dir,
                self.filename_tmpl.format(self.keep_ckpt_ids.popleft()))
            if is_main_process():
                self.file_backend.remove(outdated)
        self.keep_ckpt_ids.append(step)
        runner.message_hub.update_info('keep_ckpt_ids',
                                       list(self.keep_ckpt_ids))
    name = self.filename_tmpl.format(step)
    self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
    runner.message_hub.update_info('last_ckpt', self.last_ckpt)
    runner.save_checkpoint(
        self.out_dir,
        name,
        self.file_client_args,
        save_optimizer=self.save_optimizer,
        save_param_scheduler=self.save_param_scheduler,
        meta=meta,
        by_epoch=self.by_epoch,
        backend_args=self.backend_args,
        **self.args)
    if is_main_process():
        write_atomically(
            osp.join(runner.work_dir, 'last_checkpoint'), self.last_ckpt)


def _before_train(before_train: Callable) -> Callable:

    @wraps(before_train)
    def method(self: Any, runner: Any) -> None:
        """MMEngine's, which removes what the checkpoint names: only what the
        run itself can have written."""
        hub = runner.message_hub
        for key, value in list(hub.runtime_info.items()):
            if key == 'keep_ckpt_ids':
                steps = value if isinstance(value, list) else []
                hub.update_info(key, [x for x in steps if type(x) is int])
            elif str(key).startswith('best_ckpt') and not _is_own(
                    value, self.out_dir or runner.work_dir, runner.work_dir):
                hub.pop_info(key)
        before_train(self, runner)
        _go_on_accumulating(runner, self._accumulated)
        self._accumulated = None

    return method


def _is_own(best: Any, out_dir: str, work_dir: str) -> bool:
    """Whether a path can be that of a best checkpoint of a run."""
    if not isinstance(best, str) or not osp.basename(best).startswith('best_'):
        return False
    run = osp.basename(osp.abspath(work_dir))
    return osp.abspath(osp.dirname(best)) in (
        osp.abspath(out_dir), osp.abspath(osp.join(out_dir, run)))


def _before_save(self: Any, runner: Any, checkpoint: dict) -> None:
    """Add the gradients of a run that accumulates them in one process, none at
    the end of an accumulation; and put everything into plain types, which are
    read as data."""
    if 'optimizer' in checkpoint:
        wrappers = _wrappers(runner)
        if any(map(_is_within, wrappers)) and get_world_size() > 1:
            runner.logger.warning(
                'Gradients are being accumulated, in each process its own: '
                'the run cannot be resumed from this checkpoint. %s', _ADVICE)
        elif any(x._accumulative_counts > 1 for x in wrappers):
            checkpoint[ACCUMULATED_KEY] = dict(
                counts=[x.inner_count for x in wrappers],
                gradients={
                    name: parameter.grad.detach().cpu().clone()
                    for name, parameter in _bare(runner).named_parameters()
                    if parameter.grad is not None})
    for key in ('meta', 'message_hub', 'param_schedulers'):
        if key in checkpoint:
            checkpoint[key] = to_plain(checkpoint[key])


def _after_load(self: Any, runner: Any, checkpoint: dict) -> None:
    self._accumulated = checkpoint.pop(ACCUMULATED_KEY, None)


def _go_on_accumulating(runner: Any, found: Optional[dict]) -> None:
    """Give the parameters the gradients that a checkpoint holds. Where it does
    not, or there are several processes, a RuntimeError is raised: the run
    would not be the one that was interrupted."""
    wrappers = _wrappers(runner)
    if not runner._resume or not (found or any(map(_is_within, wrappers))):
        return
    if found is None or get_world_size() > 1:
        why = 'it does not hold the gradients' if found is None else (
            'its gradients are those of one process, now there are several')
        raise RuntimeError(
            f'this checkpoint, of iteration {runner.iter}, was saved amid an '
            'accumulation of gradients (accumulative_counts='
            f'{wrappers[0]._accumulative_counts}), and {why}: it cannot be '
            'resumed exactly. Resume one whose iterations are a multiple, or '
            f'start from this one by load_from without resume. {_ADVICE}')
    for wrapper, count in zip(wrappers, found['counts']):
        wrapper._inner_count = count
    for name, parameter in _bare(runner).named_parameters():
        if name in found['gradients']:
            parameter.grad = found['gradients'][name].to(parameter)


def _is_within(wrapper: OptimWrapper) -> bool:
    """Whether an optimizer holds gradients that it has not used yet."""
    return wrapper.inner_count % wrapper._accumulative_counts != 0 and (
        wrapper.inner_count != wrapper._max_counts)


def _wrappers(runner: Any) -> List[OptimWrapper]:
    whole = runner.optim_wrapper
    if isinstance(whole, OptimWrapperDict):
        return list(whole.values())
    return [whole] if isinstance(whole, OptimWrapper) else []


def _bare(runner: Any) -> nn.Module:
    model = runner.model
    return model.module if is_model_wrapper(model) else model


def find_resumable(work_dir: str) -> Optional[str]:
    """Find the newest checkpoint of a run that can be resumed.

    That is the one that ``last_checkpoint`` names, or one that was written
    whole after it; and if it cannot be read, the newest that can. Temporary
    files that a killed run left are removed.

    Args:
        work_dir (str): The folder of the run.

    Returns:
        str, optional: The file; None if there is no checkpoint.

    Raises:
        RuntimeError: If there are checkpoints, but none can be read.
    """
    tried: List[str] = []
    for file in _candidates(work_dir):
        problem = _problem_of(file)
        if problem is None:
            if tried:
                MMLogger.get_current_instance().warning(
                    'The run is resumed from %s. What was trained after it is '
                    'lost: %s', file, '; '.join(tried))
            return file
        tried.append(f'{file}: {problem}')
    if tried:
        raise RuntimeError(
            f'{work_dir} holds no checkpoint that can be resumed: '
            f'{"; ".join(tried)}. Give another one, or remove these to start '
            'again')
    return None


def _candidates(work_dir: str) -> List[str]:
    """The checkpoints of a run, the newest first."""
    named = _last_checkpoint(work_dir)
    folder = osp.dirname(named) if named else work_dir
    match = _NUMBERED.fullmatch(osp.basename(named or ''))
    kinds = [match[1]] if match else ['epoch', 'iter']
    ages: Dict[str, Tuple[float, int]] = {}
    for name in os.listdir(folder) if osp.isdir(folder) else ():
        path, match = osp.join(folder, name), _NUMBERED.fullmatch(name)
        if match and match[1] in kinds:
            ages[path] = osp.getmtime(path), int(match[2])
        elif _TEMPORARY.fullmatch(name) and is_main_process():
            with suppress(FileNotFoundError):
                os.remove(path)
    order = sorted(ages, key=lambda x: ages[x], reverse=True)
    if named:  # a new run in an old folder: the old one may have gone further
        now = ages.get(named, (float('inf'), 0))
        later = [x for x in order
                 if ages[x][0] >= now[0] and ages[x][1] > now[1]]
        order = list(dict.fromkeys([*later, named, *order]))
    return order


def _last_checkpoint(work_dir: str) -> Optional[str]:
    """What ``last_checkpoint`` names, also after the folder was moved."""
    try:
        with open(osp.join(work_dir, 'last_checkpoint'),
                  encoding='utf-8') as file:
            named = file.read().strip()
    except (FileNotFoundError, UnicodeDecodeError):
        return None
    moved = osp.join(work_dir, osp.basename(named))
    return named if osp.isfile(named) or not osp.isfile(moved) else moved


def _problem_of(file: str) -> Optional[str]:
    """Why a checkpoint cannot be resumed."""
    try:
        meta = load_from_file(file, 'cpu')['meta']
        return None if {'epoch', 'iter'} <= set(meta) else (
            'it is not a checkpoint of a run')
    except Exception as error:
        reason = f'{type(error).__name__}: {error}'.partition('\n')[0]
        return f'it cannot be read, it may be truncated ({reason})'


def _complete_mmengine() -> None:
    if hasattr(CheckpointHook, '_accumulated'):
        return
    hook: Any = CheckpointHook
    hook._accumulated = None
    hook.before_train = _before_train(hook.before_train)
    hook.before_save_checkpoint = _before_save
    hook.after_load_checkpoint = _after_load
    hook._save_checkpoint_with_step = _removing_last(_save_with_step)
    hook._save_best_checkpoint = _removing_last(hook._save_best_checkpoint)


_complete_mmengine()
