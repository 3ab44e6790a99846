# Copyright (c) mmbasis authors. All rights reserved.
"""tools/compress.py, run as a user runs it."""
import json
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmbasis
from mmbasis.compression import META_KEY
from mmbasis.utils import load_config

FILES = {
    'plan.json', 'report.json', 'compressed.pth', 'compressed.py',
    'spectra.png', 'ranks.png'
}


@pytest.fixture(scope='module')
def compressed(workplace):
    """Folder with the results of one run."""
    folder = workplace.folder / 'macs'
    command = workplace.command('--macs', 0.5, '--calib-batches', 2,
                                '--evaluate', '--work-dir', folder)
    # from scratch, as a user does
    result = subprocess.run([sys.executable, *command],
                            env=dict(
                                os.environ, MMBASIS_DATA=str(workplace.data)),
                            capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    folder.with_suffix('.out').write_text(result.stdout)
    return folder


@pytest.fixture
def scope():
    yield
    init_default_scope('mmengine')


def read(path):
    return json.loads(path.read_text())


def ranks(folder):
    return {
        name: (layer['rank'], layer['input_rank'])
        for name, layer in read(folder / 'plan.json')['layers'].items()
    }


def images(workplace):
    paths = sorted((workplace.data / 'tiny' / 'test').glob('*/*.png'))
    return [str(path) for path in paths]


# ------------------------------------------------------------- what it writes
def test_files(compressed):
    found = {path.name for path in compressed.iterdir() if path.is_file()}
    assert found == FILES
    for name in ('spectra.png', 'ranks.png'):
        assert cv2.imread(str(compressed / name)).std() > 0


def test_report(compressed):
    report = read(compressed / 'report.json')
    plan = read(compressed / 'plan.json')
    for key in ('macs', 'params', 'conv_macs'):
        assert 0 < report[key]['after'] < report[key]['before']
    totals = plan['totals']['macs']
    assert totals['after'] <= 0.5 * totals['before']
    for key in ('macs', 'params'):
        assert report['compressible'][key] == plan['totals'][key]
        saved = report[key]['before'] - report[key]['after']
        assert saved == plan['totals'][key]['before'] - plan['totals'][key][
            'after']
    # the weights are random: any accuracy, but that of all three classes
    for when in ('before', 'after'):
        assert list(report['metrics'][when]) == ['accuracy/top1']
        assert 0 <= report['metrics'][when]['accuracy/top1'] <= 100
    # 16x16: the stem, two convolutions a block, the classifier
    convs = 256 * 16 * 27 + 2 * 256 * 16 * 144
    convs += 64 * 32 * (144 + 288) + 16 * 64 * (288 + 576)
    assert report['conv_macs']['before'] == convs
    assert report['planner']['type'] == 'BudgetPlanner'
    assert report['predicted_ms'] == plan['predicted_ms'] != {}
    table = compressed.with_suffix('.out').read_text()
    for name, time in report['predicted_ms'].items():
        kept = f'{time["after"] / time["before"]:.2%}'
        assert re.search(f'predicted, {name} .*{kept}', table)


def test_without_test_dataloader(workplace, tmp_path):
    options = [f'test_{x}=None' for x in ('dataloader', 'evaluator', 'cfg')]
    done = workplace.run('--macs', .5, '--work-dir', tmp_path / 'a',
                         '--calib-batches', 1, '--cfg-options', *options)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / 'a' / 'report.json')['macs']['before'] > 0
    done = workplace.run('--macs', .5, '--evaluate', '--work-dir',
                         tmp_path / 'b', '--cfg-options', *options)
    assert done.returncode != 0
    assert 'evaluation needs test_dataloader' in done.stderr
    assert not (tmp_path / 'b').exists()


def test_checkpoint_is_flat_and_readable_without_pickle(compressed):
    checkpoint = torch.load(compressed / 'compressed.pth', weights_only=True)
    plan = read(compressed / 'plan.json')
    stored = json.loads(json.dumps(checkpoint['meta'][META_KEY]))
    assert stored['layers'] == plan['layers']
    assert stored['dense'] == plan['dense']
    assert tuple(checkpoint['meta']['dataset_meta']['classes']) == ('a', 'b',
                                                                    'c')
    for name, layer in plan['layers'].items():
        weight = checkpoint['state_dict'][f'{name}.basis.weight']
        rows, columns = layer['shape'][:2]
        assert len(weight) == (layer['rank'] or rows)
        assert weight.shape[1] == (layer['input_rank'] or columns)
        assert f'{name}.weight' not in checkpoint['state_dict']
    assert 'head.fc.weight' in checkpoint['state_dict']


def test_following_the_plan(workplace, compressed, tmp_path):
    result = workplace.run('--plan', compressed / 'plan.json',
                           '--calib-batches', 2, '--work-dir', tmp_path)
    assert result.returncode == 0, result.stderr
    assert ranks(tmp_path) == ranks(compressed)
    one, two = (
        torch.load(folder / 'compressed.pth')['state_dict']
        for folder in (compressed, tmp_path))
    assert all(torch.equal(one[key], two[key]) for key in one)
    report = read(tmp_path / 'report.json')
    assert 'metrics' not in report
    assert report['macs'] == read(compressed / 'report.json')['macs']


