# Copyright (c) mmbasis authors. All rights reserved.
import pytest

from mmbasis.utils import init_cpu_dist, load_config


@pytest.fixture
def write(tmp_path):

    def write(text):
        path = tmp_path / 'config.py'
        path.write_text(text)
        return str(path)

    return write


def test_copies_the_preprocessor(write):
    cfg = load_config(
        write('model = dict(type="A")\n'
              'data_preprocessor = dict(mean=[1, 2, 3])'))
    assert cfg.model.data_preprocessor.mean == [1, 2, 3]
    cfg = load_config(
        write('model = dict(type="A", data_preprocessor=dict(mean=[0]))\n'
              'data_preprocessor = dict(mean=[1, 2, 3])'))
    assert cfg.model.data_preprocessor.mean == [0]


def test_stacks_samples_for_mmpretrain_only(write):
    text = 'model = dict(type="A")\ntrain_dataloader = dict(batch_size=2)\n'
    cfg = load_config(write(text))
    assert 'collate_fn' not in cfg.train_dataloader
    cfg = load_config(write(text + 'default_scope = "mmpretrain"'))
    assert cfg.train_dataloader.collate_fn.type == 'default_collate'


def test_work_dir_and_options(write):
    path = write('model = dict(type="A")\nwork_dir = "mine"')
    assert load_config(path).work_dir == 'mine'
    assert load_config(path, work_dir='other').work_dir == 'other'
    path = write('model = dict(type="A")')
    assert load_config(path).work_dir == 'work_dirs/config'
    assert load_config(path, {'model.depth': 3}).model.depth == 3


def test_installed_configs():
    pytest.importorskip('mmpretrain')
    cfg = load_config('mmpretrain::resnet/resnet18_8xb16_cifar10.py')
    assert cfg.model.backbone.type == 'ResNet_CIFAR'
    assert cfg.model.data_preprocessor.num_classes == 10


def test_clear_errors(write):
    with pytest.raises(FileNotFoundError, match='absent.py does not exist'):
        load_config('absent.py')
    with pytest.raises(KeyError, match="no 'model': found.*'answer'"):
        load_config(write('answer = 42'))


def test_cpu_dist_needs_torchrun(monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    init_cpu_dist('none')
    with pytest.raises(RuntimeError, match='torchrun'):
        init_cpu_dist('pytorch')
