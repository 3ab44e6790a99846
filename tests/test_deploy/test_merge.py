# Copyright (c) mmbasis authors. All rights reserved.
"""Back to dense where a latency table says so."""
import json

import pytest
import torch

from mmbasis.compression import plan_of, read_checkpoint
from mmbasis.deploy import Deployment, merge_slow_layers
from mmbasis.deploy.export import merge_layers

CLS = 'classification_onnxruntime'


def write_table(path, plan, slow, **changes):
    """A table of version 1 in which the layers ``slow`` do not get faster; it
    has ranks of the output form."""
    rows = [dict(id='c', role='carrier', median_ms=1e-9, noise_ms=0.)]
    for name, entry in plan.layers.items():
        own = entry.rank or entry.full_rank // 2
        for rank, ms in ((None, 1.), (own, 2. if name in slow else .5)):
            rows.append(
                dict(
                    id=f'{name}/{rank}',
                    role='layer',
                    group=name,
                    carrier='c',
                    rank=rank,
                    kind=entry.kind,
                    weight_shape=entry.shape,
                    uses={name: 1},
                    median_ms=ms,
                    noise_ms=0.))
    data = dict(
        schema='mmbasis.latency_table',
        version=1,
        status='complete',
        device=dict(board='', cpu='some CPU'),
        backend='onnxruntime',
        precision='fp32',
        entries=rows)
    path.write_text(json.dumps(dict(data, **changes)))
    return str(path)


def test_slow_layers_are_merged(classifier, deploy_cfg, tmp_path):
    entries = classifier.plan.layers
    slow = [name for name, x in entries.items() if x.form == 'output'][:2]
    # of which the table knows nothing
    others = {name for name, x in entries.items() if x.form != 'output'}
    assert slow and others
    table = write_table(tmp_path / 't.json', classifier.plan,
                        {*slow, *others})
    cfg, checkpoint, merged = merge_slow_layers(
        deploy_cfg(CLS), classifier.cfg, classifier.checkpoint, table,
        str(tmp_path))
    assert list(merged) == slow and merged[
        slow[0]]['basis_ms'] == pytest.approx(2)
    plan = plan_of(read_checkpoint(checkpoint))
    assert not set(slow) & set(plan.layers)
    assert 'merged' in plan.dense[slow[0]].reason
    assert set(plan.layers) == set(classifier.plan.layers) - set(slow)
    # the prediction was that of more basis layers
    assert classifier.plan.predicted_ms and not plan.predicted_ms
    # config and checkpoint are those of the same function
    new = Deployment(deploy_cfg(CLS), cfg, checkpoint).model
    old = Deployment(
        deploy_cfg(CLS), classifier.config, classifier.checkpoint).model
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(
            new(x, mode='tensor'), old(x, mode='tensor'), atol=1e-4)


def test_slow_layers_of_all_forms_are_merged(classifier, deploy_cfg, tmp_path):
    """One layer of each form is slow by a table of version 2."""
    plan = classifier.plan
    slow = {x.form: name for name, x in plan.layers.items()}
    assert set(slow) > {'output'}
    table = write_table(tmp_path / 't.json', plan, slow.values())
    data = json.loads((tmp_path / 't.json').read_text())
    for row in data['entries'][1:]:
        entry = plan.layers[row['group']]
        ranks = dict(form='dense', rank=None, input_rank=None)
        if row['rank'] is not None:
            ranks = dict(form=entry.form, rank=entry.rank,
                         input_rank=entry.input_rank)
        row.update(ranks)
    (tmp_path / 't.json').write_text(json.dumps(dict(data, version=2)))
    _, checkpoint, merged = merge_slow_layers(
        deploy_cfg(CLS), classifier.cfg, classifier.checkpoint, table,
        str(tmp_path))
    assert set(merged) == set(slow.values())
    for form, name in slow.items():
        assert merged[name]['form'] == form
        assert merged[name]['basis_ms'] == pytest.approx(2)
    assert not set(merged) & set(plan_of(read_checkpoint(checkpoint)).layers)


def test_nothing_to_merge(classifier, deploy_cfg, tmp_path):
    table = write_table(tmp_path / 't.json', classifier.plan, ())
    cfg, checkpoint, merged = merge_slow_layers(
        deploy_cfg(CLS), classifier.cfg, classifier.checkpoint, table,
        str(tmp_path))
    assert merged == {} and checkpoint == classifier.checkpoint


@pytest.mark.parametrize('changes, text', [
    (dict(backend='tensorrt'), "backend 'tensorrt', not 'onnxruntime'"),
    (dict(precision='fp16'), "precision 'fp16', not 'fp32'"),
])
def test_table_of_another_target(classifier, deploy_cfg, tmp_path, changes,
                                 text):
    table = write_table(tmp_path / 't.json', classifier.plan, (), **changes)
    with pytest.raises(ValueError, match=text):
        merge_slow_layers(
            deploy_cfg(CLS), classifier.cfg, classifier.checkpoint, table,
            str(tmp_path))


def test_a_dense_model_has_nothing_to_merge():
    with pytest.raises(ValueError, match='Conv2d carries no plan'):
        merge_layers(torch.nn.Conv2d(3, 4, 1), [], 'merged')
