# Copyright (c) mmbasis authors. All rights reserved.
"""What is installed: all of mmbasis, and nothing else."""
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml

from mmbasis.__main__ import TOOLS
from tests.test_tools.workplace import CONFIG, Workplace

IGNORED = shutil.ignore_patterns(
    '.git', '.venv*', '*_cache', '__pycache__', '*.egg-info', 'build', 'dist',
    'work_dirs', 'data')
#: of the forks' stack, as pip sees it
FORKS = {
    'numpy': '2.5.2', 'torch': '2.11.0', 'onedl_mmengine': '0.10.12',
    'onedl_mmcv': '2.3.6', 'onedl_mmdetection': '3.5.1',
    'onedl_mmpretrain': '1.3.6', 'rich': '15.0.0', 'matplotlib': '3.11.2'
}
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check', '-q']


def run(*command, **kwargs):
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(source, out, what):
    """A wheel or sdist by the tools that are installed, without network."""
    run(sys.executable, '-c', 'import sys; from setuptools import build_meta; '
        f'build_meta.build_{what}(sys.argv[1])', out, cwd=source)
    found, = out.glob('*.whl' if what == 'wheel' else '*.tar.gz')
    return found


@pytest.fixture(scope='module')
def checkout(tmp_path_factory, repo_root):
    target = tmp_path_factory.mktemp('checkout') / 'mmbasis'
    return shutil.copytree(repo_root, target, symlinks=True, ignore=IGNORED)


@pytest.fixture(scope='module')
def wheel(tmp_path_factory, checkout):
    return build(checkout, tmp_path_factory.mktemp('dist'), 'wheel')


@pytest.fixture(scope='module')
def files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {x: archive.read(x) for x in archive.namelist()}


@pytest.fixture(scope='module')
def installed(tmp_path_factory, wheel):
    """Function that runs a command with the wheel installed, and nothing of
    the repository on the path."""
    folder = tmp_path_factory.mktemp('installed')
    run(*PIP, 'install', '--no-index', '--no-deps', '--target', folder, wheel)

    def call(*command, **env):
        return run(
            *command, cwd=folder,
            env=dict(os.environ, PYTHONPATH=str(folder), **env))

    call.folder = folder
    call.program = folder / 'bin' / 'mmbasis'
    return call


def would_install(wheel, *options, python=sys.executable):
    """Names of what pip would install or replace."""
    # on PYTHONPATH, the repository would count as installed
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    report = run(*PIP, '--python', python, 'install', '--dry-run',
                 '--no-index', '--report', '-', *options, wheel, env=env)
    return [x['metadata']['name'] for x in json.loads(report)['install']]


def fake_stack(folder, distributions):
    """An environment in which pip finds these."""
    run(sys.executable, '-m', 'venv', '--without-pip', folder)
    packages, = folder.glob('lib/python*/site-packages')
    for name, version in distributions.items():
        info = packages / f'{name}-{version}.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(
            f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    return folder / 'bin' / 'python'


def test_nothing_else_is_installed_here(wheel, repo_root):
    others = repo_root.glob('.venv*/bin/python')
    for python in {sys.executable, *map(str, others)}:
        assert set(would_install(wheel, python=python)) <= {'mmbasis'}


def test_nothing_else_is_installed_beside_the_forks(wheel, tmp_path):
    python = fake_stack(tmp_path / 'forks', FORKS)
    assert would_install(wheel, python=python) == ['mmbasis']
    # the check sees more where there is more
    extra = f'mmbasis[plots] @ {wheel.as_uri()}'
    assert would_install(extra, python=python) == ['mmbasis']
    lacking = {k: v for k, v in FORKS.items() if k != 'matplotlib'}
    python = fake_stack(tmp_path / 'lacking', lacking)
    with pytest.raises(AssertionError, match='matplotlib'):
        would_install(extra, python=python)


@pytest.mark.parametrize('version', ['3.8', '3.11', '3.12'])
def test_pythons(wheel, tmp_path, version):
    assert would_install(
        wheel, '--python-version', version, '--only-binary', ':all:',
        '--target', tmp_path) == ['mmbasis']


def test_metadata(files):
    text = files[next(x for x in files if x.endswith('/METADATA'))].decode()
    head, description = text.split('\n\n', 1)
    wanted = re.findall('^Requires-Dist: (.*)$', head, re.MULTILINE)
    assert wanted and all('extra ==' in x for x in wanted)
    extras = set(re.findall('^Provides-Extra: (.*)$', head, re.MULTILINE))
    assert extras == {
        'openmmlab', 'onedl', 'deploy', 'plots', 'trt-check', 'tests'
    }
    # only the extras of the two stacks name what the other has, too
    for line in wanted:
        name, extra = re.match(r'([\w-]+).*extra == .(\w+)', line).groups()
        if extra not in ('openmmlab', 'onedl'):
            assert 'mm' not in name, line
    assert description.lstrip().startswith('# mmbasis')
    for line in ('Description-Content-Type: text/markdown',
                 'Requires-Python: >=3.8',
                 'Classifier: Programming Language :: Python :: 3.12'):
        assert f'\n{line}\n' in head
    assert 'Project-URL: ' in head
    scripts = next(x for x in files if x.endswith('entry_points.txt'))
    assert b'mmbasis = mmbasis.__main__:main' in files[scripts]