def test_parameters_in_multiples(workplace, tmp_path):
    result = workplace.run('--params', 0.4, '--round-to', 4, '--forms',
                           'output', 'input', 'both', 'spatial',
                           '--calib-batches', 1, '--work-dir', tmp_path,
                           '--cfg-options', 'train_dataloader.batch_size=2')
    assert result.returncode == 0, result.stderr
    assert any(inputs for _, inputs in ranks(tmp_path).values())
    given = [x for pair in ranks(tmp_path).values() for x in pair if x]
    assert given and all(rank % 4 == 0 for rank in given)
    totals = read(tmp_path / 'report.json')['compressible']['params']
    assert totals['after'] <= 0.4 * totals['before']


# ------------------------------------------------------- what others can load
def test_loads_in_mmpretrain(workplace, compressed, scope):
    from mmpretrain import ImageClassificationInferencer, get_model
    config = str(compressed / 'compressed.py')
    checkpoint = str(compressed / 'compressed.pth')
    expected = mmbasis.load_compressed(str(workplace.config), checkpoint)
    model = get_model(config, pretrained=checkpoint)
    assert type(model).__name__ == 'ImageClassifier'
    x = torch.rand(4, 3, 16, 16)
    assert torch.equal(model(x), expected(x))
    # the config says where the weights are
    assert torch.equal(get_model(config, pretrained=True)(x), expected(x))

    inferencer = ImageClassificationInferencer(config, pretrained=checkpoint)
    results = inferencer(images(workplace))
    for path, result in zip(images(workplace), results):
        image = torch.from_numpy(cv2.imread(path)).permute(2, 0, 1)
        data = expected.data_preprocessor(dict(inputs=[image]))
        scores = expected.head.predict(expected.extract_feat(
            data['inputs']))[0].pred_score
        np.testing.assert_allclose(
            result['pred_scores'], scores.detach(), rtol=1e-4)


def test_predictions_are_close_to_the_dense_ones(workplace, scope):
    """At hardly any compression: the right weights in the right places."""
    folder = workplace.folder / 'close'
    result = workplace.run('--macs', 0.97, '--work-dir', folder)
    assert result.returncode == 0, result.stderr
    assert len(ranks(folder)) >= 1
    init_default_scope('mmpretrain')
    dense = MODELS.build(load_config(str(workplace.config)).model).eval()
    dense.load_state_dict(torch.load(workplace.checkpoint)['state_dict'])
    model = mmbasis.load_compressed(
        str(folder / 'compressed.py'), str(folder / 'compressed.pth'))
    x = torch.stack([
        torch.from_numpy(cv2.imread(path)).permute(2, 0, 1)
        for path in images(workplace)
    ]).flip(1).sub(127.).div(60.)
    with torch.no_grad():
        expected = dense(x)
        error = (model(x) - expected).norm()
    assert 0 < error < 0.3 * (expected - expected.mean(0)).norm()


def test_dense_checkpoint_in_its_place(workplace, compressed, scope):
    from mmpretrain import get_model
    with pytest.raises(RuntimeError, match='these weights are dense'):
        get_model(
            str(compressed / 'compressed.py'),
            pretrained=str(workplace.checkpoint))
    with pytest.raises(ValueError, match='carries no compression plan'):
        mmbasis.load_compressed(
            str(compressed / 'compressed.py'), str(workplace.checkpoint))


def test_tools_test_takes_it(workplace, compressed, tmp_path):

    def run(config, checkpoint):
        tool = workplace.root / 'tools' / 'test.py'
        command = map(str, (tool, config, checkpoint, '--work-dir', tmp_path,
                            '--out', tmp_path / 'metrics.json'))
        return workplace.forks.run(
            list(command), MMBASIS_DATA=str(workplace.data))

    result = run(compressed / 'compressed.py', compressed / 'compressed.pth')
    assert result.returncode == 0, result.stderr
    metrics = read(tmp_path / 'metrics.json')
    assert metrics == read(compressed / 'report.json')['metrics']['after']

    (tmp_path / 'metrics.json').unlink()
    result = run(compressed / 'compressed.py', workplace.checkpoint)
    assert result.returncode != 0
    assert 'the checkpoint under test is dense' in result.stderr
    assert not (tmp_path / 'metrics.json').exists()


def test_stand_alone_config(compressed):
    config = Config.fromfile(str(compressed / 'compressed.py'))
    assert config.model.type == 'mmbasis.ImageClassifier'
    assert config.model.backbone.depth == 8
    assert config.model.data_preprocessor.std == [60.] * 3
    assert config.load_from == str(compressed / 'compressed.pth')
    assert 'mmbasis' in config.custom_imports.imports


