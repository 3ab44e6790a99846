# Copyright (c) mmbasis authors. All rights reserved.
"""Several processes end alike, whatever happens to one of them: in time, and
with the cause. They are real ones, over gloo."""
import multiprocessing
import os
import re
import signal
import socket
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import mmbasis
from mmbasis.hooks.compression_hook import _check_teachers
from mmbasis.models import BasisModel
from mmbasis.utils import collectives
from tests.toy import ToyNet, dense_checkpoint, run, toy_cfg

#: seconds in which all processes end
LIMIT = 60
PLANNER = dict(type='BudgetPlanner', macs=.5)


def main(rank, world, port, limit, path, function, args):
    """One of several processes; leaves what it returned or raised."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
        MMBASIS_DIST_TIMEOUT=str(limit))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if function is not train:  # MMEngine does it itself
        dist.init_process_group('gloo')
    try:
        found = function(rank, *args)
    except Exception as error:
        found = f'{type(error).__name__}: {error}'
    torch.save(found, f'{path}.{rank}')


def outcome(tmp_path, world, function, *args, limit=20.):
    """What each process returned or, as a text, raised; its exit code where it
    was killed. All must end in time."""
    # one server imports everything, and processes are copies of it
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['mmbasis', 'tests.toy'])
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    path = tmp_path / f'outcome_{port}'
    started = [
        context.Process(target=main, daemon=True, args=(
            rank, world, port, limit, str(path), function, args))
        for rank in range(world)]
    for process in started:
        process.start()
    deadline, found = time.monotonic() + LIMIT, []
    for rank, process in enumerate(started):
        process.join(max(deadline - time.monotonic(), 0))
        if process.exitcode is None:
            process.kill()
            found.append('it hangs')
        elif process.exitcode:
            found.append(process.exitcode)
        else:
            found.append(torch.load(f'{path}.{rank}', weights_only=True))
    assert 'it hangs' not in found
    return found


def small_model():
    torch.manual_seed(0)  # the same in all processes, whatever they did before
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 4, 3), nn.Flatten(2)).eval()


def images_of(rank, world, count=9):
    """Of this process, in batches of one: some have one more."""
    images = torch.rand(
        count, 1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return [*images[rank::world]]


def compress(rank, model, batches, num_batches=None, **options):
    options.setdefault('planner', PLANNER)
    return mmbasis.compress(model, options.pop('planner'), batches,
                            num_batches, **options)


def held_out_on_one(rank, hurried):
    """The first process has a batch left to choose by, the others have none:
    the answer to both is in the weights."""
    model = small_model()
    compress(rank, model, images_of(rank, dist.get_world_size()),
             9 // dist.get_world_size(), reconstruction=hurried)
    return model.state_dict()


@pytest.mark.parametrize('world, reconstruction', [
    (2, 'local'),
    (2, 'sequential'),
    pytest.param(4, 'sequential', marks=pytest.mark.attack),
])
def test_a_held_out_batch_on_one_process(tmp_path, world, reconstruction):
    first, *others = outcome(
        tmp_path, world, held_out_on_one, reconstruction)
    assert any('basis' in key for key in first)
    for other in others:
        torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-6)


def fault(rank, kind, where):
    """Something is wrong in one process. What each raises, and whether the
    model is as before and can still be compressed."""
    model, batches = small_model(), images_of(rank, dist.get_world_size(), 8)
    options = {}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    if rank == where and kind == 'weights':
        with torch.no_grad():
            model[3].weight[0, 0] = torch.nan
        before = None
    elif rank == where and kind == 'loader':
        batches = broken(batches)
    elif rank == where and kind == 'empty':
        batches = []
    elif rank == where and kind == 'images':
        batches[1] = batches[1] * torch.nan
    elif rank == where and kind == 'request':
        options = dict(planner=dict(type='FixedPlanner', ranks={'x': 3}))
    elif rank == where and kind == 'size':
        batches[1] = torch.rand(1, 5, 12, 12)
    with pytest.raises((ValueError, RuntimeError, OSError)) as caught:
        compress(rank, model, batches, **options)
    if before is not None:
        after = model.state_dict()
        assert all(map(torch.equal, before.values(), after.values()))
    plan = compress(rank, small_model(), images_of(rank, 8, 8))
    return f'{caught.type.__name__}: {caught.value}', len(plan.layers)


def broken(batches):
    yield batches[0]
    raise OSError('image_7.jpg cannot be read')


FAULTS = dict(
    weights='ValueError: weights are NaN or infinite in 3.weight',
    loader='OSError: image_7.jpg cannot be read',
    empty='saw no image',
    request='x.*match',
    size='RuntimeError.*channels')


def faults(rank, where):
    return {kind: fault(rank, kind, where) for kind in FAULTS}


@pytest.mark.parametrize('world, where', [
    (2, 1),
    (2, 0),
    pytest.param(4, 2, marks=pytest.mark.attack),
])
def test_a_fault_in_one_process_ends_all_with_its_cause(
        tmp_path, world, where):
    found = outcome(tmp_path, world, faults, where)
    assert not any(isinstance(x, str) for x in found), found
    for rank, by_kind in enumerate(found):
        for kind, words in FAULTS.items():
            text, layers = by_kind[kind]
            assert re.search(words, text, re.S), (rank, kind, text)
            assert layers > 0
            if rank != where:
                assert text.startswith(
                    f'ProcessError: rank {where} failed in compression')


def nan_images(rank):
    return fault(rank, 'images', 1)


def test_images_that_are_not_finite_in_one_process(tmp_path):
    for text, layers in outcome(tmp_path, 2, nan_images):
        assert re.match('(ValueError|ProcessError).* NaN', text, re.S), text
        assert layers > 0


def ways(rank):
    """The module itself."""
    world = dist.get_world_size()
    x, y, z = (torch.tensor([float(rank), 1.]) for _ in range(3))
    collectives.sum_over_processes('sum', x, y)
    collectives.sum_over_processes('mean', y, op='mean')
    collectives.sum_over_processes('max', z, op='max')
    found = dict(sums=x, means=y, largest=z,
                 told=collectives.together('talk', dict(a=rank)), errors=[])
    with pytest.raises(collectives.ProcessError) as caught:
        collectives.sum_over_processes('shapes', torch.zeros(1 + rank))
    found['errors'].append(str(caught.value))
    with pytest.raises(collectives.ProcessError) as caught:
        collectives.together('left' if rank else 'right')
    found['errors'].append(str(caught.value))
    with pytest.raises((collectives.ProcessError, KeyError)) as caught, (
            collectives.shared_errors('inner')), (
                collectives.shared_errors('nested')):
        if rank == world - 1:
            raise KeyError('lost')
    found['errors'].append(str(caught.value))
    return found


@pytest.mark.parametrize(
    'world', [2, pytest.param(4, marks=pytest.mark.attack)])
def test_what_processes_do_together(tmp_path, world):
    total = world * (world - 1) / 2
    for rank, found in enumerate(outcome(tmp_path, world, ways)):
        assert found['sums'].tolist() == [total, world]
        assert found['means'].tolist() == [total, world]
        assert found['largest'].tolist() == [world - 1, 1]
        assert found['told'] == [dict(a=x) for x in range(world)]
        shapes, steps, cause = found['errors']
        assert shapes.startswith('shapes: processes have other shapes')
        assert 'rank 0: right, rank 1: left' in steps
        assert 'lost' in cause
        if rank < world - 1:
            assert cause == (f"rank {world - 1} failed in inner: "
                             "KeyError: 'lost'")


class Trap:
    """Stops a process when it comes to a step."""

    def __init__(self, count, act):
        self.left, self.act = count, act
        self.exchange = collectives._exchange

    def __call__(self, note):
        if self.left == 0:
            self.act()
        self.left -= 1
        return self.exchange(note)


def trapped(rank, where, count, seconds):
    """One process is killed or sleeps at its Nth step; says what the others
    raise, and how many steps there are."""
    trap = Trap(count if rank == where else -1, (
        (lambda: time.sleep(seconds)) if seconds else
        (lambda: os.kill(os.getpid(), signal.SIGKILL))))
    collectives._exchange = trap
    start, text = time.monotonic(), ''
    try:
        compress(rank, small_model(),
                 images_of(rank, dist.get_world_size(), 8), 1)
    except collectives.ProcessError as error:
        text = str(error)
    return dict(text=text, seconds=time.monotonic() - start,
                steps=-1 - trap.left)


def check_death(found, where):
    assert found.pop(where) == -signal.SIGKILL
    for one in found:
        assert re.match(r'rank \d waited in .+, but ', one['text']), one
        assert one['seconds'] < LIMIT / 2


@pytest.mark.parametrize('world, where, count', [(2, 1, 3), (2, 0, 8),
                                                 (4, 1, 20)])
def test_a_process_that_dies(tmp_path, world, where, count):
    """With a time limit that is never reached: the death itself is seen."""
    found = outcome(tmp_path, world, trapped, where, count, 0, limit=1000.)
    check_death(found, where)
    if where:
        assert any(f'rank {where} did not come: it was last in' in x['text']
                   for x in found)


@pytest.mark.attack
@pytest.mark.parametrize('world', [2, 4])
def test_a_process_that_dies_at_any_step(tmp_path, world):
    steps = outcome(tmp_path, world, trapped, 0, -1, 0)[0]['steps']
    assert steps > 30
    for count in range(1, steps):
        where = count % world
        found = outcome(
            tmp_path, world, trapped, where, count, 0, limit=1000.)
        check_death(found, where)


def test_a_process_that_does_not_come(tmp_path):
    found = outcome(tmp_path, 2, trapped, 1, 5, 8, limit=2.)
    assert re.match('rank 0 waited in .+, but rank 1 did not come: it was '
                    'last in .*2 s, MMBASIS_DIST_TIMEOUT', found[0]['text'])
    assert found[0]['seconds'] < 8
    assert 'rank 1 waited in' in found[1]['text']


@pytest.mark.parametrize('value', ['soon', '0', '-3', 'nan', 'inf'])
def test_a_time_limit_that_is_none(monkeypatch, value):
    monkeypatch.setenv('MMBASIS_DIST_TIMEOUT', value)
    with pytest.raises(ValueError, match=f"MMBASIS_DIST_TIMEOUT is '{value}'"):
        collectives.time_limit()


class Regressor(ToyNet):
    """Has a loss in all processes but one."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        y = super().forward(inputs)
        if mode == 'loss':
            if dist.get_rank() == 1:
                raise NotImplementedError('no annotations')
            return dict(loss=y.square().mean())
        return list(y) if mode == 'predict' else y.unsqueeze(-1)


