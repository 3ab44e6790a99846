# Copyright (c) mmbasis authors. All rights reserved.
"""What int8 is calibrated on, and MMDeploy's file of it."""
import numpy as np
import pytest

from mmbasis.deploy import Deployment, calibration_images, write_calibration

CLS = 'classification_onnxruntime'


def test_calibration_images_are_what_the_network_sees(classifier, deploy_cfg,
                                                      image_paths):
    deployment = Deployment(
        deploy_cfg(CLS), classifier.config, classifier.checkpoint)
    images = calibration_images(deployment, 3)
    expected = deployment.create_input(image_paths[0])[1].numpy()
    assert all(x.shape == (1, 3, 32, 32) for x in images)
    assert any(np.allclose(x, expected) for x in images)
    with pytest.raises(ValueError, match='1000 images.*holds 12'):
        calibration_images(deployment, 1000)


def test_calibration_file_is_that_of_mmdeploy(classifier, deploy_cfg,
                                              tmp_path):
    deployment = Deployment(
        deploy_cfg(CLS), classifier.config, classifier.checkpoint)
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
