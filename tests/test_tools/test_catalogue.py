# Copyright (c) mmbasis authors. All rights reserved.
"""Twenty models of the catalogue in every test run, all of them on demand:

pytest -m catalogue.
"""
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import roi_align

TOOLS = str(Path(__file__).resolve().parents[2] / 'tools')
if TOOLS not in sys.path:
    sys.path.insert(0, TOOLS)

import catalogue  # noqa: E402
from catalogue_sweep.compare import difference  # noqa: E402
from catalogue_sweep.configs import (  # noqa: E402
    Entry,
    model_hash,
    read_config,
)
from catalogue_sweep.models import architecture  # noqa: E402
from catalogue_sweep.operators import (  # noqa: E402
    carafe,
    deform_roi_pool,
    masked_conv2d,
)
from catalogue_sweep.processes import (  # noqa: E402
    cause_of,
    check_all,
    without_folders,
)
from catalogue_sweep.report import markdown, summary  # noqa: E402
from catalogue_sweep.sample import draw_families, find_models  # noqa: E402

from mmbasis.layers import BasisLayer  # noqa: E402

# small ones of every make
CLASSIFIERS = [
    'resnet/resnet18_8xb32_in1k.py',
    'mobilenet_v2/mobilenet-v2_8xb32_in1k.py',
    'shufflenet_v1/shufflenet-v1-1x_16xb64_in1k.py',
    'regnet/regnetx-400mf_8xb128_in1k.py',
    'hrnet/hrnet-w18_4xb32_in1k.py',
    'convnext_v2/convnext-v2-atto_32xb32_in1k.py',
    'deit/deit-tiny_4xb256_in1k.py',
    'swin_transformer/swin-tiny_16xb64_in1k.py',
    'mobilevit/mobilevit-xxsmall_8xb128_in1k.py',
    'lenet/lenet5_mnist.py',
]
DETECTORS = [
    'retinanet/retinanet_r18_fpn_1x_coco.py',
    'faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    'mask_rcnn/mask-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco.py',
    'fcos/fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-'
    'lsj-200e_coco.py',
    'yolox/yolox_nano_8xb8-300e_coco.py',
    'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
    'detr/detr_r18_8xb2-500e_coco.py',
    'centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py',
]
SMALL = ([f'mmpretrain::{x}'
          for x in CLASSIFIERS] + [f'mmdet::{x}' for x in DETECTORS])
#: those that go through the default pipeline
THOROUGH = ('mmpretrain::convnext_v2/convnext-v2-atto_32xb32_in1k.py',
            'mmdet::yolox/yolox_nano_8xb8-300e_coco.py',
            'mmdet::detr/detr_r18_8xb2-500e_coco.py')


def entry_of(name, thorough=False):
    library, config = name.split('::')
    return Entry(f'{library}-{0 if thorough else 1:012x}', library, [config])


def check(entry):
    (_, result), = check_all([entry])
    return result


@pytest.mark.parametrize('name', SMALL)
def test_model(name):
    result = check(entry_of(name, name in THOROUGH))
    assert result['status'] == 'passed', result.get('traceback', result)
    assert result['modes'] == ['tensor', 'predict', 'loss']
    assert result['thorough'] == (name in THOROUGH)
    assert result['layers'] <= result['full_rank_layers']
    assert result['counted']['after'] < result['counted']['before']


@pytest.mark.catalogue
def test_full_catalogue():
    """What is done already in ``work_dirs/catalogue`` is not done again; the
    largest models, one at a time, may take 21 GB."""
    root = Path(TOOLS).parent
    out = root / 'work_dirs' / 'catalogue' / 'report'
    command = [sys.executable, f'{TOOLS}/catalogue.py', '--out', str(out)]
    for limits in (['--jobs', str(os.cpu_count())],
                   '--again limit --memory 21 --timeout 3000'.split()):
        subprocess.run(command + limits, cwd=root, check=True)
    total = json.loads(out.with_suffix('.json').read_text())['summary']
    assert total['checked'] == total['models']
    assert total['passed_of_built'] >= .98


# ---------------------------------------------- the sweep sees what is wrong
def test_wrong_full_rank_is_our_failure(monkeypatch):
    project = BasisLayer.project

    def wrong(self, *args):
        project(self, *args)
        self.last.weight.data[0] *= 1.01

    monkeypatch.setattr(BasisLayer, 'project', wrong)
    result = check(entry_of(SMALL[0]))
    assert (result['status'], result['step']) == ('failed', 'full rank')
    assert result['cause'] == 'ours' and result['layer_error'] > 1e-4


@pytest.mark.parametrize('form, has_it', [
    ('both', lambda layer: layer.input_basis is not None),
    ('spatial', lambda layer: layer.spatial)])
