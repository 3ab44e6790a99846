# Copyright (c) mmbasis authors. All rights reserved.
"""What several benchmarks do: run the code of a checkout, say what ran."""
import json
import os
import os.path as osp
import subprocess
import sys


def command() -> str:
    """The command line, with names instead of a machine's absolute paths."""
    return ' '.join(
        osp.basename(x.rstrip('/')) if osp.isabs(x) else x for x in sys.argv)


def run_in_checkout(program: str, checkout: str, *args: object,
                    **environment: str) -> dict:
    """Run a program with the mmbasis of a checkout.

    Args:
        program (str): Python code. It prints ``RESULT`` and a JSON object,
            whose ``file`` is that of the mmbasis it imported.
        checkout (str): Folder of the checkout.
        *args: What the program finds in ``sys.argv``.
        **environment: Variables for it.

    Returns:
        dict: The object, without ``file``.

    Raises:
        RuntimeError: If another mmbasis ran.
    """
    done = subprocess.run(
        [sys.executable, '-c', program, *map(str, args)],
        env=dict(os.environ, PYTHONPATH=checkout, **environment),
        cwd=checkout,
        stdout=subprocess.PIPE,
        text=True,
        check=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith('RESULT')]
    result = json.loads(lines[-1][len('RESULT'):])
    found = osp.dirname(osp.dirname(osp.abspath(result.pop('file'))))
    if not osp.samefile(found, checkout):
        raise RuntimeError(f'{checkout} was asked for, but {found} ran')
    return result
