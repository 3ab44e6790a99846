# Copyright (c) mmbasis authors. All rights reserved.
import copy
import importlib.util
import json

import pytest
import torch
import torch.nn as nn

from mmbasis.planning.costs import Costs, DeviceCost

CONFIG = """
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='mmbasis.CifarResNet', depth=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=5, in_channels=64))
data_preprocessor = dict(
    type='ClsDataPreprocessor', mean=[127.] * 3, std=[60.] * 3, num_classes=5)
"""


@pytest.fixture(scope='module')
def tool(repo_root):
    path = repo_root / 'tools' / 'benchmarks' / 'gpu_latency.py'
    spec = importlib.util.spec_from_file_location('gpu_latency', path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tmp_path):
    """Config of a tiny network."""
    path = tmp_path / 'tiny.py'
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture
def run(tool, config, tmp_path, monkeypatch):
    """Run the benchmark on a tiny network; the report and its Markdown."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    tiny = (config, (32, 32), (16, 16))
    monkeypatch.setattr(tool, 'MODELS', dict(tiny=tiny))

    def run(*args):
        out = tmp_path / 'report'
        tool.main(['--models', 'tiny', '--seconds', '0', '--out', str(out),
                   *args])
        return (json.loads(out.with_suffix('.json').read_text()),
                out.with_suffix('.md').read_text())

    return run


def test_rows_and_resuming(run, tool, monkeypatch):
    made = []

    class Run(tool.Run):

        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def time(self, count):  # as if a MAC took a nanosecond
            assert count >= 1
            assert not self.images.is_cuda and self.graph is None
            assert self.images.dtype == torch.float32
            size = sum(x.numel() for x in self.network.parameters())
            return size * len(self.images) * 1e-6

    monkeypatch.setattr(tool, 'Run', Run)
    report, text = run('--batches', '1', '2')
    assert report['device'] == 'cpu' and report['device_model'] == 'cpu'
    assert list(report['rows']) == ['tiny|1|plain', 'tiny|2|plain']
    names = ['dense', 'macs', 'macs, all forms, multiples of 8', 'paper',
             'device']
    for row, runs in zip(report['rows'].values(), (made[:5], made[5:])):
        assert list(row['plans']) == names
        dense = row['plans']['dense']
        assert dense['of_dense'] == dense['predicted_of_dense'] == 1
        for plan, one in zip(row['plans'].values(), runs):
            assert plan['ms'] == one.time(1)
            assert plan['of_dense'] == pytest.approx(
                plan['ms'] / dense['ms'])
            assert plan['speed_up'] == pytest.approx(1 / plan['of_dense'])
            assert plan['predicted_of_dense'] == pytest.approx(
                plan['predicted_ms'] / dense['predicted_ms'])
        for name in ('macs', 'macs, all forms, multiples of 8', 'paper'):
            assert .4 < row['plans'][name]['macs'] <= .5
            assert row['plans'][name]['of_dense'] < 1
        device = row['plans']['device']
        assert device['budget'] >= .5
        assert device['predicted_of_dense'] < 1 or not device['layers']
    assert len(made) == 10 and len(made[-1].images) == 2
    assert text.count('| tiny | 2 |') == 5
    # rows that are there stay; others are added
    after, _ = run('--batches', '1', '2', '3')
    assert len(made) == 15
    rows = after.pop('rows')
    assert rows.pop('tiny|3|plain') and rows == report.pop('rows')
    assert after == report
    with pytest.raises(ValueError, match='another small'):
        run('--small')


def test_networks_are_timed_or_why_not_is_said(run, monkeypatch):
    def fails(*args):
        raise RuntimeError('no compiler | here\nat all')

    monkeypatch.setattr(torch, 'compile', fails)
    report, text = run('--batches', '1', '--compile', '--small')
    for plan in report['rows']['tiny|1|plain']['plans'].values():
        assert plan['ms'] > 0 and plan['rounds'] >= 5
    row = report['rows']['tiny|1|compiled']
    assert row['failed'] == 'RuntimeError: no compiler / here'
    assert 'tiny, compiled | 1 | failed: RuntimeError: no compiler' in text
    # the next run tries again
    monkeypatch.setattr(torch, 'compile', lambda x: x)
    report, _ = run('--batches', '1', '--compile', '--small')
    assert 'plans' in report['rows']['tiny|1|compiled']


def test_prediction_counts_the_batch(tool, config):
    model, batch = tool.build(config, (1, 3, 32, 32))
    plans = tool.Plans(model, batch)
    cost = DeviceCost('h100-fp16')
    expected = sum(
        cost.of(Costs(x, plans.analysis.statistics[x.name]), None)
        for x in plans.analysis.layers)
    one = plans.predict(None, 'h100-fp16', 1)
    assert one == pytest.approx(expected)
    # launches do not grow with the batch, arithmetic does
    assert one < plans.predict(None, 'h100-fp16', 32) < 32 * one
    plan = plans.paper()
    assert tool.kept(plan) == pytest.approx(.5, abs=.05)
    assert plans.predict(plan, 'cpu', 1) != plans.predict(None, 'cpu', 1)


@pytest.mark.parametrize('name, preset', [
    ('cpu', 'cpu'), ('NVIDIA H100 80GB HBM3', 'h100-fp16'),
    ('NVIDIA H200', 'h100-fp16'), ('Tesla T4', 't4-fp16'),
    ('NVIDIA A100-SXM4-40GB', 'a100-fp16'), ('Orin NX', 'orin-nx-fp16'),
    ('NVIDIA GeForce RTX 3090', 'rtx3090-fp16'), ('Xavier', 'xavier-fp16'),
    ('Orin', 'orin-agx-fp16'), ('GeForce GTX 750', None)
])
def test_device_models(tool, name, preset):
    assert tool.preset_of(name) == preset


class Shared(nn.Module):
    """Layers of a backbone, and a head that shares a convolution between two
    normalisations."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
            for _ in range(2))
        self.head[1][0] = self.head[0][0]
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(.5, 2)

    def forward(self, x, samples, mode):
        x = self.backbone(x)
        return [head(x) for head in self.head]


def test_only_what_can_be_folded_is(tool):
    torch.manual_seed(0)
    model = Shared().eval()
    x = torch.randn(2, 3, 8, 8)
    expected = copy.deepcopy(model)(x, None, 'tensor')
    folded = tool.fold(model, (1, 3, 8, 8), None)
    torch.testing.assert_close(folded(x, None, 'tensor'), expected)
    assert not any(isinstance(m, nn.BatchNorm2d)
                   for m in folded.backbone.modules())
    assert isinstance(folded.head[0][1], nn.BatchNorm2d)
    assert folded.head[0][0] is folded.head[1][0]
