# Copyright (c) mmbasis authors. All rights reserved.
import os.path as osp
import shutil

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = osp.dirname(osp.abspath(__file__))
#: what travels in ``mmbasis/.mim``, where MMEngine and mim look for it, and
#: what of it does not: that only runs in a checkout
MIM = {
    'configs': (),
    'tools': ('benchmarks', 'demo', 'catalogue*', '*.sh'),
}


class BuildWithMim(build_py):
    """Puts configs, tools and the model index into the wheel, too. A checkout
    has links instead, for editable installs."""

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            return
        folder = osp.join(self.build_lib, 'mmbasis', '.mim')
        shutil.rmtree(folder, ignore_errors=True)
        self.mkpath(folder)
        for name, ignored in MIM.items():
            shutil.copytree(
                osp.join(HERE, name), osp.join(folder, name),
                ignore=shutil.ignore_patterns('__pycache__', *ignored))
        self.copy_file(osp.join(HERE, 'model-index.yml'), folder)


def read_text(*parts):
    """Read a file of the repository."""
    with open(osp.join(HERE, *parts), encoding='utf-8') as file:
        return file.read()


def read_version():
    """Read ``__version__`` without importing the package."""
    scope = {}
    exec(read_text('mmbasis', 'version.py'), scope)
    return scope['__version__']


def read_requirements(name):
    """List the requirements of ``requirements/<name>.txt``."""
    lines = read_text('requirements', f'{name}.txt').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


setup(
    name='mmbasis',
    version=read_version(),
    description='Basis (low-rank) compression of convolutional networks '
    "inside MMEngine's runner",
    long_description=read_text('README.md'),
    long_description_content_type='text/markdown',
    author='mmbasis authors',
    license='Apache License 2.0',
    project_urls={
        'Paper': 'https://arxiv.org/abs/2105.10436',
        "The paper's code":
        'https://github.com/mtayyab454/CNN-compression-ICIP2021',
    },
    keywords='compression, low-rank, pruning, MMEngine, MMDetection, '
    'MMPretrain, OpenMMLab',
    packages=find_packages(include=('mmbasis', 'mmbasis.*')),
    package_data={'mmbasis': ['py.typed']},
    cmdclass={'build_py': BuildWithMim},
    entry_points={'console_scripts': ['mmbasis = mmbasis.__main__:main']},
    python_requires='>=3.8',
    # none: two families of distributions provide mmengine and mmcv under the
    # same import names, and pip would install one over the other. What is
    # missing is said when mmbasis is imported (mmbasis/stack.py)
    install_requires=[],
    extras_require={
        'tests': read_requirements('tests'),
        **{
            name: read_requirements(f'extra-{name}')
            for name in ('openmmlab', 'onedl', 'deploy', 'plots', 'trt-check')
        },
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Environment :: Console',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'License :: OSI Approved :: Apache Software License',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3 :: Only',
        'Programming Language :: Python :: 3.8',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
        'Typing :: Typed',
    ],
    zip_safe=False)
