# Copyright (c) mmbasis authors. All rights reserved.
"""Deploy configs: one for each task and back end, completed on demand."""
import json
import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from mmengine.config import Config

from mmbasis.deploy import (
    Deployment,
    complete,
    open_onnx,
    parse_size,
    write_calibration,
)
from mmbasis.deploy.configs import check_size, needs_size

FOLDER = Path(__file__).resolve().parents[2] / 'configs' / 'deploy'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
FASTER = dict(
    type='FasterRCNN',
    data_preprocessor=dict(type='DetDataPreprocessor', pad_size_divisor=32),
    rpn_head=dict(type='RPNHead'),
    roi_head=dict(
        type='StandardRoIHead',
        bbox_head=dict(
            type='Shared2FCBBoxHead', in_channels=256, roi_feat_size=7)),
    test_cfg=dict(rpn=dict(max_per_img=1000), rcnn=dict()))


def read(name):
    return Config.fromfile(str(FOLDER / f'{name}.py'))


def model_cfg(**changes):
    return Config(dict(model=dict(FASTER, **changes)))


def shapes(cfg, graph=0, name='input'):
    """The smallest, best and largest shape of an input."""
    found = cfg.backend_config.model_inputs[graph]['input_shapes'][name]
    return [found[f'{x}_shape'] for x in ('min', 'opt', 'max')]


def test_one_for_each_task_and_back_end():
    tasks = ('classification', 'detection', 'detection-before-nms')
    backends = ('onnxruntime', 'tensorrt')
    assert set(NAMES) == {f'{x}_{y}' for x in tasks for y in backends}


# ------------------------------------------------------------------ complete
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('batch', [1, 2])
def test_mmdeploy_reads_what_is_complete(name, dynamic, batch, tmp_path):
    utils = pytest.importorskip('mmdeploy.utils')
    tensorrt = name.endswith('tensorrt')
    ranges = dynamic and tensorrt
    size = [(160, 192), (224, 224), (320, 256)] if ranges else (160, 192)
    cfg = complete(read(name), size, batch, dynamic)
    path = tmp_path / 'deploy.py'
    path.write_text(cfg.pretty_text)
    path = str(path)
    read_again = Config.fromfile(path)
    # MMDeploy's order is width, height
    assert utils.get_input_shape(path) == (None if ranges else (192, 160))
    assert utils.config_utils.is_dynamic_batch(path) is dynamic
    assert utils.is_dynamic_shape(path) is dynamic
    axes = utils.get_dynamic_axes(path)
    if dynamic:
        assert axes['input'] == {0: 'batch', 2: 'height', 3: 'width'}
        for output in cfg.onnx_config.output_names:
            assert axes[output] == (
                {0: 'batch'} if output == 'output' else
                {0: 'batch', 1: 'num_dets'})
    else:
        assert axes is None
    if tensorrt:
        assert shapes(read_again) == (
            [[1, 3, 160, 192], [batch, 3, 224, 224], [batch, 3, 320, 256]]
            if dynamic else [[batch, 3, 160, 192]] * 3)
        assert utils.get_model_inputs(read_again)
    cut = utils.get_partition_config(read_again)
    assert (cut is not None) is ('before-nms' in name)
    if cut:
        part, = cut['partition_cfg']
        assert part['dynamic_axes'] == (
            {'input': axes['input']} if dynamic else {})
    assert read_again.onnx_config.batch_size == batch
    # complete is complete
    assert complete(read_again).to_dict() == read_again.to_dict()


def test_nothing_is_written_on_the_config():
    before, cfg = read('detection_tensorrt'), read('detection_tensorrt')
    complete(cfg, (64, 64), 2, True, model_cfg(), 'int8')
    assert cfg.to_dict() == before.to_dict()


def test_tensorrt_with_one_size_opens_the_batch_alone():
    cfg = complete(read('classification_tensorrt'), (224, 224), 64, True)
    assert cfg.onnx_config.input_shape == (224, 224)
    assert cfg.onnx_config.dynamic_axes == {
        'input': {0: 'batch'}, 'output': {0: 'batch'}}
    assert shapes(cfg) == [[1, 3, 224, 224], [64, 3, 224, 224],
                           [64, 3, 224, 224]]


