# Copyright (c) mmbasis authors. All rights reserved.
"""Latency tables, and plans made with them."""
import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn as nn

from mmbasis import compress
from mmbasis.planning import BudgetPlanner, LatencyTable, Ranks, refine
from tests.analyses import make_plan

#: ms by rank, None is dense; conv '0' is slow at low ranks, '2' pays
TIMES = {
    '0': {
        None: 1.,
        4: 1.2,
        8: 1.1,
        12: 1.3
    },
    '2': {
        None: 4.,
        4: 1.,
        8: 2.,
        12: 1.9,
        16: 3.,
        20: 3.98
    },
}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1))


def entries(model, uses=1):
    """Entries as tools/latency_table.py and the benchmark write them: a
    layer's median contains what feeds it."""
    rows = [
        dict(id='carrier', role='carrier', median_ms=.5, noise_ms=0.),
        dict(id='model', role='model', median_ms=7., noise_ms=0.)
    ]
    modules = dict(model.named_modules())
    for name, times in TIMES.items():
        for rank, ms in times.items():
            rows.append(
                dict(
                    id=f'{name}/{rank}',
                    role='layer',
                    group=name,
                    carrier='carrier',
                    rank=rank,
                    kind='BasisConv',
                    weight_shape=list(modules[name].weight.shape),
                    uses={name: uses},
                    median_ms=ms + .5,
                    noise_ms=.05))
    return rows


@pytest.fixture
def write(model, tmp_path):
    """Function that writes a table, with changes, and returns its path."""

    def write(**changes):
        data = dict(
            schema='mmbasis.latency_table',
            version=1,
            status='complete',
            device=dict(board='Jetson AGX Xavier', cpu='ARMv8'),
            backend='tensorrt',
            precision='fp16',
            entries=entries(model))
        data.update(changes)
        path = tmp_path / 'table.json'
        path.write_text(json.dumps(data))
        return str(path)

    return write


def plan(model, **options):
    return make_plan(BudgetPlanner(data_aware=False, **options), model)


# --------------------------------------------------------------- the table
def test_costs(write):
    table = LatencyTable.load(write())
    assert table.cost('2', None) == pytest.approx(4)
    assert table.cost('2', 4) == pytest.approx(1)
    ranks = [x.output for x in table.curves['2'].grids['output'].choices]
    assert ranks == [4, 8, 12, 16, 20]
    assert table.rest() == pytest.approx(2)


def test_interpolation_never_invents_a_speed_up(write):
    table = LatencyTable.load(write())
    costs = [table.cost('2', rank) for rank in range(1, 33)]
    assert np.all(np.diff(costs) >= 0)
    # rank 12 was measured faster than 8: that is noise
    assert table.cost('2', 12) == table.cost('2', 8) == pytest.approx(2)
    # between two measured ranks, that of the higher one
    assert table.cost('2', 5) == table.cost('2', 8)
    assert table.cost('2', 13) == table.cost('2', 16)
    # past the last one nothing is known to be faster than dense
    assert table.cost('2', 21) == pytest.approx(4)
    # within noise is not faster
    assert table.is_faster('2', 16) and not table.is_faster('2', 20)
    assert not any(table.is_faster('0', rank) for rank in range(1, 13))


def test_a_layer_that_is_used_twice_costs_twice(write, model):
    rows = [x for x in entries(model, uses=2) if x['id'] != 'model']
    table = LatencyTable.load(write(entries=rows))
    assert table.cost('2', 4) == pytest.approx(2)
    assert table.noise('2') == pytest.approx(.1)


def test_prediction_of_the_whole_model(write, model):
    table = LatencyTable.load(write())
    assert table.predict({}) == pytest.approx(7)
    assert table.predict({'2': 4}) == pytest.approx(4)
    # where the layers take longer alone than all of the model
    rows = [x for x in entries(model) if x['id'] != 'model']
    rows.append(dict(id='model', median_ms=2.5, noise_ms=0.))
    table = LatencyTable.load(write(entries=rows))
    assert table.predict({}) == pytest.approx(2.5)
    assert table.predict({'2': 4}) == pytest.approx(1)


