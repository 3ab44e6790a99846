# Copyright (c) mmbasis authors. All rights reserved.
"""The tools where a user's GPU is: compress, train, resume, test."""
import json

import pytest
import torch

pytest.importorskip('mmpretrain')

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_compress_train_and_test(workplace, device, monkeypatch):
    folder = workplace.folder / 'small'
    result = workplace.run('--macs', .5, '--calib-batches', 2, '--evaluate',
                           '--work-dir', folder)
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / 'report.json').read_text())
    assert set(report['metrics']) == {'before', 'after'}
    weights = torch.load(folder / 'compressed.pth', weights_only=True)
    assert {x.device.type for x in weights['state_dict'].values()} == {'cpu'}

    config, checkpoint = folder / 'compressed.py', folder / 'compressed.pth'
    tuned = folder / 'tuned'

    def tool(name, *args):
        command = workplace.command(tool=name, config=config)
        command = [*command[:2], *map(str, args)]
        result = workplace.forks.run(
            command, MMBASIS_DATA=str(workplace.data))
        assert result.returncode == 0, result.stderr
        return result

    # MMEngine's wrapper of mixed precision refuses CPUs
    amp = ['--amp'] if device.type == 'cuda' else []
    tool('train', '--work-dir', tuned, *amp)
    log = '\n'.join(x.read_text() for x in tuned.glob('*/*.log'))
    assert ('memory: ' in log) == (device.type == 'cuda')
    tool('train', '--work-dir', tuned, '--resume', *amp, '--cfg-options',
         'train_cfg.max_epochs=2')
    assert (tuned / 'epoch_2.pth').is_file()
    for weights in (checkpoint, tuned / 'epoch_2.pth'):
        out = folder / 'metrics.json'
        tool('test', weights, '--work-dir', folder, '--out', out)
        assert 'accuracy/top1' in json.loads(out.read_text())


def test_analyze(workplace):
    folder = workplace.folder / 'analyzed'
    result = workplace.run(
        '--budgets', .5, '--planners', 'loss', '--calib-batches', 1,
        '--work-dir', folder, tool='analyze')
    assert result.returncode == 0, result.stderr
    found = json.loads((folder / 'analysis.json').read_text())
    assert found['points']