# What the 48 configs said that these six replace, by name; their sizes are
# height x width
OLD = [
    ('classification_tensorrt', (32, 32), 'fp32'),
    ('classification_tensorrt', (224, 224), 'fp16'),
    ('detection_tensorrt', (800, 1344), 'int8'),
    ('detection-before-nms_tensorrt', (300, 300), 'fp16'),
]


@pytest.mark.parametrize('name, size, precision', OLD)
def test_static_ones_of_tensorrt_say_what_they_said(name, size, precision):
    cfg = complete(read(name), size, precision=precision)
    shape = [1, 3, *size]
    common = dict(fp16_mode=precision != 'fp32', max_workspace_size=1 << 30)
    assert cfg.backend_config == dict(
        type='tensorrt',
        common_config=dict(common, int8_mode=precision == 'int8'),
        model_inputs=[
            dict(
                input_shapes=dict(
                    input=dict(
                        min_shape=shape, opt_shape=shape, max_shape=shape)))
        ])
    assert cfg.onnx_config.input_shape == size[::-1]
    assert cfg.get('calib_config') == (
        dict(create_calib=True, calib_file='calib_data.h5')
        if precision == 'int8' else None)


def test_dynamic_ones_say_what_they_said():
    axes = {0: 'batch', 2: 'height', 3: 'width'}
    boxes = {0: 'batch', 1: 'num_dets'}
    sizes = [(320, 320), (800, 1344), (1344, 1344)]
    cfg = complete(read('detection_tensorrt'), sizes, dynamic=True)
    assert shapes(cfg) == [[1, 3, *size] for size in sizes]
    other = complete(read('detection_onnxruntime'), dynamic=True)
    for onnx_config in (cfg.onnx_config, other.onnx_config):
        assert onnx_config.input_shape is None
        assert onnx_config.dynamic_axes == dict(
            input=axes, dets=boxes, labels=boxes)
    cfg = complete(read('classification_onnxruntime'), dynamic=True)
    assert cfg.onnx_config.dynamic_axes == dict(
        input=axes, output={0: 'batch'})


def test_precision_is_left_as_it_is_said():
    cfg = read('classification_tensorrt')
    assert complete(cfg, (32, 32)).backend_config.common_config == (
        cfg.backend_config.common_config)
    lowered = complete(cfg, (32, 32), precision='int8')
    # also of a complete one, which keeps its shapes
    assert 'calib_config' not in complete(lowered, precision='fp32')
    assert shapes(complete(lowered, precision='fp16')) == shapes(lowered)
    # ONNX Runtime takes its precision from the file
    cfg = read('classification_onnxruntime')
    assert 'common_config' not in complete(
        cfg, precision='int8').backend_config


# ----------------------------------------------------------------- two stages
def test_two_stage_detectors_are_two_graphs():
    name = 'detection-before-nms_tensorrt'
    cfg = complete(read(name), (800, 1344), model_cfg=model_cfg())
    assert cfg.codebase_config.model_type == 'two_stage'
    cut = cfg.partition_config
    assert cut.type == 'two_stage' and cut.apply_marks
    assert [x['save_file'] for x in cut.partition_cfg] == [
        'partition0.onnx', 'partition1.onnx']
    assert cut.partition_cfg[0]['dynamic_axes'] == {}
    assert len(cfg.backend_config.model_inputs) == 2
    assert shapes(cfg, 0, 'img') == [[1, 3, 800, 1344]] * 3
    assert shapes(cfg, 1, 'bbox_feats') == [
        [1, 256, 7, 7], [500, 256, 7, 7], [1000, 256, 7, 7]]