def test_layers_take_another_time_inside_the_model(write, model):
    """The compressed model was measured, too: 6 ms instead of 4, or 3.5."""

    def table(ms):
        row = dict(
            id='model/compressed', median_ms=ms, ranks={'2': 4}, noise_ms=0.)
        return LatencyTable.load(write(entries=entries(model) + [row]))

    slower = table(6.)
    assert slower.predict({}) == pytest.approx(7)
    assert slower.predict({'2': 4}) == pytest.approx(6)
    assert slower.cost('2', 4) == pytest.approx(3)
    assert slower.cost('2', None) == pytest.approx(4)
    assert slower.is_faster('2', 4) and not slower.is_faster('2', 8)
    faster = table(3.5)
    assert faster.predict({}) == pytest.approx(7)
    assert faster.predict({'2': 4}) == pytest.approx(3.5)
    assert faster.cost('2', 4) == pytest.approx(.5)
    # past the ranks that were measured, it is as slow as dense
    assert faster.cost('2', 10**6) == pytest.approx(4)
    # half the time alone at least: no model is so much faster than its parts
    assert table(1.).predict({'2': 4}) == pytest.approx(3.5)


@pytest.mark.parametrize('version', [1, 2])
def test_refined_table_agrees_with_the_network_that_it_chose(
        write, model, tmp_path, version):
    path = write() if version == 1 else forms_table(write, model)
    planner = BudgetPlanner(latency=.8, table=path)
    plan = make_plan(planner, model)
    ranks = {k: x.ranks for k, x in plan.layers.items()}
    before = LatencyTable.load(path)
    slower = 1.1 * before.predict(ranks) / 7
    refined = tmp_path / 'refined.json'
    refined.write_text(json.dumps(refine(path, plan, slower)))
    after = LatencyTable.load(str(refined))
    assert after.predict({}) == pytest.approx(7)
    assert after.predict(ranks) == pytest.approx(slower * 7)
    # a second time, of the table that was refined
    again = refine(str(refined), plan, .5)
    assert len(again['entries']) == len(read(str(refined))['entries'])


def test_what_refines_no_table(write, model):
    path = write()
    plan = make_plan(BudgetPlanner(latency=.6, table=path), model)
    for fraction in (0, -1., float('nan'), float('inf')):
        with pytest.raises(ValueError, match='not a positive number'):
            refine(path, plan, fraction)
    layer, = plan.layers.values()
    other = dataclasses.replace(plan, layers=dict(fc=layer))
    with pytest.raises(ValueError, match='of another model .*lacks fc'):
        refine(path, other, .5)
    rows = [x for x in entries(model) if x['id'] != 'model']
    with pytest.raises(ValueError, match='no latency of the whole model'):
        refine(write(entries=rows), plan, .5)


@pytest.mark.parametrize('changes, text', [
    (dict(schema='other'), 'no latency table'),
    (dict(version=3), 'version 3, this mmbasis reads 1 and 2'),
    (dict(version=None), 'version None'),
    (dict(status='partial'), 'goes on where it stopped'),
    (dict(entries=[dict(id='a', role='layer')]), 'malformed'),
    (dict(entries=3), 'malformed'),
])
def test_bad_tables(write, changes, text):
    with pytest.raises(ValueError, match=text):
        LatencyTable.load(write(**changes))


def test_not_json(tmp_path):
    (tmp_path / 'x.json').write_text('{')
    with pytest.raises(ValueError, match='is not JSON'):
        LatencyTable.load(str(tmp_path / 'x.json'))
    with pytest.raises(FileNotFoundError):
        LatencyTable.load(str(tmp_path / 'y.json'))


@pytest.mark.parametrize('target, text', [
    (dict(device='Orin'), "device 'Jetson AGX Xavier', not 'Orin'"),
    (dict(precision='fp32'), "precision 'fp16', not 'fp32'"),
    (dict(backend='onnxruntime'), "backend 'tensorrt', not 'onnxruntime'"),
])
def test_table_of_another_target(write, model, target, text):
    path = write()
    with pytest.raises(ValueError, match=text):
        LatencyTable.load(path, **target)
    with pytest.raises(ValueError, match=text):
        BudgetPlanner(latency=.8, table=dict(path=path, **target))
    LatencyTable.load(path, device='xavier', precision='fp16')


# ------------------------------------------------------------------- plans
def test_keeps_dense_what_would_not_get_faster(write, model):
    result = plan(model, latency=.9, table=write())
    assert set(result.layers) == {'2'}
    assert 'faster' in result.dense['0'].reason
    assert 'latency table' in result.dense['0'].reason


@pytest.mark.parametrize('fraction, rank', [(.6, 4), (.75, 12), (.9, 16)])
def test_budget_is_of_the_whole_model(write, model, fraction, rank):
    path = write()
    result = plan(model, latency=fraction, table=path)
    assert result.layers['2'].rank == rank
    table = LatencyTable.load(path)
    ranks = {k: v.rank for k, v in result.layers.items()}
    assert table.predict(ranks) <= fraction * 7 + 1e-9


def test_respects_rounding(write, model):
    result = plan(model, latency=.9, table=write(), round_to=8)
    assert result.layers['2'].rank % 8 == 0
    result = plan(model, latency=.75, table=write(), round_to=8)
    assert result.layers['2'].rank == 8