# --------------------------------------------------------------------- errors
def newer_plan(workplace, compressed):
    plan = dict(read(compressed / 'plan.json'), version=99)
    path = workplace.folder / 'newer.json'
    path.write_text(json.dumps(plan))
    return dict(args=['--plan', path])


def other_plan(workplace, compressed):
    """Of a deeper network."""
    plan = read(compressed / 'plan.json')
    name, layer = list(plan['layers'].items())[-1]
    plan['layers'][name.replace('.0.', '.7.')] = layer
    path = workplace.folder / 'other.json'
    path.write_text(json.dumps(plan))
    return dict(args=['--plan', path])


def truncated_plan(workplace, compressed):
    path = workplace.folder / 'truncated.json'
    path.write_text((compressed / 'plan.json').read_text()[:300])
    return dict(args=['--plan', path])


def truncated(workplace, compressed):
    path = workplace.folder / 'truncated.pth'
    path.write_bytes(workplace.checkpoint.read_bytes()[:50_000])
    return dict(checkpoint=path)


def of_another_model(workplace, compressed):
    path = workplace.folder / 'other.pth'
    checkpoint = torch.load(workplace.checkpoint)
    del checkpoint['state_dict']['head.fc.weight']
    torch.save(checkpoint, path)
    return dict(checkpoint=path)


def with_nan(workplace, compressed):
    path = workplace.folder / 'nan.pth'
    checkpoint = torch.load(workplace.checkpoint)
    checkpoint['state_dict']['backbone.layer2.0.conv1.weight'][3] = np.nan
    torch.save(checkpoint, path)
    return dict(checkpoint=path)


def compressed_already(workplace, compressed):
    return dict(checkpoint=compressed / 'compressed.pth')


def given(**kwargs):
    return lambda workplace, compressed: kwargs


@pytest.mark.parametrize(
    'case, message', [
        (given(checkpoint='absent.pth'), 'absent.pth does not exist'),
        (truncated, 'truncated.pth cannot be read, it may be truncated'),
        (of_another_model, 'other.pth does not fit the model: head.fc.weight: '
         'missing'),
        (with_nan, 'NaN or infinite in backbone.layer2.0.conv1'),
        (compressed_already, 'these weights are compressed'),
        (given(data='nowhere'), 'No images in'),
        (given(config='absent.py'), 'absent.py does not exist'),
        (given(args=['--macs', 0]), "--macs: must be a number in (0, 1], but "
         "got '0'"),
        (given(args=['--macs', 1.5]), "in (0, 1], but got '1.5'"),
        (given(args=['--macs', 0.01]), 'macs=0.01 cannot be met'),
        (given(args=['--macs', 0.5, '--round-to', 0]), '--round-to: must be'),
        (given(args=['--latency', 0.5]), 'and --table (or --device) belong'),
        (given(args=['--latency', 0.5, '--device', 'toaster']),
         "no device model is named 'toaster'"),
        (given(args=['--plan', 'absent.json']), 'absent.json'),
        (newer_plan, 'newer.json: the plan has version 99'),
        (truncated_plan, 'truncated.json is not JSON'),
        (other_plan, 'the plan is of another model'),
    ],
    ids=lambda x: getattr(x, '__name__', None) or str(x))
def test_bad_input(workplace, compressed, tmp_path, case, message):
    kwargs = case(workplace, compressed)
    args = kwargs.pop('args', ['--macs', 0.5])
    folder = tmp_path / 'work'
    result = workplace.run(*args, '--work-dir', folder, **kwargs)
    assert result.returncode != 0
    assert message in ' '.join(result.stderr.split())
    assert not [path for path in folder.rglob('*') if path.is_file()]


# ------------------------------------------------------- the paper's network
def test_the_papers_cut(shared_data, cifar10_subset, tmp_path, repo_root):
    """64.11 % fewer MACs at a threshold of 0.63, from the authors' weights."""
    converter = repo_root / 'tools' / 'model_converters' / 'resnet56_cifar.py'
    checkpoint = tmp_path / 'resnet56.pth'
    subprocess.run([
        sys.executable,
        str(converter),
        str(shared_data / 'resnet56_cifar10.pth'),
        str(checkpoint)
    ],
                   check=True)
    env = dict(os.environ, MMBASIS_DATA=str(cifar10_subset(train=2, test=2)))
    result = subprocess.run([
        sys.executable,
        str(repo_root / 'tools' / 'compress.py'),
        str(repo_root / 'configs' / 'mmpretrain' / 'resnet56_cifar10.py'),
        str(checkpoint), '--energy', '0.63', '--work-dir',
        str(tmp_path / 'work'), '--cfg-options',
        'train_dataloader.batch_size=8', 'train_dataloader.num_workers=0',
        'test_dataloader.num_workers=0'
    ],
                            env=env,
                            capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stderr
    macs = read(tmp_path / 'work' / 'report.json')['conv_macs']
    assert macs['before'] == 125_485_056
    assert abs(macs['after'] / macs['before'] - 0.3589) < 0.0005
