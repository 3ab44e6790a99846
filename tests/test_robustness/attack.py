# Copyright (c) mmbasis authors. All rights reserved.
"""Malformed inputs: what they are, and what becomes of them.

    python -m tests.test_robustness.attack --inputs 300 --out attack.json

gives so many inputs to each surface and prints what became of them.
"""
import argparse
import contextlib
import copy
import importlib
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mmengine.logging import MMLogger

import mmbasis
import tests.toy  # noqa: F401
from mmbasis import hooks
from mmbasis.compression import (
    Recipe,
    Source,
    apply_plan,
    load_weights,
)
from mmbasis.models import CifarDenseNet, CifarResNet, CifarVGG
from mmbasis.models.int8 import InputScales
from mmbasis.planning import (
    BudgetPlanner,
    CompressionPlan,
    LatencyTable,
    find_layers,
)
from mmbasis.utils import schema

ROOT = Path(__file__).resolve().parents[2]
OURS = (str(ROOT / 'mmbasis'), str(ROOT / 'tools'),
        str(Path(__file__).parent), argparse.__file__)
#: seconds after which an input hangs
LIMIT = 20
OUTCOMES = ('ran code', 'hung', 'silently wrong', 'unclear error',
            'clear error')


class Case(NamedTuple):
    """An input of a surface, and words of which its error has one."""
    surface: str
    value: Any
    words: tuple


# ---------------------------------------------------------------- wrong values
CANARY = Path(tempfile.gettempdir()) / f'mmbasis_attack_{os.getpid()}'
BOMBS = [f'__import__("pathlib").Path({str(CANARY)!r}).touch()',
         f'!!python/object/apply:os.system ["touch {CANARY}"]']


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 5), st.floats(),
    st.sampled_from(['', 'False', 'None', '4', 'nan', '0.5', *BOMBS]),
    st.text(max_size=6), st.integers(2, 200).map(nested),
    st.lists(st.integers(-2, 3), max_size=3),
    st.dictionaries(st.sampled_from(['a', 'type', 'path']),
                    st.integers(0, 2), max_size=2))
JUNK = PLAIN | st.sampled_from([b'4', 4j, {1: 2}, {3}, object, ...])


def real(x):
    return (isinstance(x, (int, float)) and not isinstance(x, bool)
            and math.isfinite(x))


def weight(x):
    return real(x) and x >= 0


def share(x):
    return real(x) and 0 <= x <= 1


def fraction(x):
    return real(x) and 0 < x <= 1


def count(x):
    return isinstance(x, int) and not isinstance(x, bool) and x >= 1


def whole(x):
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def boolean(x):
    return isinstance(x, bool)


def text(x):
    return isinstance(x, str)


def pair(x):
    return isinstance(x, list) and len(x) == 2 and all(map(weight, x))


def nothing(x):
    return x is None


def a_dict(x):
    return isinstance(x, dict)


def exactly(value):
    return lambda x: type(x) is type(value) and x == value


def among(*values):
    return lambda x: isinstance(x, str) and x in values


def either(*rules):
    return lambda x: any(rule(x) for rule in rules)


def wrong(fields, junk=JUNK):
    """A field, and a value that it must not have."""
    return st.sampled_from(sorted(fields)).flatmap(
        lambda key: junk.filter(lambda x: not fields[key](x)).map(
            lambda value: (key, value)))


def nest(path, value):
    for key in reversed(path.split('.')):
        value = {key: value}
    return value


# --------------------------------------------------------------------- recipes
TERM = dict(module='fc', type='kl', weight=1., temperature=2.)
TERMS = dict(module=text, type=among('kl', 'mse'), weight=weight,
             temperature=lambda x: real(x) and x > 0)
RECIPE = {
    'calibration': either(nothing, lambda x: x == {}),
    'calibration.num_batches': count,
    'calibration.dataloader': either(nothing, a_dict),
    'reconstruction': either(nothing, among('local', 'sequential')),
    'recalibration': either(nothing, boolean, among('auto')),
    'norm': either(nothing, boolean),
    'orthogonality': nothing,
    'orthogonality.weight': weight,
    'distillation': either(nothing, boolean, lambda x: x == {}),
    'distillation.task_weight': either(nothing, weight),
    'distillation.checkpoint': either(nothing, text),
    'distillation.terms': nothing,
    'planner': nothing,
    'plan': nothing,
}