def test_regions_follow_model_and_batch():
    head = dict(type='Head', in_channels=64, roi_feat_size=(5, 6))
    model = model_cfg(
        roi_head=dict(type='StandardRoIHead', bbox_head=head),
        test_cfg=dict(rpn=dict(max_per_img=300)))
    cfg = complete(
        read('detection-before-nms_tensorrt'),
        [(64, 64), (96, 96), (128, 160)], 4, True, model)
    assert shapes(cfg, 1, 'bbox_feats')[2] == [1200, 64, 5, 6]
    first, second = cfg.partition_config.partition_cfg
    # as MMDeploy names it
    assert first['dynamic_axes'] == {
        'img': {0: 'batch', 2: 'height', 3: 'width'}}
    assert second['dynamic_axes']['bbox_feats'] == {0: 'regions'}


def test_whole_two_stage_detectors_are_one_graph():
    cfg = complete(read('detection_tensorrt'), (64, 64), model_cfg=model_cfg())
    assert len(cfg.backend_config.model_inputs) == 1
    assert 'partition_config' not in cfg


def test_wrappers_are_seen_through():
    wrapped = Config(
        dict(model=dict(type='mmbasis.BasisModel', architecture=FASTER)))
    cfg = complete(
        read('detection-before-nms_onnxruntime'), (64, 64), model_cfg=wrapped)
    assert cfg.partition_config.type == 'two_stage'


# -------------------------------------------------------------------- sizes
def test_sizes():
    assert parse_size('800x1344') == (800, 1344)
    for text in ('800', '800x', '0x8', '8x-8', '1x3x8x8', '8X8', 'image.jpg'):
        with pytest.raises(ValueError, match='is no size: give height x wid'):
            parse_size(text)


@pytest.mark.parametrize('name, dynamic, needs', [
    ('classification_onnxruntime', False, True),
    ('classification_onnxruntime', True, False),
    ('classification_tensorrt', False, True),
    ('classification_tensorrt', True, True),
])
def test_who_needs_a_size(name, dynamic, needs):
    cfg = read(name)
    assert needs_size(cfg, dynamic) is needs
    cfg.onnx_config.input_shape = (32, 64)
    assert not needs_size(cfg, dynamic)
    if name.endswith('tensorrt'):
        assert shapes(complete(cfg))[0] == [1, 3, 64, 32]


def test_sizes_of_images_are_checked():
    cfg = complete(read('detection_onnxruntime'), (64, 96))
    check_size(cfg, (64, 96))
    with pytest.raises(ValueError, match='makes images of 96x64.*for 64x96'):
        check_size(cfg, (96, 64))
    cfg = complete(
        read('detection_tensorrt'), [(64, 96), (64, 96), (96, 128)], None,
        True)
    check_size(cfg, (64, 128))
    with pytest.raises(ValueError, match='128x64, outside.*64x96 to 96x128'):
        check_size(cfg, (128, 64))


# ---------------------------------------------------------------- bad input
TRT, ORT = 'detection_tensorrt', 'detection_onnxruntime'


@pytest.mark.parametrize('name, kwargs, text', [
    (TRT, {}, 'detection_tensorrt.py is for TensorRT.*give input_shape'),
    (TRT, dict(input_shape=(64, 80)), '64x80 is not divisible by 32.*'
     'pad_size_divisor.*64x64 or 96x96'),
    (TRT, dict(input_shape=(64, 64), batch=0), 'batch is 0: at least 1'),
    (TRT, dict(input_shape=[(64, 64)] * 2), '2 sizes: give one, or'),
    (TRT, dict(input_shape=[(64, 64)] * 3), 'range, which needs --dynamic'),
    (TRT, dict(input_shape=[(64, 64), (96, 96), (96, 64)], dynamic=True),
     '64x64 96x96 96x64 must grow'),
    (TRT, dict(input_shape=(64, 64), dynamic=True), 'leaves nothing open'),
    (TRT, dict(input_shape=(64, 64), precision='int4'), "'int4': fp32, fp16"),
    (ORT, dict(input_shape=[(64, 64)] * 3, dynamic=True),
     'onnxruntime takes any size'),
])
def test_what_does_not_fit_is_said(name, kwargs, text):
    with pytest.raises(ValueError, match=text):
        complete(read(name), model_cfg=model_cfg(), **kwargs)


