# Copyright (c) mmbasis authors. All rights reserved.
import os.path as osp

from setuptools import find_packages, setup

HERE = osp.dirname(osp.abspath(__file__))


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
    license='Apache License 2.0',
    packages=find_packages(include=('mmbasis', 'mmbasis.*')),
    package_data={'mmbasis': ['py.typed']},
    python_requires='>=3.8,<3.12',
    install_requires=read_requirements('runtime'),
    extras_require={
        'tests': read_requirements('tests'),
        'deploy': read_requirements('deploy'),
    },
    classifiers=[
        'License :: OSI Approved :: Apache Software License',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.8',
        'Programming Language :: Python :: 3.9',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    zip_safe=False)