@st.composite
def recipes(draw):
    kind = draw(st.integers(0, 9))
    if kind < 2:
        key, value = draw(wrong(TERMS))
        term = dict(TERM, **{key: value})
        return Case('recipe', dict(distillation=dict(terms=[term])), (key, ))
    if kind == 2:
        key = draw(st.text('abcdefgh', min_size=1, max_size=5).filter(
            lambda x: x not in RECIPE))
        return Case('recipe', {key: draw(JUNK.filter(
            lambda x: x is not None))}, (key, ))
    key, value = draw(wrong(RECIPE))
    words = (key.rpartition('.')[2], key.partition('.')[0])
    if key == 'plan' and isinstance(value, str):
        words += (value, repr(value)[1:-1])
    return Case('recipe', nest(key, value), words)


def try_recipe(value):
    Recipe.of(**value)


# -------------------------------------------------------------------- planners
PATTERNS = ['(', '[', '*', 'a{2,1}', '(?P<n>', 'nothing', '\\', 'conv1(?',
            '(' * 3000, 'a{99999999999999999999}', '(a+)+', '(a|a)*b',
            '(.*.*)*x!', '(a|aa)+$', '((a*)*)*b', '(?R)']
COMMON = dict(
    include=lambda x: isinstance(x, (list, tuple)) and all(map(text, x)),
    exclude=lambda x: isinstance(x, (list, tuple)) and all(map(text, x)),
    overrides=either(nothing, lambda x: x == {}), prediction_layers=boolean,
    round_to=either(nothing, count), data_aware=either(nothing, boolean))
PLANNERS = [
    (dict(type='BudgetPlanner', macs=.5), dict(
        macs=fraction, forms=either(nothing, lambda x: isinstance(
            x, list) and x and all(among('output')(y) for y in x)),
        device=nothing, loss_aware=either(nothing, boolean))),
    (dict(type='BudgetPlanner', params=.5), dict(params=fraction,
                                                 table=nothing)),
    (dict(type='BudgetPlanner', latency=.5, device='cpu'), dict(
        latency=fraction, device=lambda x: False)),
    (dict(type='EnergyPlanner', threshold=.5), dict(threshold=fraction)),
    (dict(type='RatioPlanner', ratio=.5), dict(ratio=fraction)),
    (dict(type='FixedPlanner', ranks={'conv.': 2}), dict(
        ranks=lambda x: False, allow_costlier=boolean)),
]


@st.composite
def planners(draw):
    config, fields = draw(st.sampled_from(PLANNERS))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        key = draw(st.text('abcdefgh', min_size=1, max_size=5))
        return Case('planner', dict(config, **{key: 1}), (key, ))
    if kind == 1:
        value = draw(JUNK.filter(lambda x: x != '...'))
        return Case('planner', dict(config, type=value), (
            'type', 'planner'))
    if kind < 4:
        pattern = draw(st.sampled_from(PATTERNS))
        key = draw(st.sampled_from(['include', 'exclude', 'overrides']))
        value = {pattern: 2} if key == 'overrides' else [pattern]
        return Case('planner', dict(config, **{key: value}), (key, ))
    if kind == 4:
        value = draw(JUNK.filter(lambda x: not count(x) and x != 'dense'))
        return Case('planner', dict(config, overrides={'conv1': value}),
                    ('overrides', ))
    if kind == 5:
        step = draw(st.integers(500, 10**6))
        return Case('planner', dict(
            type='BudgetPlanner', macs=.5, round_to=step),
            ('macs=0.5 cannot be met', ))
    key, value = draw(wrong({**COMMON, **fields}))
    return Case('planner', dict(config, **{key: value}), (key, ))