def no_loss_on_one(rank):
    generator = torch.Generator().manual_seed(rank)
    batches = [dict(inputs=torch.rand(4, 3, 8, 8, generator=generator),
                    data_samples=None) for _ in range(2)]
    wanted = dict(PLANNER, loss_aware=True)
    with pytest.raises(ValueError) as caught:
        compress(rank, Regressor(), batches, planner=wanted)
    plan = compress(rank, Regressor(), batches)
    return str(caught.value), {k: str(x) for k, x in plan.layers.items()}


def test_a_loss_that_one_process_does_not_know(tmp_path):
    """All do without, or all say so."""
    found = outcome(tmp_path, 2, no_loss_on_one)
    assert not any(isinstance(x, str) for x in found), found
    first, second = found
    assert first[1] == second[1] and first[1]
    for text, _ in (first, second):
        assert 'no way to get at its loss' in text and 'annotations' in text


def train(rank, cfg):
    from mmbasis.utils import init_cpu_dist
    init_cpu_dist('pytorch', cfg)
    model = run(cfg).model
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_training_with_uneven_calibration_images(tmp_path):
    """Nine images in batches of one: one of two processes has one left to
    choose by."""
    dense = dense_checkpoint(tmp_path / 'dense.pth')
    images = dict(
        batch_size=1,
        num_workers=0,
        dataset=dict(type='ToyImages', size=9),
        sampler=dict(type='DefaultSampler', shuffle=False, round_up=False),
        collate_fn=dict(type='default_collate'))
    hook = dict(planner=PLANNER,
                calibration=dict(num_batches=4, dataloader=images))
    cfg = toy_cfg(tmp_path / 'work', dense, hook, epochs=1, launcher='pytorch')
    cfg.custom_hooks.append(dict(
        type='mmbasis.RecalibrationHook', num_batches=1, held_out=1))
    first, second = outcome(tmp_path, 2, train, cfg)
    assert any('basis' in key for key in first)
    for key, value in first.items():
        if 'running' not in key and 'num_batches' not in key:
            torch.testing.assert_close(value, second[key], msg=key)


