# Copyright (c) mmbasis authors. All rights reserved.
import pytest
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, TRANSFORMS

from mmbasis.utils.runner import check_evaluation, example_batch


@DATASETS.register_module(force=True)
class Numbers(BaseDataset):

    def load_data_list(self):
        return [dict(number=i) for i in range(4)]


@TRANSFORMS.register_module(force=True)
class PackNumber(BaseTransform):

    def __init__(self, add=0):
        self.add = add

    def transform(self, results):
        number = results['number'] + self.add
        return dict(inputs=number, data_samples=str(number))


def loader(*pipeline):
    return dict(
        batch_size=3,
        num_workers=0,
        dataset=dict(type='Numbers', pipeline=list(pipeline)),
        sampler=dict(type='DefaultSampler', shuffle=False))


def test_example_of_the_first_split_there_is():
    cfg = Config(
        dict(
            test_dataloader=None,
            val_dataloader=loader(dict(type='PackNumber', add=10)),
            train_dataloader=loader(dict(type='PackNumber', add=20))))
    found = [
        example_batch(cfg, *splits)['inputs']
        for splits in (('test', 'val', 'train'), ('train', 'val'))
    ]
    assert found == [[10], [20]]
    with pytest.raises(KeyError, match='test_dataloader'):
        example_batch(cfg, 'test')


def test_example_of_an_augmented_image_is_its_first():
    steps = [[dict(type='PackNumber', add=x) for x in (5, 6)]]
    cfg = Config(
        dict(
            test_dataloader=loader(
                dict(type='TestTimeAug', transforms=steps))))
    assert example_batch(cfg, 'test') == dict(inputs=[5], data_samples=['5'])


@pytest.mark.parametrize('missing', ['test_dataloader', 'test_evaluator'])
def test_evaluation_needs_a_loader_and_an_evaluator(missing):
    cfg = Config(dict(test_dataloader={'a': 1}, test_evaluator={'a': 1}))
    check_evaluation(cfg, 'test')
    cfg[missing] = None
    with pytest.raises(KeyError, match=missing):
        check_evaluation(cfg, 'test')
