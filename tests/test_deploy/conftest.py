# Copyright (c) mmbasis authors. All rights reserved.
"""Small compressed models, as tools/compress.py writes them."""
import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmbasis.compat import repair_static_methods

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('mmdeploy')

# some tests call MMDeploy's own API, which would leave it broken for others
repair_static_methods()


class Compressed:
    """Config and checkpoint of a compressed model, and the dense model."""

    def __init__(self, folder, cfg, batch, norm=False, **planner):
        from mmbasis.compression import compress, save_checkpoint
        from mmbasis.models import build_dense, standalone_config
        self.folder, self.dense_cfg = folder, cfg
        init_default_scope(cfg.default_scope)
        torch.manual_seed(0)
        self.model = build_dense(cfg)
        self.model.init_weights()
        for name, module in self.model.named_modules():
            _spread(module)
            weight = getattr(module, 'weight', None)
            if ('head' in name and weight is not None and weight.dim() > 1
                    and weight.std() < .02):
                # heads start with weights that tell nothing apart
                torch.nn.init.normal_(weight, std=.03)
        self.model.eval()
        self.dense_checkpoint = str(folder / 'dense.pth')
        torch.save(
            dict(state_dict=self.model.state_dict(), meta={}),
            self.dense_checkpoint)
        planner = planner or dict(
            type='BudgetPlanner',
            macs=.6,
            forms=['output', 'input', 'both', 'spatial'],
            data_aware=False)
        self.plan = compress(self.model, planner, [batch], norm=norm)
        for module in self.model.modules():
            _spread(module)
        self.checkpoint = str(folder / 'compressed.pth')
        save_checkpoint(self.model, self.plan, self.checkpoint, {})
        self.cfg = standalone_config(cfg, self.plan, self.checkpoint)
        self.config = str(folder / 'compressed.py')
        self.cfg.dump(self.config)


def _spread(module):
    """Statistics and predictions as after training, not as at its start."""
    if isinstance(module, torch.nn.BatchNorm2d):
        torch.nn.init.uniform_(module.running_var, .8, 1.2)
        torch.nn.init.normal_(module.running_mean, std=.1)
        # zero at the start of a residual branch, which then computes nothing
        torch.nn.init.uniform_(module.weight, .8, 1.2)


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    """Smooth colour images in two folders, so that two classes exist."""
    root = tmp_path_factory.mktemp('images')
    random = np.random.RandomState(0)
    for index in range(12):
        folder = root / 'ab'[index % 2]
        folder.mkdir(exist_ok=True)
        small = random.randint(0, 256, (5, 5, 3), dtype=np.uint8)
        image = cv2.resize(small, (32, 32), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(folder / f'{index}.png'), image)
    return root


@pytest.fixture(scope='session')
def image_paths(images):
    return sorted(str(path) for path in images.glob('*/*.png'))


def classifier_cfg(repo_root, images, depth=14):
    """A small ResNet for 32x32 images of the folder ``images``."""
    from mmbasis.utils import load_config
    cfg = load_config(
        str(repo_root / 'configs/mmpretrain/resnet56_cifar10.py'), {
            'model.backbone.depth': depth,
            'model.head.num_classes': 2
        }, str(images / 'work'))
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.data_root = str(images)
        loader.update(batch_size=4, num_workers=0)
        loader.pop('persistent_workers', None)
    return cfg


@pytest.fixture(scope='session')
def make_classifier(repo_root, images, tmp_path_factory):
    """Function that compresses a classifier of images of a size, whose config
    it may change; one is ``image``."""
    from mmpretrain.structures import DataSample

    def make(change=None, side=32, norm=False, **planner):
        root = tmp_path_factory.mktemp('classifier')
        data = tmp_path_factory.mktemp('data')
        for name in 'ab':
            (data / name).symlink_to(images / name)
        cfg = classifier_cfg(repo_root, data)
        if change is not None:
            change(cfg.model)
        batch = dict(
            inputs=torch.randint(0, 256, (1, 3, side, side)).byte(),
            data_samples=[DataSample()])
        found = Compressed(root, cfg, batch, norm=norm, **planner)
        found.image = str(root / 'image.png')
        small = np.random.RandomState(0).randint(0, 256, (5, 5, 3), np.uint8)
        cv2.imwrite(found.image, cv2.resize(small, (side, side)))
        return found

    return make


