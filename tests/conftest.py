# Copyright (c) mmbasis authors. All rights reserved.
import os
import re
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption(
        '--device',
        choices=['cpu', 'cuda'],
        help='where runners train and test; by default cuda with -m gpu, '
        'else cpu')


def pytest_configure(config):
    """Choose the device before MMEngine asks for one, which it does once."""
    wanted = config.getoption('--device')
    asked = re.search(r'(?<!not )\bgpu\b', config.option.markexpr or '')
    config.why_no_gpu = None
    if wanted == 'cuda' or asked and wanted is None:
        # unlike CUDA's own, this count can be followed by a fork
        os.environ['PYTORCH_NVML_BASED_CUDA_CHECK'] = '1'
        import torch
        if torch.cuda.is_available():
            return
        config.why_no_gpu = (
            f'torch {torch.__version__} sees no GPU; --device cpu runs these '
            'tests on the CPU')
        if wanted == 'cuda':
            raise pytest.UsageError(f'--device cuda: {config.why_no_gpu}')
    os.environ['CUDA_VISIBLE_DEVICES'] = ''


def pytest_collection_modifyitems(config, items):
    """Tests that were asked for as those of a GPU do not pass without one."""
    if config.why_no_gpu:
        for item in items:
            if item.get_closest_marker('gpu'):
                item.add_marker(pytest.mark.skip(reason=config.why_no_gpu))


@pytest.fixture(scope='session')
def device():
    """Where runners train and test."""
    import torch
    return torch.device('cuda', 0) if torch.cuda.is_available() else (
        torch.device('cpu'))


@pytest.fixture(scope='session')
def torchvision_ops():
    """torchvision with its compiled operators, which it lacks beside a torch
    that it was not built for."""
    torchvision = pytest.importorskip('torchvision')
    if not torchvision.extension._has_ops():
        pytest.skip('torchvision has no compiled operators here')
    return torchvision


@pytest.fixture(scope='session')
def repo_root():
    """Folder of the repository: configs and tools lie below it."""
    return ROOT


@pytest.fixture(scope='session')
def shared_data():
    """Folder of the files that are too large for the repository."""
    path = ROOT.parent / 'shared' / 'data'
    if not path.is_dir():
        pytest.skip(f'{path} is absent: weights and images cannot be had')
    return path


@pytest.fixture(scope='session')
def cifar10_root(shared_data, request):
    """Folder with ``train/<class>/*.jpg`` (50 000 images) and ``test`` (10
    000).

    It lies in pytest's cache, unpacked by whichever process comes first.
    """
    folder = Path(request.config.cache.mkdir('cifar10'))
    target = folder / 'images'
    with FileLock(folder / 'lock'):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as temporary:
                with tarfile.open(shared_data / 'cifar10_jpeg.tar.xz') as file:
                    file.extractall(temporary)
                # as a whole, so that an interruption leaves no half
                os.rename(temporary, target)
                os.mkdir(temporary)
    return target


@pytest.fixture
def cifar10_subset(cifar10_root, tmp_path):
    """Function that links some images of every class into a new folder.

    ``cifar10_subset(train=20, test=100)`` gives a folder for
    ``MMBASIS_DATA`` with 20 training and 100 test images of each class,
    evenly spaced over the sorted files.
    """

    def link(**per_class):
        for split, count in per_class.items():
            for folder in sorted((cifar10_root / split).iterdir()):
                files = sorted(folder.iterdir())
                target = tmp_path / 'data' / 'cifar10' / split / folder.name
                target.mkdir(parents=True)
                for i in range(count):
                    file = files[i * len(files) // count]
                    (target / file.name).symlink_to(file)
        return tmp_path / 'data'

    return link


@pytest.fixture(autouse=True)
def autocast_is_left():
    """What stays inside of autocast makes later steps compute with weights of
    earlier ones: its cache is cleared at the outermost end."""
    yield
    torch = sys.modules.get('torch')
    if torch is not None:
        torch.autocast_increment_nesting()
        assert torch.autocast_decrement_nesting() == 0


@pytest.fixture(scope='module')
def workplace(tmp_path_factory, repo_root):
    """A folder in which tools run as users call them."""
    from tests.test_tools.workplace import Forks, Workplace
    workplace = Workplace(tmp_path_factory.mktemp('workplace'), repo_root)
    workplace.forks = Forks()
    yield workplace
    workplace.forks.close()