def test_cascades_are_not_cut():
    model = model_cfg(
        roi_head=dict(type='CascadeRoIHead', bbox_head=[dict(), dict()]))
    with pytest.raises(ValueError, match=r'one bbox_head.*Cascade.* has 2'):
        complete(
            read('detection-before-nms_onnxruntime'), (64, 64),
            model_cfg=model)


def test_complete_ones_keep_their_shapes():
    cfg = complete(read(TRT), (64, 64))
    for wanted in (dict(input_shape=(96, 96)), dict(batch=2),
                   dict(dynamic=True)):
        with pytest.raises(ValueError, match='states dynamic_axes or model_i'):
            complete(cfg, **wanted)


# ----------------------------------------------------------------- real ones
@pytest.fixture
def deploy(repo_root, monkeypatch, tmp_path):
    """Function that runs tools/deploy.py; its report, with ``inputs``: sizes
    of the graphs' inputs by file and name."""

    def run(name, model, images, *args):
        monkeypatch.syspath_prepend(str(repo_root / 'tools'))
        import deploy as tool
        monkeypatch.setattr(
            sys, 'argv', ['deploy.py', str(FOLDER / f'{name}.py'),
                          model.config, model.checkpoint, *images,
                          '--work-dir', str(tmp_path), *map(str, args)])
        status = tool.main()
        report = json.loads((tmp_path / 'report.json').read_text())
        assert status == 0, report['comparison']
        report['inputs'] = {
            os.path.basename(path): {
                x.name: [d.dim_param or d.dim_value
                         for d in x.type.tensor_type.shape.dim]
                for x in onnx.load(path).graph.input
            }
            for path in report['files']
        }
        return report

    return run


def test_classifier_in_batches(deploy, classifier, image_paths, tmp_path):
    report = deploy('classification_onnxruntime', classifier, image_paths[:2],
                    '--batch', 2)
    # nobody had to say a size
    assert report['inputs'] == {'end2end.onnx': {'input': [2, 3, 32, 32]}}
    # once more, by the config that was written
    again = Deployment(
        str(tmp_path / 'deploy.py'), classifier.config, classifier.checkpoint)
    path, = again.export(image_paths[0], str(tmp_path / 'again'))
    x = np.random.rand(2, 3, 32, 32).astype('f')
    ours, = open_onnx(path).run(None, {'input': x})
    theirs, = open_onnx(str(tmp_path / 'end2end.onnx')).run(None, {'input': x})
    assert ours.shape == (2, 2) and np.array_equal(ours, theirs)


def test_classifier_of_open_shapes(deploy, classifier, image_paths, tmp_path):
    report = deploy('classification_onnxruntime', classifier, image_paths[:1],
                    '--batch', 2, '--dynamic', '--evaluate')
    assert report['inputs'] == {
        'end2end.onnx': {'input': ['batch', 3, 'height', 'width']}}
    assert 'accuracy/top1' in report['metrics']
    session = open_onnx(str(tmp_path / 'end2end.onnx'))
    x = np.random.rand(3, 3, 40, 48).astype('f')
    assert session.run(None, {'input': x})[0].shape == (3, 2)


def test_mmdeploys_api_takes_what_was_written(deploy, classifier, image_paths,
                                              tmp_path):
    from mmdeploy.apis import torch2onnx

    from mmbasis.utils import load_config
    report = deploy('classification_onnxruntime', classifier, image_paths[:1],
                    '--dynamic')
    cfg = load_config(classifier.config)
    torch2onnx(image_paths[0], str(tmp_path / 'theirs'), 'end2end.onnx',
               str(tmp_path / 'deploy.py'), cfg, classifier.checkpoint, 'cpu')
    size = report['files'][str(tmp_path / 'end2end.onnx')]
    theirs = (tmp_path / 'theirs' / 'end2end.onnx').stat().st_size
    assert theirs == pytest.approx(size, rel=.02)


