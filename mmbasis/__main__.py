# Copyright (c) mmbasis authors. All rights reserved.
"""The command ``mmbasis``: runs the tools that travel with the package.

Processes of ``torchrun`` start it as ``torchrun … -m mmbasis train …``.
"""
import importlib.util
import os.path as osp
import sys
from typing import Any

from .version import __version__

FOLDER = osp.join(osp.dirname(osp.abspath(__file__)), '.mim', 'tools')
#: file of each command, and what it is for
TOOLS = {
    'compress': ('compress.py', 'compress a trained model, without training'),
    'train': ('train.py', 'train a model, compressed or dense'),
    'test': ('test.py', 'evaluate a checkpoint'),
    'analyze': ('analyze.py', 'what a model can lose, and what it costs'),
    'deploy': ('deploy.py', 'export through MMDeploy, check and compare'),
    'bench': ('jetson_bench.py', 'speed, power and energy on the device'),
    'latency-table': ('latency_table.py', 'what each layer costs by rank'),
    'convert-checkpoint': ('convert_checkpoint.py',
                           'make data of an older checkpoint of yours'),
}
USAGE = '\n'.join([
    'usage: mmbasis COMMAND ...', '',
    *(f'  {name:<18} {text}' for name, (_, text) in TOOLS.items()), '',
    'mmbasis COMMAND --help shows the arguments; mmbasis --version'
])


def main() -> None:
    """Run the tool that the command line names. Exits with 2 if there is none
    of that name."""
    command = sys.argv[1] if len(sys.argv) > 1 else '--help'
    if command in ('--help', '-h'):
        print(USAGE)
    elif command == '--version':
        print(__version__)
    elif command in TOOLS:
        # argparse names the program after it
        sys.argv[:2] = [f'mmbasis {command}']
        sys.exit(_load(TOOLS[command][0]).main())
    else:
        print(f'mmbasis: no command {command!r}\n{USAGE}', file=sys.stderr)
        sys.exit(2)


def _load(file: str) -> Any:
    """The module of a tool. The folder is not on the path: a tool is called
    like a package of Python's."""
    spec = importlib.util.spec_from_file_location(
        f'mmbasis_{osp.splitext(file)[0]}', osp.join(FOLDER, file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == '__main__':
    main()
