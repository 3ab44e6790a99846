# Copyright (c) mmbasis authors. All rights reserved.
"""Guests that are broken, and libraries under their import names."""
import textwrap

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmbasis.utils import load_config
from mmbasis.utils.libraries import check_library, libraries_of
from tests.toy import run_beside

METADATA = 'Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n'
#: what a transformers 5 has of the names that are asked for on import
PRESENT = {
    '__init__.py': """
        class PreTrainedModel:
            @classmethod
            def from_pretrained(cls): pass
        PreTrainedModel.config_class = PreTrainedModel
        class PretrainedConfig: pass
        AutoConfig = AutoModelForCausalLM = PreTrainedModel
        for name in ('AutoTokenizer', 'BartTokenizer', 'BasicTokenizer',
                     'BertTokenizer', 'BertTokenizerFast', 'LlamaTokenizer',
                     'WordpieceTokenizer'):
            globals()[name] = type(name, (PreTrainedModel, ), {})
        from . import configuration_utils
        """,
    'configuration_utils.py': """
        from . import PretrainedConfig
        """,
    'models/__init__.py': '',
    'models/auto/__init__.py': '',
    'models/auto/auto_factory.py': 'class _BaseAutoModelClass: pass',
}
#: ways of being broken: text, and what mmpretrain makes of it
BROKEN = {
    'names are gone': (PRESENT, 'TypeError: NoneType takes no arguments'),
    'a dependency is missing':
    ({'__init__.py': 'import a_dependency'}, 'ModuleNotFoundError'),
    'it imports lazily, and fails then': (dict(PRESENT, **{
        '__init__.py': """
            class PretrainedConfig: pass
            from . import configuration_utils
            def __getattr__(name):
                if name == 'AutoConfig':
                    raise RuntimeError('operator nms does not exist')
                raise AttributeError(name)
            """
    }), 'RuntimeError: operator nms does not exist'),
}
BUILD = """
import sys
import mmbasis
loaded = {x.partition('.')[0] for x in sys.modules}
assert not loaded & {'mmpretrain', 'mmdet', 'mmdeploy', 'timm'}, loaded
from mmbasis.models import build_dense
from mmbasis.utils import load_config
from mmengine.registry import DATASETS, MODELS, init_default_scope
for config, scope in zip(sys.argv[1::2], sys.argv[2::2]):
    cfg = load_config(config)
    init_default_scope(scope)
    print(type(build_dense(cfg)).__name__)
assert MODELS.get('mmpretrain.Llava') is not None  # says what it needs
assert DATASETS.get('mmpretrain.ImageNet') is not None
"""


@pytest.fixture
def broken(tmp_path, request):
    """A folder with a broken transformers and its metadata."""
    for name, text in BROKEN[request.param][0].items():
        path = tmp_path / 'transformers' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    info = tmp_path / 'transformers-5.0.0.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(METADATA)
    return tmp_path, BROKEN[request.param][1]


@pytest.mark.parametrize('broken', list(BROKEN), indirect=True)
def test_a_broken_guest(broken, repo_root):
    folder, error = broken
    # the fault is there: without us, the library cannot be imported
    result = run_beside(folder, 'import mmpretrain.models')
    assert result.returncode == 1 and error in result.stderr
    configs = repo_root / 'configs'
    result = run_beside(
        folder, BUILD, configs / 'mmpretrain/resnet56_cifar10.py',
        'mmpretrain', configs / 'mmdet/rtmdet_tiny_bccd.py', 'mmdet')
    assert result.returncode == 0, result.stderr
    # the forks print more
    assert {'ImageClassifier', 'RTMDet'} <= set(result.stdout.split())
    said = result.stdout + result.stderr
    assert 'mmpretrain.models cannot be imported with the transformers' in said
    assert error in said


def test_another_error_is_the_users(tmp_path):
    package = tmp_path / 'mmselfsup'
    (package / 'models').mkdir(parents=True)
    (package / '__init__.py').write_text('')
    (package / 'models' / '__init__.py').write_text('raise KeyError("own")')
    result = run_beside(
        tmp_path, 'from mmbasis.utils.libraries import import_models\n'
        'import_models("mmselfsup"); import_models("mmtrack")')
    assert result.returncode == 1
    assert "KeyError: 'own'" in result.stderr


def test_libraries_that_a_config_names():
    cfg = Config(
        dict(
            default_scope='mmdet',
            model=dict(
                type='RTMDet',
                backbone=dict(type='mmpretrain.ResNet', _scope_='mmseg')),
            pipeline=[[dict(type='mmpose.Pack'), dict(type='mmbasis.X')]],
            work_dir='mmaction'))
    assert libraries_of(cfg) == {'mmdet', 'mmpretrain', 'mmseg', 'mmpose'}


def test_nothing_is_installed_by_looking():
    """MMEngine's ``get_config`` has pip install what is not there."""
    with pytest.raises(ModuleNotFoundError,
                       match='mmhuman3d is not installed: pip install mmhum'):
        load_config('mmhuman3d::a/b.py')
    check_library('mmdet')


def test_configs_are_found_by_import_name(tmp_path):
    """mmseg is in a distribution mmsegmentation, or in one of a fork: a
    package without a distribution stands for all others."""
    package = tmp_path / 'mmseg'
    config = package / '.mim' / 'configs' / 'unet' / 'unet.py'
    config.parent.mkdir(parents=True)
    (package / '__init__.py').write_text('')
    (package / '.mim' / 'model-index.yml').write_text('Import: []')
    config.write_text('model = dict(type="UNet")')
    (tmp_path / 'mine.py').write_text('_base_ = "mmseg::unet/unet.py"')
    result = run_beside(
        tmp_path, 'import sys; from mmbasis.utils import load_config\n'
        'for x in sys.argv[1:]: print(load_config(x).model.type)',
        'mmseg::unet/unet.py', tmp_path / 'mine.py')
    assert result.stdout.split() == ['UNet', 'UNet'], result.stderr
    # of a library that is not there, pip must not be told an import name
    assert MODULE2PACKAGE['mmaction'] == 'mmaction2'
    assert MODULE2PACKAGE['mmdet'] == 'mmdet'