def test_overrides_must_be_faster_too(write, model):
    result = plan(model, latency=.9, table=write(), overrides={'0': 8, '2': 4})
    assert result.layers['2'].rank == 4
    assert result.dense['0'].reason == (
        'at rank 8 it is not faster than the dense layer by the latency table')


def test_budget_that_cannot_be_met(write, model):
    with pytest.raises(ValueError, match='latency=0.2 cannot be met'):
        plan(model, latency=.2, table=write())


def test_table_of_another_model(write):
    other = nn.Sequential(
        nn.Conv2d(3, 16, 5), nn.ReLU(), nn.Conv2d(16, 32, 3),
        nn.Conv2d(32, 8, 3))
    with pytest.raises(ValueError, match='another model.*0 has weights'):
        plan(other, latency=.5, table=write())


def test_the_plan_says_what_it_was_made_for(write, model):
    path = write()
    record = plan(model, latency=.75, table=path).to_dict()['planner']
    assert record['table'] == dict(
        path=path,
        device='Jetson AGX Xavier',
        backend='tensorrt',
        precision='fp16')
    json.dumps(record)


@pytest.mark.parametrize('options', [
    dict(latency=.5),
    dict(latency=.5, macs=.5),
    dict(macs=.5, table='table.json'),
])
def test_latency_and_table_belong_together(options):
    with pytest.raises(ValueError, match='latency with its table or device'):
        BudgetPlanner(**options)


# ------------------------------------------------------------------- forms
def milliseconds(name, ranks):
    """A known time of each layer: launches, and a price by form."""
    if ranks is None:
        return dict(zip('02', (1., 4.)))[name]
    output, inputs, spatial = ranks
    if name == '0':
        return 2.  # never pays
    if spatial:
        return .2 + .1 * output
    if inputs is None:
        return .1 + .3 * output
    return .2 + (.4 * inputs if output is None else .02 * output * inputs)


#: ranks that are measured; of the diagonal for two bases
GRIDS = dict(
    output=[Ranks(x) for x in (4, 8, 12)],
    input=[Ranks(None, x) for x in (2, 4, 6, 8)],
    both=[Ranks(2 * x, x) for x in (2, 4, 6, 8, 10)],
    spatial=[Ranks(x, None, True) for x in (6, 12, 18)])


def forms_table(write, model, forms=tuple(GRIDS), **changes):
    """A table of version 2 by :func:`milliseconds`, with changes of its last
    entry."""
    rows = [x for x in entries(model) if x['id'] in ('carrier', 'model')]
    for old in entries(model):
        if old.get('role') != 'layer' or old['rank'] is not None:
            continue
        name = old['group']
        for form, ranks in [('dense', None)] + [
                (x, y) for x in forms for y in GRIDS[x]]:
            output, inputs, _ = ranks or Ranks()
            rows.append(dict(
                old, id=f'{name}/{form}{output}x{inputs}', form=form,
                rank=output, input_rank=inputs,
                median_ms=milliseconds(name, ranks) + .5))
    rows[-1].update(changes)
    return write(version=2, entries=rows)


def test_costs_in_all_forms(write, model):
    table = LatencyTable.load(forms_table(write, model))
    assert table.forms == ('output', 'input', 'both', 'spatial')
    for grid in GRIDS.values():
        for ranks in grid:
            assert table.cost('2', ranks) == pytest.approx(
                milliseconds('2', ranks))
            assert not table.is_faster('0', ranks)
    assert table.predict({'2': Ranks(4, 2)}) == pytest.approx(
        7 - 4 + milliseconds('2', Ranks(4, 2)))
    # between measured ranks, the next that are lower on no side
    for ranks in (Ranks(5, 2), Ranks(4, 3), Ranks(8, 1)):
        assert table.cost('2', ranks) == table.cost('2', Ranks(8, 4))
    assert table.cost('2', Ranks(None, 3)) == table.cost('2', Ranks(None, 4))
    assert table.cost('2', Ranks(7, None, True)) == table.cost(
        '2', Ranks(12, None, True))
    # past them, on one side or on both
    for ranks in (Ranks(4, 11), Ranks(21, 2), Ranks(21, 11), Ranks(13),
                  Ranks(None, 9), Ranks(19, None, True)):
        assert table.cost('2', ranks) >= 4 and not table.is_faster('2', ranks)


def test_grids_of_ranks_at_once(write, model):
    table = LatencyTable.load(forms_table(write, model))
    outputs, inputs = np.array([1, 4, 9, 30]), np.array([1, 2, 7])
    found = table.cost('2', Ranks(outputs[:, None], inputs))
    assert found.tolist() == [[
        table.cost('2', Ranks(int(x), int(y))) for y in inputs
    ] for x in outputs]