@pytest.fixture(scope='session')
def classifier(make_classifier):
    """A compressed classifier with normalisations in the middle."""
    return make_classifier(norm=True)


@pytest.fixture(scope='session')
def detector_images(tmp_path_factory):
    """Scenes of bright discs, 160x160."""
    root = tmp_path_factory.mktemp('scenes')
    random = np.random.RandomState(1)
    paths = []
    for index in range(2):
        scene = np.full((160, 160, 3), 30 + 60 * index, np.uint8)
        for _ in range(12):
            centre = tuple(random.randint(10, 150, 2).tolist())
            colour = random.randint(60, 256, 3).tolist()
            cv2.circle(scene, centre, int(random.randint(5, 25)), colour, -1)
        paths.append(str(root / f'{index}.png'))
        cv2.imwrite(paths[-1], scene)
    return paths


@pytest.fixture(scope='session')
def make_detector(tmp_path_factory, detector_images):
    """Function that compresses a detector of MMDetection with random weights.

    Its score threshold is put where some dozens of boxes pass, as with trained
    weights.
    """

    def make(config, size, **options):
        from mmdet.structures import DetDataSample

        from mmbasis.utils import load_config
        root = tmp_path_factory.mktemp('detector')
        cfg = load_config(config, options, str(root))
        for part in (cfg.model, *cfg.model.values()):
            if isinstance(part, dict):
                part.pop('init_cfg', None)
        meta = dict(
            img_shape=(size, size),
            ori_shape=(size, size),
            pad_shape=(size, size),
            scale_factor=(1, 1))
        image = cv2.resize(cv2.imread(detector_images[0]), (size, size))
        batch = dict(
            inputs=[torch.from_numpy(image).permute(2, 0, 1)],
            data_samples=[DetDataSample(metainfo=meta)])
        found = Compressed(root, cfg, batch)
        found.threshold = _set_threshold(found, batch)
        return found

    return make


def _set_threshold(found, batch):
    """Write a threshold into the config that some dozens of boxes pass."""
    model = found.model
    head = getattr(model, 'roi_head', None) or model.bbox_head
    kept = dict(head.test_cfg)
    head.test_cfg.update(score_thr=0., max_per_img=100)
    with torch.no_grad():
        scores = model.test_step(batch)[0].pred_instances.scores
    head.test_cfg.update(kept)
    threshold = float(scores.sort(descending=True)[0][:30][-1])
    cfg = Config.fromfile(found.config)
    test_cfg = cfg.model.test_cfg
    test_cfg.get('rcnn', test_cfg).score_thr = threshold
    cfg.dump(found.config)
    return threshold


@pytest.fixture(scope='session')
def deploy_cfg(repo_root):
    """Function that reads a deploy config and completes it, for square
    images."""

    def read(name, size=None, **wanted):
        from mmbasis.deploy import complete
        cfg = Config.fromfile(str(repo_root / 'configs/deploy' / f'{name}.py'))
        return complete(cfg, size and (size, size), **wanted)

    return read


@pytest.fixture(scope='session')
def assert_builds():
    """Function that has NVIDIA's builder build an exported file, where the
    extra trt-check is installed; only limits of its own are let through."""
    from mmbasis.deploy import build_engine, builder_at_hand

    def check(path, shapes=None):
        if builder_at_hand():
            engine = build_engine(path, shapes=shapes)
            assert not engine.refused, [str(x) for x in engine.refusals]

    return check