@HOOKS.register_module(force=True)
class Die(Hook):
    """Kills a process in the middle of training."""

    def __init__(self, rank, iteration):
        self.place = rank, iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if (dist.get_rank(), runner.iter) == self.place:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('world, where', [
    (2, 1),
    pytest.param(4, 0, marks=pytest.mark.attack),
    pytest.param(4, 3, marks=pytest.mark.attack),
])
def test_a_process_that_dies_in_training(tmp_path, world, where):
    dense = dense_checkpoint(tmp_path / 'dense.pth')
    cfg = toy_cfg(tmp_path / 'work', dense, launcher='pytorch')
    cfg.train_dataloader.batch_size = 4
    cfg.custom_hooks.append(dict(type='Die', rank=where, iteration=1))
    found = outcome(tmp_path, world, train, cfg, limit=1000.)
    assert found.pop(where) == -signal.SIGKILL
    for text in found:
        assert isinstance(text, str) and re.search(
            'onnection|reset|closed', text), text


def teachers(rank):
    model = BasisModel(ToyNet(), planner=PLANNER)
    errors = []
    for has in ([False, False], [True, True], [True, False]):
        model.distillation = SimpleNamespace(
            teacher=ToyNet() if has[rank] else None)
        try:
            with collectives.shared_errors('search for the teacher'):
                _check_teachers(model)
        except RuntimeError as error:
            errors.append(str(error))
    return errors


def test_a_teacher_that_one_process_does_not_find(tmp_path):
    for errors in outcome(tmp_path, 2, teachers):
        assert len(errors) == 1 and 'rank [1] do not find' in errors[0]


def test_processes_meet_in_one_place_alone(repo_root):
    """No collective without a name and a time limit."""
    waits = re.compile(r'\b(all_reduce|all_gather|broadcast_object|barrier|'
                       r'collect_results|sync_random_seed)\w*\(')
    found = [
        str(path.relative_to(repo_root))
        for folder in ('mmbasis', 'tools')
        for path in (repo_root / folder).rglob('*.py')
        if waits.search(path.read_text(encoding='utf-8'))]
    assert found == ['mmbasis/utils/collectives.py']
