# Copyright (c) mmbasis authors. All rights reserved.
import cv2
import numpy as np
import pytest

from mmbasis.datasets import ImageFolder


@pytest.fixture
def root(tmp_path):
    """Two classes of 20 and 10 images, and files that are no images."""
    for name, count in (('dog', 20), ('cat', 10)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(count):
            image = np.full((4, 4, 3), i, dtype=np.uint8)
            cv2.imwrite(str(folder / f'{i:02d}.PNG'), image)
        (folder / 'notes.txt').write_text('no image')
    (tmp_path / 'readme.md').write_text('no class')
    return tmp_path


def names(dataset):
    return [sample['img_path'] for sample in dataset]


def test_reads_sorted_classes(root):
    dataset = ImageFolder(str(root))
    assert dataset.metainfo['classes'] == ('cat', 'dog')
    assert [sample['gt_label'] for sample in dataset] == [0] * 10 + [1] * 20
    assert names(dataset)[0] == str(root / 'cat' / '00.PNG')


def test_parts_are_disjoint_and_even(root):
    train = ImageFolder(str(root), part='train', holdout=0.2)
    held = ImageFolder(str(root), part='holdout', holdout=0.2)
    assert sorted(names(train) + names(held)) == sorted(
        names(ImageFolder(str(root))))
    assert [sample['gt_label'] for sample in held] == [0] * 2 + [1] * 4
    assert names(held) == names(
        ImageFolder(str(root), part='holdout', holdout=0.2))


@pytest.mark.parametrize('kwargs, message', [
    (dict(part='valid'), "'train' or 'holdout', but got 'valid'"),
    (dict(holdout=0), 'between 0 and 1, but got 0'),
    (dict(holdout=1.), 'between 0 and 1, but got 1.0'),
    (dict(metainfo=dict(classes=('a', ))), 'names 1 classes.*cat, dog'),
])
def test_bad_arguments(root, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(root), **kwargs)


def test_missing_folder_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv('MMBASIS_DATA', raising=False)
    with pytest.raises(FileNotFoundError) as error:
        ImageFolder(str(tmp_path / 'absent'), hint='Run make data.')
    for part in (str(tmp_path / 'absent'), 'MMBASIS_DATA is not set',
                 'no such folder', 'Run make data.'):
        assert part in str(error.value)
    monkeypatch.setenv('MMBASIS_DATA', '/elsewhere')
    with pytest.raises(FileNotFoundError, match='it holds no images.*'):
        ImageFolder(str(tmp_path))


def test_same_as_mmpretrain(root):
    datasets = pytest.importorskip('mmpretrain.datasets')
    ours = ImageFolder(str(root))
    theirs = datasets.CustomDataset(data_root=str(root))
    assert ours.metainfo['classes'] == theirs.metainfo['classes']
    assert [(s['img_path'], s['gt_label'])
            for s in ours] == [(s['img_path'], s['gt_label']) for s in theirs]
