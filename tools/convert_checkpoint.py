# Copyright (c) mmbasis authors. All rights reserved.
"""Convert a checkpoint that holds objects into one that is data only.

THIS RUNS WHATEVER CODE THE FILE CONTAINS. Call it only for files of people
that you trust, such as your own older runs. mmbasis itself reads checkpoints
as data and refuses all others.
"""
import argparse
import io
import os.path as osp

import torch

from mmbasis.compat import allow_mmengine_checkpoints
from mmbasis.utils.io import to_plain, write_atomically


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('source', help='the file, whose code is run')
    parser.add_argument('target', help='the new file; must not exist')
    args = parser.parse_args()
    if not osp.isfile(args.source):
        parser.error(f'{args.source} does not exist')
    if osp.exists(args.target):
        parser.error(f'{args.target} exists already')
    return args


def main() -> None:
    """Read the file, and write what is data in it."""
    args = parse_args()
    print(f'Running what {args.source} contains')
    content = torch.load(args.source, map_location='cpu', weights_only=False)
    if isinstance(content, dict) and 'state_dict' in content:
        # weights stay as they are: they carry their versions
        content = {k: x if str(k).endswith('state_dict') else to_plain(x)
                   for k, x in content.items()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    allow_mmengine_checkpoints()
    try:  # beside what is known there may be other objects
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise SystemExit(
            f'{args.source} holds objects that are no data, nothing is '
            f'written: {error}') from None
    write_atomically(args.target, buffer.getbuffer())
    print(f'Written to {args.target}')


if __name__ == '__main__':
    main()