def test_wheel_is_complete(files, repo_root):
    assert 'mmbasis/py.typed' in files
    for folder, target in (('mmbasis', ''), ('configs', '.mim/configs/')):
        for path in (repo_root / folder).rglob('*.*'):
            name = path.relative_to(repo_root / folder).as_posix()
            if path.suffix in ('.py', '.yml') and '.mim' not in name:
                found = files.get(f'mmbasis/{target}{name}')
                assert found == path.read_bytes(), name
    tools = {x[len('mmbasis/.mim/tools/'):] for x in files
             if x.startswith('mmbasis/.mim/tools/')}
    assert {'train.py', 'test.py', 'jetson/cli.py'} <= tools
    assert {file for file, _ in TOOLS.values()} <= tools
    # what needs a checkout stays there
    assert not [x for x in tools if x.startswith(
        ('benchmarks', 'demo', 'catalogue')) or x.endswith('.sh')]
    assert not [x for x in files if '__pycache__' in x or 'tests' in x]


def test_sdist_is_complete(checkout, files, tmp_path):
    with tarfile.open(build(checkout, tmp_path, 'sdist')) as archive:
        archive.extractall(tmp_path)
    source, = (x for x in tmp_path.iterdir() if x.is_dir())
    for name in ('tests/test_package.py', 'docs/install.md', 'CHANGELOG.md',
                 'requirements/main.txt', 'tools/setup_env.sh', 'Makefile'):
        assert (source / name).is_file(), name
    (tmp_path / 'dist').mkdir()
    again = build(source, tmp_path / 'dist', 'wheel')
    with zipfile.ZipFile(again) as archive:
        assert set(archive.namelist()) == set(files)


def test_model_index_lists_all_configs(repo_root):
    index = yaml.safe_load((repo_root / 'model-index.yml').read_text())
    listed = []
    for metafile in index['Import']:
        content = yaml.safe_load((repo_root / metafile).read_text())
        collections = {x['Name'] for x in content['Collections']}
        for model in content['Models']:
            listed.append(model['Config'])
            assert model['In Collection'] in collections
            assert model['Name'] == os.path.basename(listed[-1])[:-3]
    assert sorted(listed) == sorted(
        path.relative_to(repo_root).as_posix()
        for library in ('mmdet', 'mmpretrain', 'mmrotate', 'mmseg')
        for path in (repo_root / 'configs' / library).glob('*.py'))


def test_a_checkout_has_the_same_files(repo_root):
    """An editable install finds them by links."""
    mim = repo_root / 'mmbasis' / '.mim'
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (mim / name).samefile(repo_root / name)


def test_configs_are_inherited(installed, tmp_path):
    for lines, name in (
        ('_base_ = "mmbasis::mmpretrain/resnet56_cifar10_basis-macs36.py"',
         'resnet.py'),
        ('_base_ = "mmbasis::mmdet/rtmdet_tiny_bccd_basis-macs50.py"',
         'rtmdet.py')):
        (tmp_path / name).write_text(f'{lines}\nmodel = dict(train_cfg=None)')
    program = """
import sys
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
import mmbasis
from mmbasis.utils import load_config
print('found', mmbasis.__file__)
for path in sys.argv[1:]:
    cfg = load_config(path)
    init_default_scope(cfg.default_scope)
    model = type(MODELS.build(cfg.model)).__name__
    print('found', model, cfg.custom_hooks[0].type)
    TRANSFORMS.build(cfg.train_dataloader.dataset.pipeline[-1])
"""
    out = installed(
        sys.executable, '-W', 'ignore', '-c', program,
        'mmbasis::mmpretrain/resnet56_cifar10_basis-paper.py',
        tmp_path / 'resnet.py', tmp_path / 'rtmdet.py').splitlines()
    hook = 'mmbasis.BasisCompressionHook'
    # libraries print, too
    assert [x.split()[1:] for x in out if x.startswith('found ')] == [
        [str(installed.folder / 'mmbasis' / '__init__.py')],
        ['ImageClassifier', hook], ['ImageClassifier', hook], ['RTMDet', hook]
    ]


def test_commands(installed):
    usage = installed(installed.program)
    assert set(TOOLS) <= set(usage.split())
    assert installed(
        sys.executable, '-m', 'mmbasis', '--version').strip().count('.') == 2
    assert 'usage: mmbasis compress ' in installed(
        installed.program, 'compress', '--help')
    assert 'probe' in installed(installed.program, 'bench', '--help')
    result = subprocess.run([sys.executable, '-m', 'mmbasis', 'compres'],
                            capture_output=True,
                            text=True)
    assert result.returncode == 2
    assert "no command 'compres'" in result.stderr


def test_compress(installed, tmp_path, repo_root):
    place = Workplace(tmp_path, repo_root)
    place.config.write_text(
        CONFIG.format(
            runtime='mmbasis::_base_/default_runtime.py', channels=64))
    installed(
        installed.program, 'compress', place.config, place.checkpoint,
        '--macs', '.5', '--evaluate', '--work-dir', tmp_path / 'out',
        MMBASIS_DATA=str(place.data))
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    macs = report['compressible']['macs']
    assert macs['after'] <= .5 * macs['before']
    assert report['metrics']['after']
