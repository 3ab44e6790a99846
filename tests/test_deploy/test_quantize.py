# Copyright (c) mmbasis authors. All rights reserved.
"""Int8 of ONNX Runtime, calibration data of MMDeploy."""
import os

import numpy as np
import pytest

from mmbasis.deploy import (
    Deployment,
    calibration_images,
    evaluate_onnx,
    open_onnx,
    quantize_onnx,
    write_calibration,
)

CLS = 'classification_onnxruntime'


@pytest.fixture
def deployment(classifier, deploy_cfg):
    return Deployment(
        deploy_cfg(CLS), classifier.config, classifier.checkpoint)


def test_int8_of_onnxruntime(deployment, image_paths, tmp_path):
    path, = deployment.export(image_paths[0], str(tmp_path))
    images = calibration_images(deployment, 12)
    small = str(tmp_path / 'int8.onnx')
    quantize_onnx(path, small, images)
    outputs = [[open_onnx(p).run(None, {'input': x})[0] for x in images[:6]]
               for p in (path, small)]
    # close, and not the same
    error = np.abs(np.array(outputs[0]) - np.array(outputs[1])).max()
    assert 0 < error < .1
    assert os.path.getsize(small) < .6 * os.path.getsize(path)
    assert not [x for x in os.listdir(tmp_path) if '.tmp' in x]
    assert 'accuracy/top1' in evaluate_onnx(deployment, [small], str(tmp_path))


def test_calibration_images_are_what_the_network_sees(deployment, image_paths):
    images = calibration_images(deployment, 3)
    expected = deployment.create_input(image_paths[0])[1].numpy()
    assert all(x.shape == (1, 3, 32, 32) for x in images)
    assert any(np.allclose(x, expected) for x in images)
    with pytest.raises(ValueError, match='1000 images.*holds 12'):
        calibration_images(deployment, 1000)


def test_calibration_file_is_that_of_mmdeploy(deployment, tmp_path):
    h5py = pytest.importorskip('h5py')
    images = [np.random.rand(1, 3, 4, 4).astype('f') for _ in range(3)]
    path = str(tmp_path / 'calib_data.h5')
    write_calibration(path, deployment, images)
    # the groups that mmdeploy's HDF5Calibrator asks for
    with h5py.File(path) as file:
        group = file['calib_data/end2end/input']
        assert len(group) == 3
        for index, image in enumerate(images):
            assert np.array_equal(group[str(index)][...], image)
