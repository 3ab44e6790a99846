# Copyright (c) mmbasis authors. All rights reserved.
"""What mmbasis says of the libraries around it."""
import sys

import pytest
import torch

from mmbasis import stack
from tests.toy import run_beside

#: as the two families call their releases
OPENMMLAB = dict(mmengine='0.10.7', mmcv='2.1.0')
ONEDL = dict(mmengine='0.10.12', mmcv='2.3.6')


@pytest.fixture
def versions(monkeypatch):
    """Function that has libraries say other versions; an empty one stands for
    a library that is not there."""

    def change(**changed):
        ask = stack.version_of
        monkeypatch.setattr(
            stack, 'version_of',
            lambda name: changed[name] if name in changed else ask(name))

    return change


def test_this_stack_is_fine():
    assert stack.problems() == {}
    stack.check_stack()


def run_without(tmp_path, text, **modules):
    """Import mmbasis in a process of its own, with some modules replaced."""
    for name, source in modules.items():
        (tmp_path / f'{name}.py').write_text(source)
    return run_beside(tmp_path, text)


def test_names_what_is_missing_and_what_is_too_old(tmp_path):
    blocked = """
import sys
sys.modules['mmcv'] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda x, *a: None if x == 'mmcv' else find(x, *a)
del sys.modules['mmcv']
import mmbasis
"""
    result = run_without(
        tmp_path, blocked, mmengine='__version__ = "0.7.1"')
    assert result.returncode == 1
    message = result.stderr[result.stderr.index('ImportError: mmbasis'):]
    assert 'mmengine 0.7.1 is too old: it has no mmengine.' in message
    assert 'mmcv is missing' in message
    assert f'torch {torch.__version__}' in message
    assert 'pip install mmengine==0.10.7' in message
    assert 'mmcv==2.1.0' in message


def test_a_broken_library_is_not_called_missing(tmp_path):
    result = run_without(
        tmp_path, 'import mmbasis', mmcv='raise OSError("libc10.so: gone")')
    assert ('mmcv is installed but cannot be imported: OSError: libc10.so: '
            'gone') in result.stderr


def test_names_the_package_that_is_to_blame(tmp_path):
    result = run_without(
        tmp_path, 'import mmbasis', transformers='raise RuntimeError("nms")')
    assert 'mmengine is installed but cannot be imported: RuntimeError: nms' \
        in result.stderr
    assert f'({tmp_path / "transformers.py"}, line 1)' in result.stderr


def test_forks_ask_for_a_newer_torch(versions, monkeypatch):
    """onedl-mmengine imports ``torch.amp.GradScaler``, new in torch 2.3."""
    versions(**ONEDL)
    monkeypatch.delattr(torch.amp, 'GradScaler', raising=False)
    with pytest.raises(ImportError) as error:
        stack.check_stack()
    assert str(error.value).count('\n  - ') == 1
    assert f'torch {torch.__version__} is too old: it has no ' \
        'torch.amp.GradScaler; 2.4 does' in str(error.value)
    assert str(error.value).endswith(stack.COMMANDS['onedl']['torch'])


def test_arrays_that_torch_cannot_use(monkeypatch):
    def refuse(array):
        raise RuntimeError('Numpy is not available')

    monkeypatch.setattr(torch, 'from_numpy', refuse)
    with pytest.raises(ImportError) as error:
        stack.check_stack()
    assert 'too new for torch' in str(error.value)
    assert str(error.value).endswith('pip install "numpy<2"')


@pytest.mark.parametrize('found, python, name', [
    (OPENMMLAB, (3, 11), 'openmmlab'),
    (OPENMMLAB, (3, 12), 'openmmlab'),
    (ONEDL, (3, 11), 'onedl'),
    (dict(mmengine='', mmcv='2.3.6'), (3, 11), 'onedl'),
    (dict(mmengine='', mmcv=''), (3, 8), 'openmmlab'),
    (dict(mmengine='', mmcv=''), (3, 12), 'onedl'),
])
def test_names_the_stack(versions, monkeypatch, found, python, name):
    versions(**found)
    monkeypatch.setattr(sys, 'version_info', python)
    assert stack.name_stack() == name


def test_commands_are_of_the_stack(versions):
    versions(**ONEDL)
    assert stack.install_command('mmseg').startswith(
        'pip install onedl-mmsegmentation')
    assert stack.install_command('mmcv').endswith('onedl-mmcv==2.3.6')
    # it demands mmengine, which pip would install over the fork
    assert '--no-deps mmdeploy' in stack.install_command('mmdeploy')
    versions(torch='2.1.2+cu121', **OPENMMLAB)
    assert stack.install_command('mmcv').endswith(
        'mmcv/dist/cu121/torch2.1.0/index.html')
    versions(torch='2.13.0+cpu', **OPENMMLAB)
    assert '--no-build-isolation' in stack.install_command('mmcv')
    assert stack.install_command('mmseg').startswith(
        'pip install mmsegmentation')
    assert stack.install_command('timm') == 'pip install timm'


@pytest.mark.parametrize('family, files', [
    ('openmmlab', ['main', 'mmcv']), ('onedl', ['forks', 'forks-mmcv'])])
def test_pins_of_commands_are_those_that_are_tested(repo_root, family, files):
    pins = ''.join((repo_root / 'requirements' / f'{x}.txt').read_text()
                   for x in files)
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet', 'mmpretrain'):
        command = stack.COMMANDS[family][name]
        wanted = [x for x in command.split() if '==' in x]
        assert wanted and all(f'\n{x}\n' in pins for x in wanted)


def test_nothing_asks_for_a_distribution(repo_root):
    """Forks have other names: importlib.metadata and pkg_resources are for
    tools that make environments."""
    asking = ('importlib.metadata', 'importlib_metadata', 'pkg_resources')
    for folder in ('mmbasis', 'tools', 'configs'):
        for path in (repo_root / folder).rglob('*.py'):
            text = path.read_text(encoding='utf-8')
            assert not any(x in text for x in asking), path
