# Copyright (c) mmbasis authors. All rights reserved.
"""Differences between versions."""
import inspect
import io

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from mmbasis import compat


def test_checkpoints_of_mmengine_load_safely():
    if not hasattr(torch.serialization, 'add_safe_globals'):
        pytest.skip('this torch loads them without a list of safe classes')
    # the forks' MMEngine takes them from the list behind each of its loads,
    # which have a list of their own
    compat.allow_mmengine_checkpoints()
    hub = MessageHub.get_instance('test_compat')
    hub.update_scalar('train/loss', torch.tensor(1.5))
    hub.update_info('best', np.float64(3))
    file = io.BytesIO()
    torch.save(dict(hub=hub.state_dict(), a=np.arange(3)), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    history = loaded['hub']['log_scalars']['train/loss']
    assert history.current() == 1.5 and history.mean(1) == 1.5
    assert loaded['a'].tolist() == [0, 1, 2]


class Evil:

    def __reduce__(self):
        return getattr, (dict, 'fromkeys')


def test_nothing_else_is_let_in():
    file = io.BytesIO()
    torch.save(dict(a=Evil()), file)
    file.seek(0)
    with pytest.raises(Exception, match='(?i)weights.only|Unsupported'):
        torch.load(file, weights_only=True)


def test_tracing_exporter_is_the_default(tmp_path):
    conv = torch.nn.Conv2d(3, 4, 1)
    path = str(tmp_path / 'conv.onnx')
    # as MMDeploy calls it: without dynamo=False
    torch.onnx.export(conv, (torch.rand(1, 3, 4, 4), ), path, opset_version=13)
    onnx = pytest.importorskip('onnx')
    assert onnx.load(path).opset_import[0].version == 13
    assert 'args' in inspect.signature(torch.onnx.export).parameters
    assert compat.max_onnx_opset() >= 17


def test_regions_are_cut_out_by_onnx(tmp_path):
    """MMDeploy's RoIAlign for ONNX Runtime, whatever torch has dropped."""
    onnx = pytest.importorskip('onnx')
    runtime = pytest.importorskip('onnxruntime')
    core = pytest.importorskip('mmdeploy.core')
    from mmcv.ops import RoIAlign
    from mmengine.config import Config
    compat.repair_roi_align()
    layer = RoIAlign(4, spatial_scale=.5, sampling_ratio=2)
    x, regions = torch.rand(1, 3, 16, 16), torch.tensor(
        [[0, 2., 3, 20, 22], [0, 5, 1, 30, 9]])
    path = str(tmp_path / 'roi.onnx')
    config = Config(dict(
        backend_config=dict(type='onnxruntime'),
        onnx_config=dict(type='onnx', opset_version=13),
        codebase_config=dict(type='mmdet', task='ObjectDetection')))
    with core.RewriterContext(config, backend='onnxruntime', opset=13):
        torch.onnx.export(
            layer, (x, regions), path, input_names=['x', 'regions'],
            opset_version=13)
    kinds = [x.op_type for x in onnx.load(path).graph.node]
    assert 'Cast' in kinds and 'RoiAlign' in kinds
    found, = runtime.InferenceSession(path).run(
        None, dict(x=x.numpy(), regions=regions.numpy()))
    torch.testing.assert_close(torch.from_numpy(found), layer(x, regions))