def test_wrong_form_is_our_failure(monkeypatch, form, has_it):
    project = BasisLayer.project

    def wrong(self, *args):
        project(self, *args)
        if has_it(self):
            self.parts[0].weight.data[0] *= 1.01

    monkeypatch.setattr(BasisLayer, 'project', wrong)
    result = check(entry_of(SMALL[0]))
    assert (result['status'], result['step']) == ('failed',
                                                  f'full rank, {form}')


def test_costlier_plan_is_our_failure(monkeypatch):
    from catalogue_sweep import checks
    planner = checks.BudgetPlanner
    monkeypatch.setattr(checks, 'BudgetPlanner',
                        lambda macs, **kwargs: planner(macs=.6, **kwargs))
    result = check(entry_of(SMALL[0]))
    assert (result['status'], result['step']) == ('failed', 'half')


def test_what_is_not_our_failure(monkeypatch):
    result = check(Entry('mmdet-0', 'mmdet', ['x.py'], 'ImportError: no such'))
    assert (result['status'], result['cause']) == ('catalogue',
                                                   'optional dependency')
    assert cause_of('RuntimeError: x is not implemented for CPU',
                    'dense') == 'needs a GPU'
    assert cause_of('KeyError: x', 'build') == 'the config is broken'
    (_, result), = check_all([entry_of(SMALL[0])], seconds=.1)
    assert (result['status'], result['cause']) == ('limit', 'time limit')
    monkeypatch.setattr('catalogue_sweep.checks.analyze',
                        lambda *_: torch.empty(2**36))
    result = check(entry_of(SMALL[0]))
    assert (result['status'], result['cause']) == ('limit', 'memory limit')


def test_difference():
    a = dict(x=[torch.arange(4.), torch.ones(2)])
    assert difference(a, a) == 0
    b = dict(x=[torch.arange(4.) * 1.01, torch.ones(2)])
    assert difference(b, a) == pytest.approx(.01, rel=.7)
    # a large mean hides nothing
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert difference(100 + 1.01 * x, 100 + x) == pytest.approx(.01, rel=.01)
    assert difference([torch.full((4, ), 1e-9)],
                      [torch.zeros(4)]) == pytest.approx(2e-9)
    assert difference([torch.ones(2)], [torch.ones(3)]) == float('inf')
    assert difference([torch.tensor([1., float('nan')])],
                      [torch.ones(2)]) == float('inf')


# ------------------------------- operators that MMCV has for accelerators only
def test_carafe():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=generator)
    masks = torch.randn(2, 2 * 9, 6, 6, generator=generator)
    outputs = carafe(x, masks, kernel_size=3, group_size=2, scale_factor=2)
    padded = F.pad(x, (1, 1, 1, 1))
    for n, c, i, j in ((0, 0, 0, 0), (0, 1, 5, 2), (1, 2, 3, 4), (1, 3, 1, 5)):
        window = padded[n, c, i // 2:i // 2 + 3, j // 2:j // 2 + 3]
        mask = masks[n].view(2, 3, 3, 6, 6)[c // 2, :, :, i, j]
        torch.testing.assert_close(outputs[n, c, i, j], (window * mask).sum())


def test_pooling_of_deformed_regions():
    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0, 2, 4, 14, 12], [1, 6, 2, 12, 20]]).float()
    offset = torch.zeros(2, 2, 2, 3)
    whole = roi_align(x, rois, (2, 3), .5)
    for zero in (None, offset):
        torch.testing.assert_close(
            deform_roi_pool(x, rois, zero, (2, 3), .5), whole)
    offset[1, 0, 1, 2] = 2.  # by two tenths of a width of 6
    moved = deform_roi_pool(x, rois, offset, (2, 3), .5)
    rois[:, 1::2] += 1.2
    whole[1, :, 1, 2] = roi_align(x, rois, (2, 3), .5)[1, :, 1, 2]
    torch.testing.assert_close(moved, whole)


def test_masked_convolution():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 4, 4, generator=generator)
    conv = torch.nn.Conv2d(2, 3, 3, padding=1)
    mask = torch.zeros(1, 4, 4)
    mask[0, 1, 2] = .5
    outputs = masked_conv2d(x, mask, conv.weight, conv.bias, (1, 1))
    torch.testing.assert_close(outputs[0, :, 1, 2], conv(x)[0, :, 1, 2])
    assert outputs.count_nonzero() == 3


# minutes each; their stand-ins are tested above in every run
@pytest.mark.catalogue
@pytest.mark.parametrize('name, operator', [
    ('carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py', 'CARAFEPack'),
    ('guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py', 'MaskedConv2d')
])
def test_model_with_stand_in(name, operator):
    result = check(entry_of(f'mmdet::{name}'))
    assert result['status'] == 'passed', result.get('traceback', result)
    assert result['stand_ins'] == [operator]


# ------------------------------------------------------------ tool and report
def test_same_model_counts_once():
    cfg = read_config('mmdet', DETECTORS[0])
    other = read_config('mmdet', DETECTORS[0])
    other.model.backbone.init_cfg = None
    cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint='x')
    cfg.train_dataloader.batch_size += 1
    assert model_hash(cfg) != model_hash(other)
    del other.model.backbone.init_cfg
    assert model_hash(cfg) == model_hash(other)