def test_what_the_pipeline_cannot_make(deploy, classifier, image_paths,
                                       tmp_path, capsys):
    for args, text in (
        (('--input-shape', '64x64'), 'makes images of 32x32.*for 64x64'),
        (('--input-shape', 'small'), "'small' is no size"),
    ):
        with pytest.raises(SystemExit, match=f'^error: .*{text}'):
            deploy('classification_onnxruntime', classifier, image_paths[:1],
                   *args)
    with pytest.raises(SystemExit, match='--evaluate and int8 take images'):
        deploy('classification_onnxruntime', classifier, image_paths[:1],
               '--batch', 2, '--evaluate')
    with pytest.raises(SystemExit):
        deploy('classification_onnxruntime', classifier, image_paths[:1],
               '--batch', 0)
    assert 'argument --batch: must be a positive' in capsys.readouterr().err
    # nothing half-written
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def retinanet(make_detector):
    return make_detector('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 96,
                         **{'model.bbox_head.num_classes': 3})


@pytest.mark.parametrize('args, shape', [
    (('--batch', 2), [2, 3, 96, 96]),
    (('--batch', 2, '--dynamic'), ['batch', 3, 'height', 'width']),
])
def test_one_stage_detector(deploy, retinanet, detector_images, args, shape):
    report = deploy('detection_onnxruntime', retinanet, detector_images[:1],
                    '--input-shape', '96x96', *args)
    assert report['inputs'] == {'end2end.onnx': {'input': shape}}


def test_range_of_sizes_for_tensorrt(deploy, retinanet, detector_images):
    args = ('detection-before-nms_tensorrt', retinanet, detector_images[:1],
            '--cfg-options', 'test_pipeline.1.scale=(96,96)', '--dynamic',
            '--batch', 2, '--input-shape')
    report = deploy(*args, '64x64', '96x96', '128x160')
    assert report['inputs'] == {
        'partition0.onnx': {'input': ['batch', 3, 'height', 'width']}}
    assert report['trtexec'][0]['10'].endswith(
        '--minShapes=input:1x3x64x64 --optShapes=input:2x3x96x96 '
        '--maxShapes=input:2x3x128x160')
    with pytest.raises(SystemExit, match='96x96, outside of the range 64x64'):
        deploy(*args, '64x64', '64x64', '64x64')


@pytest.fixture(scope='module')
def faster_rcnn(make_detector):
    """As small as it gets."""
    return make_detector(
        'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', 96, **{
            'model.backbone.depth': 18,
            'model.backbone.init_cfg': None,
            'model.neck.in_channels': [64, 128, 256, 512],
            'model.roi_head.bbox_head.num_classes': 3,
            'model.roi_head.bbox_head.fc_out_channels': 64,
            'model.test_cfg.rpn.max_per_img': 100
        })


@pytest.mark.slow
def test_two_graphs(deploy, faster_rcnn, detector_images):
    report = deploy('detection-before-nms_tensorrt', faster_rcnn,
                    detector_images[:1], '--input-shape', '96x96')
    assert report['inputs'] == {
        'partition0.onnx': {'img': [1, 3, 96, 96]},
        'partition1.onnx': {'bbox_feats': ['regions', 256, 7, 7]}
    }
    first, second = report['trtexec']
    assert 'Shapes' not in first['10']
    assert '--maxShapes=bbox_feats:100x256x7x7' in second['10']


@pytest.mark.slow
def test_calibration_of_two_graphs(faster_rcnn, tmp_path):
    h5py = pytest.importorskip('h5py')
    cfg = complete(
        read('detection-before-nms_tensorrt'), (96, 96),
        model_cfg=Config.fromfile(faster_rcnn.config), precision='int8')
    deployment = Deployment(cfg, faster_rcnn.config, faster_rcnn.checkpoint)
    path = str(tmp_path / 'calib_data.h5')
    images = list(np.random.randn(2, 1, 3, 96, 96).astype('f'))
    write_calibration(path, deployment, images)
    with h5py.File(path) as file:
        assert set(file['calib_data']) == {'partition0', 'partition1'}
        assert np.array_equal(
            file['calib_data/partition0/img/1'][...], images[1])
        features = [x[...] for x in
                    file['calib_data/partition1/bbox_feats'].values()]
    assert len(features) == 2
    for x in features:
        assert x.shape[1:] == (256, 7, 7) and 1 < len(x) <= 64
    assert not np.array_equal(*(x[:2] for x in features))
