# Copyright (c) mmbasis authors. All rights reserved.
"""The demo of timm's and torchvision's models, as a user runs it."""
import json
import sys

import pytest


@pytest.mark.parametrize('name', [
    'timm:resnet50', 'torchvision:resnet50', 'timm:vit_tiny_patch16_224'])
def test_compressed_fine_tuned_exported(demo, name, tmp_path, monkeypatch):
    pytest.importorskip('onnxruntime')
    pytest.importorskip(name.partition(':')[0])
    monkeypatch.setattr(sys, 'argv', [
        'torch_models.py', '--model', name, '--image-size', '32', '--batches',
        '3', '--epochs', '3', '--work-dir', str(tmp_path)])
    assert demo.main() == 0
    report = json.loads((tmp_path / 'report.json').read_text())
    macs, history = report['macs'], report['fine_tuning']
    assert .3 < macs['after'] / macs['before'] <= .5
    assert report['layers'] > 15
    # in evaluation, averages of so few batches say little
    assert history[-1] < history[0]
    assert report['difference'] < 1e-3


def test_other_libraries_are_named(demo):
    with pytest.raises(ValueError, match='timm:NAME.*not keras:resnet'):
        demo.build('keras:resnet', 10, 32)