@pytest.mark.parametrize('form', list(GRIDS))
@pytest.mark.parametrize('fraction', [.7, .9])
def test_plans_in_each_form_meet_the_budget(write, model, form, fraction):
    path = forms_table(write, model)
    plan = data_plan(model, latency=fraction, table=path, forms=[form])
    assert {x.form for x in plan.layers.values()} == {form}
    assert set(plan.layers) == {'2'}
    assert taken(plan) <= fraction * 7 + 1e-9


def read(path):
    with open(path) as file:
        return json.load(file)


def data_plan(model, **options):
    torch.manual_seed(1)
    images = torch.randn(8, 3, 6, 6)
    planner = BudgetPlanner(
        loss_aware=False, prediction_layers=True, **options)
    return compress(model, planner, [images])


def taken(plan):
    """Milliseconds by the known function: all else takes two."""
    return 2 + sum(
        milliseconds(x, plan.layers[x].ranks if x in plan.layers else None)
        for x in TIMES)


@pytest.mark.parametrize('fraction', [.5, .6, .8, .9])
def test_default_forms_use_the_budget(write, model, fraction):
    path = forms_table(write, model)
    plan = data_plan(model, latency=fraction, table=path, round_to=2)
    table = LatencyTable.load(path)
    ranks = {k: v.ranks for k, v in plan.layers.items()}
    assert taken(plan) <= table.predict(ranks) <= fraction * 7 + 1e-9
    # the steps of the table are this wide
    assert table.predict(ranks) >= (fraction - .2) * 7


def test_the_form_that_is_fast_here_is_chosen(write, model):
    """Half the time for twice the ranks, in one form."""
    rows = read(forms_table(write, model))['entries']
    for fast in ('input', 'spatial'):
        changed = [
            dict(x, median_ms=.6) if x.get('form') == fast and x['group'] ==
            '2' else x for x in rows
        ]
        path = write(version=2, entries=changed)
        plan = data_plan(copy.deepcopy(model), latency=.5, table=path)
        assert plan.layers['2'].form == fast


def test_forms_are_those_of_the_table(write, model):
    def check(path, *has):
        assert BudgetPlanner(latency=.5, table=path).forms == has
        assert BudgetPlanner(
            latency=.5, table=path, data_aware=False).forms == ('output', )
        with pytest.raises(ValueError, match='without spatial: it has '
                           f'{", ".join(has)}. .*latency_table.py'):
            BudgetPlanner(latency=.5, table=path, forms=['output', 'spatial'])

    check(forms_table(write, model, ('output', 'both')), 'output', 'both')
    check(write(), 'output')


def test_version_2_reads_the_output_form_as_version_1_does(write, model):
    old = LatencyTable.load(write())
    rows = [
        dict(x, input_rank=None, form='dense' if x['rank'] is None else
             'output') if x.get('role') == 'layer' else x
        for x in entries(model)
    ]
    new = LatencyTable.load(write(version=2, entries=rows))
    for rank in (None, *range(1, 33)):
        assert [old.cost(x, rank) for x in '02'] == [
            new.cost(x, rank) for x in '02']
    assert old.forms == new.forms == ('output', )


def test_compressed_model_in_several_forms(write, model):
    path = forms_table(write, model)
    data = read(path)
    ranks = dict(form='both', rank=4, input_rank=2)
    data['entries'].append(
        dict(id='model/compressed', median_ms=5., ranks={'2': ranks}))
    table = LatencyTable.load(write(**data))
    assert table.predict({'2': Ranks(4, 2)}) == pytest.approx(5)
    assert table.predict({}) == pytest.approx(7)


@pytest.mark.parametrize('changes', [
    dict(form='tucker'), dict(form='both'), dict(form='dense'),
    dict(rank=None), dict(rank='8'), dict(rank=0), dict(rank=[1]),
    dict(input_rank=3)])
def test_entries_that_contradict_themselves(write, model, changes):
    """The last one is spatial."""
    path = forms_table(write, model, **changes)
    with pytest.raises(ValueError, match=f'{path} is malformed: .*2/spatial'
                       f'18xNone: .*{next(iter(changes))}=.* do not fit'):
        LatencyTable.load(path)


@pytest.mark.parametrize('key', [
    'form', 'rank', 'input_rank', 'median_ms', 'noise_ms', 'uses', 'carrier'])
def test_missing_keys_are_named(write, model, key):
    path = forms_table(write, model)
    data = read(path)
    del data['entries'][-1][key]
    with pytest.raises(ValueError, match=f"malformed: 2/spatial.* no '{key}'"):
        LatencyTable.load(write(**data))