class Network(nn.Module):
    """One of its names makes careless patterns take for ever."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3)
        self.conv2 = nn.Conv2d(12, 12, 3)
        self.add_module('a' * 40 + '!', nn.Conv2d(12, 12, 3))
        self.bn = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        for layer in (self.conv1, self.conv2, getattr(self, 'a' * 40 + '!')):
            x = layer(x).relu()
        return self.fc(self.bn(x).mean((2, 3)))


def network():
    torch.manual_seed(0)
    return Network().eval()


def images():
    torch.manual_seed(1)
    return [torch.rand(2, 3, 9, 9)]


def try_planner(value):
    mmbasis.compress(network(), value, images(), reconstruction='local',
                     recalibration=False)


# ----------------------------------------------------------------------- plans
def _plan():
    planner = BudgetPlanner(macs=.5, data_aware=False)
    plan = mmbasis.compress(network(), planner, images())
    assert len(plan.layers) > 1 and len(plan.dense) > 0
    return json.loads(plan.dumps())


_PLAN = {}


def plan_data():
    if not _PLAN:
        _PLAN.update(_plan())
    return copy.deepcopy(_PLAN)


def layer_fields(entry):
    return dict(
        rank=lambda x: count(x) and x <= entry['full_rank'],
        full_rank=lambda x: count(x) and x >= entry['rank'],
        kind=exactly(entry['kind']), shape=exactly(entry['shape']),
        bias=boolean, energy=share, macs=pair, params=pair,
        input_rank=either(nothing, count), spatial=boolean)


def dense_fields(entry):
    return dict(reason=text, compressible=boolean,
                shape=exactly(entry['shape']), macs=weight, params=whole,
                bias=boolean)


@st.composite
def plans(draw):
    data, kind = plan_data(), draw(st.integers(0, 9))
    part = draw(st.sampled_from(['layers', 'dense']))
    name = draw(st.sampled_from(sorted(data[part])))
    entry = data[part][name]
    fields = (layer_fields if part == 'layers' else dense_fields)(entry)
    if kind < 5:
        key, value = draw(wrong(fields, PLAIN))
        entry[key] = value
        return Case('plan', json.dumps(data), (key, name))
    if kind == 5:
        key = draw(st.sampled_from(sorted(
            fields.keys() - {'input_rank', 'spatial'} - (
                set() if part == 'layers' else {'bias'}))))
        del entry[key]
        return Case('plan', json.dumps(data), (key, ))
    if kind == 6:
        other = 'dense' if part == 'layers' else 'layers'
        first = next(iter(data[other].values()))
        data[other][name] = first
        return Case('plan', json.dumps(data), (name, ))
    if kind == 7:
        new = draw(st.text('xyz', min_size=1, max_size=4))
        data[part][new] = data[part].pop(name)
        return Case('plan', json.dumps(data), (new, name))
    if kind == 8:
        head = dict(
            version=lambda x: count(x) and x <= 2, norm=boolean,
            planner=a_dict, predicted_ms=lambda x: x == {},
            layers=lambda x: False, dense=lambda x: x == {})
        key, value = draw(wrong(head, PLAIN))
        data[key] = value
        # without its layers, it says less than the model has
        return Case('plan', json.dumps(data), (key, *data['dense'])
                    if a_dict(data['dense']) else (key, ))
    return Case('plan', draw(texts(data, name)), ('plan.json', ))


@st.composite
def texts(draw, data, key):
    """What is no JSON of this kind."""
    good = json.dumps(data)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return good[:draw(st.integers(0, len(good) - 1))]
    if kind == 1:
        depth = draw(st.integers(20000, 100000))
        return '[' * depth + ']' * depth
    if kind == 2:
        return good.replace(f'"{key}":', f'"{key}": {{}}, "{key}":', 1)
    return draw(st.sampled_from([
        '', 'null', '[]', '3', '"plan"', '{}', 'NaN', '\ufeff{}', '{"a"}',
        *BOMBS]))


def write(folder, name, content):
    path = os.path.join(folder, name)
    with open(path, 'w', encoding='utf-8') as file:
        file.write(content)
    return path


def try_plan(value):
    with tempfile.TemporaryDirectory() as folder:
        plan = CompressionPlan.load(write(folder, 'plan.json', value))
    apply_plan(network(), plan)


# -------------------------------------------------------------- latency tables
def table_data():
    modules = dict(network().named_modules())
    rows = [dict(id='carrier/a', role='carrier', median_ms=.5, noise_ms=0.),
            dict(id='model', role='model', median_ms=9., noise_ms=0.)]
    for name in ('conv1', 'conv2'):
        for rank in (None, 2, 4):
            rows.append(dict(
                id=f'{name}/{rank}', role='layer', group=name,
                carrier='carrier/a', form='output' if rank else 'dense',
                rank=rank, input_rank=None, noise_ms=.01,
                weight_shape=list(modules[name].weight.shape),
                uses={name: 1}, median_ms=1. + (rank or 6)))
    return dict(
        schema='mmbasis.latency_table', version=2, status='complete',
        device=dict(cpu='x'), backend='onnxruntime', precision='fp32',
        entries=rows)


@st.composite
def tables(draw):
    data, kind = table_data(), draw(st.integers(0, 9))
    entry = draw(st.sampled_from(data['entries']))
    name = entry['id']
    fields = dict(id=lambda x: entry['role'] == 'layer' and text(x),
                  role=among('layer', 'carrier', 'model'),
                  median_ms=lambda x: real(x) and x > 0)
    if entry['role'] == 'layer':
        fields.update(
            noise_ms=weight, weight_shape=exactly(entry['weight_shape']),
            group=exactly(entry['group']), carrier=exactly('carrier/a'),
            uses=lambda x: a_dict(x) and x and all(map(count, x.values())),
            form=exactly(entry['form']),
            rank=count if entry['rank'] else nothing, input_rank=nothing)
    words = (name, entry.get('group', name), name.partition('/')[0])
    if kind < 6:
        key, value = draw(wrong(fields, PLAIN))
        if key == 'id' and entry['role'] == 'model' and text(value):
            value = None  # another entry, which nobody asks for
        entry[key] = value
        return Case('table', json.dumps(data), (key, *words))
    if kind == 6:
        key = draw(st.sampled_from(sorted(fields.keys() - {'role'})))
        del entry[key]
        return Case('table', json.dumps(data), (key, ))
    if kind == 7:
        data['entries'].append(dict(entry))
        return Case('table', json.dumps(data), words)
    if kind == 8:
        head = dict(
            schema=exactly(data['schema']), version=exactly(2),
            status=exactly('complete'), device=a_dict, backend=text,
            precision=text, entries=lambda x: False)
        key, value = draw(wrong(head, PLAIN))
        data[key] = value
        return Case('table', json.dumps(data), (key, 'table'))
    return Case('table', draw(texts(data, 'entries')), ('table.json', ))


def try_table(value):
    with tempfile.TemporaryDirectory() as folder:
        table = LatencyTable.load(write(folder, 'table.json', value))
    table.check_layers([x for x in find_layers(network())
                        if x.name in ('conv1', 'conv2')])


# ----------------------------------------------------------------- checkpoints
@st.composite
def checkpoints(draw):
    state, kind = network().state_dict(), draw(st.integers(0, 6))
    key = draw(st.sampled_from(sorted(
        x for x in state if 'num_batches' not in x)))
    data = dict(meta={}, state_dict=state)
    if kind == 0:
        data['meta'] = draw(JUNK.filter(lambda x: x and not a_dict(x)))
        return Case('checkpoint', data, ('meta', ))
    if kind == 1:
        data['meta'] = dict(mmbasis=draw(JUNK.filter(
            lambda x: x is not None)))
        return Case('checkpoint', data, ('plan', ))
    if kind == 2:
        data['meta'] = dict(mmbasis_int8=draw(JUNK.filter(
            lambda x: x is not None)))
        return Case('checkpoint', data, ('mmbasis_int8', ))
    if kind == 3:
        data['state_dict'] = draw(JUNK)
        return Case('checkpoint', data, ('state_dict', ))
    if kind == 4:
        del state[key]
    elif kind == 5:
        state[key] = draw(st.sampled_from([
            torch.zeros(7, 7, 7), torch.full_like(state[key], math.nan),
            torch.full_like(state[key], math.inf), state[key][:1, ...]
            if len(state[key]) > 1 else torch.zeros(0)]))
    else:
        state[key] = draw(JUNK)
    return Case('checkpoint', data, (key, ))


def try_checkpoint(value):
    Source.of(value)
    InputScales.of(value)
    load_weights(network(), value, 'given.pth')


# ----------------------------------------------------------------------- hooks
STAGE = dict(epoch=1, planner=dict(type='BudgetPlanner', macs=.5))
HOOKS = dict(
    OrthogonalityHook=dict(interval=whole, by_epoch=boolean),
    SpectrumHook=dict(interval=whole, by_epoch=boolean),
    RecalibrationHook=dict(num_batches=count, held_out=count),
    QuantizationHook=dict(num_batches=count),
    EpochSeedHook=dict(enabled=boolean),
    ProgressiveTruncationHook=dict(stages=lambda x: x in ([], ())),
    BasisCompressionHook={k: x for k, x in RECIPE.items() if '.' not in k})


@st.composite
def hook_settings(draw):
    name = draw(st.sampled_from(sorted(HOOKS)))
    if name == 'ProgressiveTruncationHook' and draw(st.booleans()):
        key, value = draw(wrong(dict(epoch=count, planner=lambda x: False)))
        return Case('hook', (name, dict(stages=[dict(STAGE, **{key: value})])),
                    (key, ))
    if draw(st.integers(0, 5)) == 0:
        key = draw(st.text('abcdefgh', min_size=1, max_size=5))
        return Case('hook', (name, {key: 3}), (key, ))
    key, value = draw(wrong(HOOKS[name]))
    words = (key, )
    if key == 'plan' and text(value):
        words += (value, repr(value)[1:-1])
    return Case('hook', (name, {key: value}), words)


def try_hook(value):
    name, arguments = value
    if name == 'ProgressiveTruncationHook':
        arguments = dict(dict(stages=[]), **arguments)
    getattr(hooks, name)(**arguments)


# ------------------------------------------------------------------- functions
FUNCTIONS = {
    'compress': dict(
        model=lambda x: False, num_batches=either(nothing, count),
        dataloader=lambda x: hasattr(x, '__iter__'),
        planner=lambda x: False),
    'BasisModel': dict(checkpoint=either(nothing, text),
                       architecture=lambda x: False),
    'CifarResNet': dict(depth=lambda x: False),
    'CifarVGG': dict(depth=lambda x: False),
    'CifarDenseNet': dict(depth=lambda x: False, growth_rate=count),
}


@st.composite
def calls(draw):
    name = draw(st.sampled_from(sorted(FUNCTIONS)))
    key, value = draw(wrong(FUNCTIONS[name]))
    return Case('function', (name, key, value), (key, ))


def try_function(value):
    name, key, wrong_value = value
    arguments = dict(
        compress=dict(model=network(), dataloader=images(),
                      planner=PLANNERS[0][0]),
        BasisModel=dict(architecture=dict(type='ToyNet')),
        CifarResNet=dict(depth=8), CifarVGG=dict(depth=16),
        CifarDenseNet=dict(depth=7))[name]
    function = dict(
        compress=mmbasis.compress, BasisModel=mmbasis.models.BasisModel,
        CifarResNet=CifarResNet, CifarVGG=CifarVGG,
        CifarDenseNet=CifarDenseNet)[name]
    function(**dict(arguments, **{key: wrong_value}))


# --------------------------------------------------------------- command lines
def as_int(rule):
    return _as(int, rule)


def as_float(rule):
    return _as(float, rule)


def _as(convert, rule):

    def allows(x):
        try:
            return rule(convert(x))
        except ValueError:
            return False

    return allows


COMMANDS = {
    'compress': (['c.py', 'x.pth'], {
        'macs': as_float(fraction), 'params': as_float(fraction),
        'energy': as_float(fraction)}),
    'compress ': (['c.py', 'x.pth', '--macs', '.5'], {
        'calib-batches': as_int(count), 'round-to': as_int(count),
        'seed': as_int(whole), 'forms': among('output', 'both'),
        'reconstruction': among('local', 'sequential'),
        'recalibration': among('auto', 'always', 'never')}),
    'analyze': (['c.py', 'x.pth'], {
        'budgets': as_float(fraction), 'calib-batches': as_int(count),
        'planners': among('paper', 'loss'), 'seed': as_int(whole)}),
    'latency_table': (['export', 'c.py', 'x.pth', '--input-shape',
                       '1x3x8x8', '--out', 'o'], {
        'ranks': as_int(count), 'round-to': as_int(count),
        'forms': among('output', 'both'),
        'input-shape': lambda x: False}),
    'latency_table ': (['measure', 'folder', '--out', 'o'], {
        'rounds': as_int(count), 'seconds': as_float(
            lambda x: real(x) and x > 0), 'threads': as_int(count),
        'max-wait': as_float(weight)}),
    'latency_table  ': (['refine', 't.json', 'x.pth', '--out', 'o',
                         '--measured', '.5'], {
        'measured': as_float(lambda x: real(x) and x > 0)}),
    'jetson': (['layers', 'absent', '--out', 'o'], {
        'rounds': as_int(lambda x: count(x) and x <= 10000),
        'seconds': as_float(lambda x: real(x) and .001 <= x <= 86400),
        'min-count': as_int(count), 'streams': as_int(count),
        'threads': as_int(count), 'max-wait': as_float(weight)}),
}
VALUES = st.sampled_from([
    '-1', '0', '-0.5', 'nan', 'inf', '-inf', 'x', '', '1e999', '1.5', '2',
    '-1e-9', '0x10', '1,5', 'None', 'True', '[1]', '--', ' ', '99999999999999',
    *BOMBS]) | st.text(max_size=5) | st.integers(-5, 5).map(str) | st.floats(
        ).map(str)


@st.composite
def command_lines(draw):
    tool = draw(st.sampled_from(sorted(COMMANDS)))
    args, options = COMMANDS[tool]
    key, value = draw(wrong(options, VALUES))
    return Case('command line', (tool.strip(), [*args, f'--{key}={value}']),
                (key, ))


def try_command_line(value):
    tool, args = value
    if tool == 'jetson':
        main = importlib.import_module('jetson.cli').main
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
        handlers = [signal.getsignal(x) for x in numbers]
        try:
            status = main(args)
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)
        if status:
            raise SystemExit(status)
        return
    module = importlib.import_module(tool)
    before, sys.argv = sys.argv, [f'{tool}.py', *args]
    try:
        parsed = module.parse_args()
        if tool == 'compress':
            module.make_recipe(parsed)
    finally:
        sys.argv = before


SURFACES = {
    'recipe': (recipes, try_recipe), 'planner': (planners, try_planner),
    'plan': (plans, try_plan), 'table': (tables, try_table),
    'checkpoint': (checkpoints, try_checkpoint),
    'hook': (hook_settings, try_hook), 'function': (calls, try_function),
    'command line': (command_lines, try_command_line),
}


# -------------------------------------------------------------------- outcomes
class Hung(BaseException):
    """An input that takes too long."""


@contextlib.contextmanager
def limited(seconds):

    def end(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(case):
    """What becomes of a case: one of :data:`OUTCOMES`, and why."""
    printed, other = (io.TextIOWrapper(io.BytesIO(), 'utf-8')
                      for _ in range(2))
    try:
        with limited(LIMIT), contextlib.redirect_stderr(
                printed), contextlib.redirect_stdout(other):
            SURFACES[case.surface][1](copy.deepcopy(case.value))
        result = 'silently wrong', ''
    except Hung:
        result = 'hung', ''
    except SystemExit as error:
        printed.flush()
        said = printed.buffer.getvalue().decode()
        result = _judge(case, f'{error} {said}', True)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        result = _judge(case, f'{type(error).__name__}: {error}',
                        where.startswith(OURS), where)
    if CANARY.exists():
        CANARY.unlink()
        result = 'ran code', ''
    return result


def _judge(case, message, ours, where=''):
    clear = ours and any(str(word) in message for word in case.words)
    return ('clear error' if clear else 'unclear error',
            f'{message[-300:]} ({where})')


def attack(inputs, surfaces=tuple(SURFACES)):
    """Give so many inputs to each surface.

    Returns:
        tuple: Counts by surface and outcome, and the cases that are not as
        they should be, in words.
    """
    counts, examples, seen = defaultdict(Counter), [], set()
    schema.PATTERN_SECONDS = .2
    MMLogger.get_current_instance()  # or its stream would be one of ours
    sys.path.insert(0, str(ROOT / 'tools'))
    for name in surfaces:

        @settings(max_examples=inputs, deadline=None, database=None,
                  derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(SURFACES[name][0]())
        def give(case):
            key = repr((case.surface, case.value))
            if key in seen:
                return
            seen.add(key)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                result, why = outcome(case)
            counts[case.surface][result] += 1
            if result != 'clear error':
                examples.append(f'{case.surface}: {result}: '
                                f'{str(case.value)[-200:]} '
                                f'{str(case.words)[:80]} {why}')

        give()
    sys.path.pop(0)
    return counts, examples


def report(counts):
    """The counts as lines of text."""
    rows = [('', *OUTCOMES)]
    rows += [(name, *(found[x] for x in OUTCOMES))
             for name, found in counts.items()]
    rows.append(('all', *(sum(x[key] for x in counts.values())
                          for key in OUTCOMES)))
    return '\n'.join(f'{row[0]:<14}' + ''.join(f'{x!s:>16}' for x in row[1:])
                     for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--inputs', type=int, default=300)
    parser.add_argument('--surfaces', nargs='+', default=list(SURFACES))
    parser.add_argument('--out', help='JSON')
    args = parser.parse_args()
    start = time.time()
    MMLogger.get_current_instance().setLevel('ERROR')
    counts, examples = attack(args.inputs, args.surfaces)
    print('\n'.join(examples))
    print(report(counts))
    if args.out:
        with open(args.out, 'w') as file:
            json.dump(dict(
                command=f'python -m tests.test_robustness.attack --inputs '
                f'{args.inputs}', torch=torch.__version__,
                seconds=round(time.time() - start),
                counts={k: dict(x) for k, x in counts.items()}), file,
                indent=1)


if __name__ == '__main__':
    main()