def test_config_is_made_fit_for_one_process_without_downloads():
    cfg = read_config('mmdet', DETECTORS[0])
    cfg.model.backbone.init_cfg = dict(checkpoint='https://x')  # as in PVT
    cfg.model.neck.norm_cfg = dict(type='MMSyncBN', requires_grad=True)
    model = architecture(cfg)
    assert 'init_cfg' not in model.backbone
    assert model.neck.norm_cfg == dict(type='BN', requires_grad=True)
    assert cfg.model.neck.norm_cfg.type == 'MMSyncBN'


def test_resume_and_report(tmp_path, monkeypatch, capsys):
    entries = [entry_of(SMALL[0]), Entry('mmdet-2', 'mmdet', ['x.py'], 'E: f')]
    (tmp_path / 'models.json').write_text(
        json.dumps(
            dict(
                versions=catalogue.VERSIONS,
                models=[asdict(entry) for entry in entries])))
    argv = ['catalogue.py', '--work-dir', str(tmp_path), '--out']
    monkeypatch.setattr(sys, 'argv', argv + [str(tmp_path / 'a')])
    catalogue.main()
    result = tmp_path / 'results' / f'{entries[0].key}.json'
    assert json.loads(result.read_text())['status'] == 'passed'
    times = [x.stat().st_mtime_ns for x in result.parent.iterdir()]
    monkeypatch.setattr(sys, 'argv',
                        argv + [str(tmp_path / 'b'), '--again', 'catalogue'])
    catalogue.main()
    again = [x.stat().st_mtime_ns for x in result.parent.iterdir()]
    assert sum(a != b for a, b in zip(times, again)) == 1
    content = json.loads((tmp_path / 'b.json').read_text())
    assert [x['status'] for x in content['models']] == ['catalogue', 'passed']
    assert content['summary']['built'] == content['summary']['passed'] == 1
    text = (tmp_path / 'b.md').read_text()
    assert '2 of 2 distinct models' in text and 'E: f' in text
    assert capsys.readouterr().out
    # a report alone will do, on another machine
    for file in result.parent.iterdir():
        file.unlink()
    monkeypatch.setattr(sys, 'argv', argv + [str(tmp_path / 'b')])
    catalogue.main()
    assert not list(result.parent.iterdir())
    assert json.loads((tmp_path / 'b.json').read_text()) == content
    content['versions']['mmdet'] = 'another'
    (tmp_path / 'b.json').write_text(json.dumps(content))
    monkeypatch.setattr(sys, 'argv',
                        argv + [str(tmp_path / 'b'), '--report-only'])
    catalogue.main()
    assert not json.loads((tmp_path / 'b.json').read_text())['models']


def test_counts():
    rows = [
        dict(name='a', configs=['a', 'b'], seconds=1, **x)
        for x in (dict(
            status='failed', built=True, cause='ours', step='half', error='E'),
                  dict(
                      status='catalogue',
                      built=True,
                      cause='needs a GPU',
                      step='dense',
                      error='|'),
                  dict(
                      status='catalogue',
                      cause='optional dependency',
                      step='build',
                      error='E'))
    ]
    total = summary(rows, 10)
    assert (total['models'], total['checked'], total['configs']) == (10, 3, 6)
    assert (total['built'], total['not_built'], total['failed']) == (2, 1, 1)
    assert total['causes']['built'] == {'ours': 1, 'needs a GPU': 1}
    assert '3 of 10 distinct models' in markdown(rows, 10, {})


def test_reports_name_no_folder_of_a_machine():
    files = catalogue.__file__, torch.__file__
    text = without_folders(f'File "{files[0]}", then {files[1]}: not found')
    assert text == 'File "tools/catalogue.py", then torch/__init__.py: ' \
        'not found'


def test_families_are_the_same_with_every_stack(capsys):
    rows = [dict(name=f'mmdet::{x}/{x}_{i}.py', params=params, status=status)
            for x in 'abcdef' for i, (params, status) in enumerate(
                [(9, 'passed'), (7, 'passed'), (5, 'failed')])]
    names = draw_families(rows, 3, seed=1)
    assert len(names) == 3 and all(x.endswith('_1.py') for x in names)
    assert names == draw_families(rows[::-1], 3, seed=1)
    assert any(names != draw_families(rows, 3, seed=x) for x in range(5))
    with pytest.raises(ValueError, match='--families 7: models of 6 fam'):
        draw_families(rows, 7, seed=1)
    # a config that describes the same model as another one counts, too
    installed = [Entry('k', 'mmdet', ['z.py', names[0].split('::')[1]])]
    assert find_models(installed, names) == installed
    said = capsys.readouterr().out.replace('\n', '')
    assert [x in said for x in names] == [False, True, True]
