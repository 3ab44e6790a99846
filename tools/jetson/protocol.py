# Copyright (c) mmbasis authors. All rights reserved.
"""The measuring protocol: what is run, in which order, and what is recorded.

1. All models are loaded; the device rests; idle power is recorded.
2. Every model is warmed up until its median latency has settled.
3. Blocks: in each, all models take turns in one order and back, A B B A, so
   that all have the same middle and a steady drift cancels. The order of a
   block is random, the next block has it reversed, and so on. In each turn a
   model is warmed up shortly, then timed in one window; FPS, latency, power
   and energy all come from it.
4. Idle power again. The state of the device is recorded at every step.

Nothing is dropped or chosen: all windows are in the result, and whatever
makes one doubtful is added to its flags.
"""
import os
import random
import time

from . import device, extras
from .backends import need_feature, open_session
from .checks import check_result, check_window
from .energy import window_energy
from .sampler import Sampler
from .stats import latency_summary
from .summary import TURNS, add_comparisons, summarise
from .util import (
    BenchError,
    Progress,
    check_number,
    now,
    sha256,
    wait_until,
    write_json,
)

SCHEMA = 'mmbasis.jetson_bench'
SCHEMA_VERSION = 1
_PROFILED = 50  # inferences with the profiler


class Settings:
    """How long and how often to measure.

    Args:
        repeats (int): blocks, each of two windows per model.
        min_seconds (float), min_count (int): least length of a window.
        warm_seconds, max_warm_seconds (float): limits of the first warm-up.
        rewarm_seconds (float): warm-up before every window.
        idle_seconds (float): length of each idle window.
        sample_hz (float): intended rate of power readings.
        check (bool): compare the outputs with ONNX Runtime's.
        profile (bool): time the layers of the engine, after the windows.
        stages (str | None): see ``extras.stages``, after the windows.

    Raises:
        BenchError: a number makes no sense.
    """

    def __init__(self,
                 repeats=7,
                 min_seconds=4.0,
                 min_count=20,
                 warm_seconds=2.0,
                 max_warm_seconds=60.0,
                 rewarm_seconds=0.5,
                 idle_seconds=10.0,
                 sample_hz=10.0,
                 check=False,
                 profile=False,
                 stages=None):
        day = 86400
        self.repeats = check_number('repeats', repeats, 1, 10000, True)
        self.min_seconds = check_number('min_seconds', min_seconds, .01, day)
        self.min_count = check_number('min_count', min_count, 1, 1e9, True)
        self.warm_seconds = check_number('warm_seconds', warm_seconds, 0, day)
        self.max_warm_seconds = check_number('max_warm_seconds',
                                             max_warm_seconds, warm_seconds,
                                             day)
        self.rewarm_seconds = check_number('rewarm_seconds', rewarm_seconds, 0,
                                           day)
        self.idle_seconds = check_number('idle_seconds', idle_seconds, 0, day)
        self.sample_hz = check_number('sample_hz', sample_hz, .1, 1000)
        self.check, self.profile, self.stages = check, profile, stages

    def expected(self, models):
        """Returns the least length of a run in s, without loading."""
        each = self.min_seconds + self.rewarm_seconds
        return (models * (self.warm_seconds + TURNS * self.repeats * each) +
                2 * self.idle_seconds)


def schedule(count, repeats, rng=random):
    """Draws the order of the windows.

    Args:
        count (int): models.
        repeats (int): blocks.
        rng (random.Random): where chance comes from.

    Returns:
        list[list[int]]: per block the models in turn; every model stands in
        it twice, the second half is the first one reversed.
    """
    blocks, order = [], list(range(count))
    for i in range(repeats):
        if i % 2:
            order = order[::-1]
        else:
            rng.shuffle(order)
        blocks.append(order + order[::-1])
    return blocks


class Run:
    """One comparison of models on this device.

    The result grows while it runs and is written after every window, so that
    what was measured survives whatever ends the run.

    Args:
        models (list[tuple[str, str]]): (name, file), in running order.
        baseline (str): the name that the others are compared with.
        backend (str): see ``backends.open_session``.
        options (backends.Options): for all models.
        settings (Settings): lengths.
        power (str | None): text of a power source, None to leave it out.
        path (str): the result file (JSON).
        sysroot (str): root of the system.
        listener (callable): receives progress lines.
    """

    def __init__(self,
                 models,
                 baseline,
                 backend,
                 options,
                 settings,
                 power,
                 path,
                 sysroot='/',
                 listener=None):
        self.settings, self.path, self.sysroot = settings, path, sysroot
        self._models, self._backend = models, backend
        self._options, self._power = options, power
        self._progress = Progress(settings.expected(len(models)), listener)
        self._sampler = None
        self._sessions = {}
        self.latencies = {}  # (model, repeat) -> s, for --raw
        self.trace = None
        self.result = dict(
            schema=SCHEMA,
            schema_version=SCHEMA_VERSION,
            status='running',
            reason=None,
            created=time.strftime('%Y-%m-%dT%H:%M:%S%z'),
            device=device.describe(sysroot),
            baseline=baseline,
            protocol=dict(vars(settings)),
            power=dict(source=power),
            idle=[],
            models=[],
            comparisons=[],
            flags=[],
            state_before=None,
            state_after=None)

    def save(self):
        """Writes the result as it stands."""
        write_json(self.path, self.result)

    def execute(self):
        """Measures.

        Returns:
            dict: the result, also in the file; ``status`` is ``complete``.

        Raises:
            BaseException: whatever ended the run early; the file then holds
            a partial result, its ``reason`` and the summary of what is done.
        """
        try:
            self.save()
            self.result['state_before'] = device.snapshot(self.sysroot)
            self._start_sampler()
            self._load()
            self._idle()
            self._warm_up()
            for block, order in enumerate(
                    schedule(len(self._models), self.settings.repeats)):
                for place in order:
                    self._window(self.result['models'][place], block)
            self._idle()
            self._extras()
            self.result['status'] = 'complete'
        except BaseException as e:
            self.result['status'] = 'partial'
            self.result['reason'] = '{}: {}'.format(type(e).__name__, e)
            raise
        finally:
            self._finish()
        return self.result

    def _start_sampler(self):
        if self._power is None:
            return
        self._sampler = Sampler(self._power, self.sysroot,
                                1 / self.settings.sample_hz,
                                device.clock_files(self.sysroot)).start()
        self.result['power'].update(self._sampler.head)

    def _load(self):
        for name, path in self._models:
            self._progress.step('loading {} ({})'.format(name, path))
            session = open_session(self._backend, path, self._options)
            self._sessions[name] = session
            for extra in ('check', 'profile', 'stages'):
                if getattr(self.settings, extra):
                    need_feature(session.info['backend'], extra)
            check = extras.check_outputs(
                session, path,
                self._options.images) if self.settings.check else None
            self.result['models'].append(
                dict(
                    name=name,
                    path=os.path.abspath(path),
                    sha256=sha256(path),
                    engine=session.info,
                    batch=session.batch,
                    inputs={
                        k: list(v)
                        for k, v in session.inputs.items()
                    },
                    check=check,
                    layers=None,
                    stages=None,
                    warm_up=None,
                    windows=[],
                    summary=None))
        known = {n for s in self._sessions.values() for n in s.inputs}
        for name in self._options.shapes:
            if name and name not in known:
                raise BenchError('--input-shape {}: no model has this input; '
                                 'there are: {}'.format(
                                     name, ', '.join(sorted(known))))

    def _idle(self):
        seconds = self.settings.idle_seconds
        if self._sampler is None or not seconds:
            return
        self._progress.step('idle power', seconds)
        start = now()
        wait_until(start + seconds)
        record = dict(start=start, end=now())
        record['power'] = self._energy(record['start'], record['end'])[0]
        self.result['idle'].append(record)
        self.save()

    def _warm_up(self):
        for model in self.result['models']:
            self._progress.step('warming up ' + model['name'],
                                self.settings.warm_seconds)
            session = self._sessions[model['name']]
            model['warm_up'] = session.warm_up(self.settings.warm_seconds,
                                               self.settings.max_warm_seconds)

    def _window(self, model, block):
        s, repeat = self.settings, len(model['windows'])
        self._progress.step(
            '{}, window {} of {}'.format(model['name'], repeat + 1,
                                         TURNS * s.repeats),
            s.min_seconds + s.rewarm_seconds)
        session = self._sessions[model['name']]
        # The state is read first: the device must not rest before the window.
        before = device.snapshot(self.sysroot)
        if s.rewarm_seconds and model['engine']['backend'] != 'trtexec':
            session.warm_up(s.rewarm_seconds, s.rewarm_seconds)
        raw = session.window(s.min_seconds, s.min_count)
        after = device.snapshot(self.sysroot)
        seconds = raw['end'] - raw['start']
        images = raw['count'] * model['batch'] * session.at_once
        window = dict(
            repeat=repeat,
            block=block,
            start=raw['start'],
            end=raw['end'],
            seconds=seconds,
            count=raw['count'],
            images=images,
            fps=images / seconds,
            notes=raw['notes'],
            latency_ms=latency_summary(raw['latencies'])
            if raw['latencies'] else raw['latency_ms'],
            hottest_c=after['hottest_c'],
            power=None,
            clocks={})
        if raw['latencies']:
            self.latencies[model['name'], repeat] = list(raw['latencies'])
        if self._sampler:
            window['power'], found = self._energy(raw['start'], raw['end'])
            window['clocks'] = clocks_seen(found, raw['start'], raw['end'])
        window['flags'] = check_window(window, before, after, self._sampler
                                       is not None)
        model['windows'].append(window)
        self.save()

    def _extras(self):
        """What would disturb the windows comes after them."""
        for model in self.result['models']:
            session = self._sessions[model['name']]
            if self.settings.profile:
                self._progress.step('layers of ' + model['name'])
                model['layers'] = session.layers(_PROFILED)
            if self.settings.stages:
                self._progress.step('stages of ' + model['name'])
                model['stages'] = extras.stages(
                    session, self._options.images, self.settings.stages)
        self.save()

    def _energy(self, start, end):
        """Waits for the reading after the window, then integrates."""
        interval = self._sampler.interval_s
        limit = now() + max(0.5, 4 * interval)
        found = self._sampler.read()
        while found['alive'] and now() < limit and (
                not found['trace'].times or found['trace'].times[-1] < end):
            wait_until(now() + interval / 2)
            found = self._sampler.read()
        return window_energy(found['trace'], start, end, interval), found

    def _finish(self):
        """Ends the processes and summarises what there is."""
        for session in self._sessions.values():
            session.close()
        if self._sampler:
            found = self._sampler.stop()
            if found:
                self.trace = found['trace']
                self.result['power'].update(
                    errors=found['errors'][:20],
                    error_count=len(found['errors']),
                    load=found['load'])
        if self.result['state_before']:
            self.result['state_after'] = device.snapshot(self.sysroot)
        summarise(self.result)
        add_comparisons(self.result)
        check_result(self.result)
        self.save()


def clocks_seen(found, start, end):
    """Returns the lowest and highest value of every watched clock.

    Args:
        found (dict): what ``Sampler.read`` returned.
        start, end (float): the window.

    Returns:
        dict[str, list[int]]: name -> [lowest, highest].
    """
    seen = {}
    for stamp, values in found['watched']:
        for name, value in values.items():
            if start <= stamp <= end and value is not None:
                seen.setdefault(name, []).append(value)
    return {k: [min(v), max(v)] for k, v in seen.items()}
