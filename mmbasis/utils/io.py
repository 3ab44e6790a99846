# Copyright (c) mmbasis authors. All rights reserved.
import os


def write_atomically(path: str, text: str) -> None:
    """Write a text file through a temporary file beside it, so that it is
    there whole or not at all."""
    temporary = f'{path}.tmp{os.getpid()}'
    with open(temporary, 'w', encoding='utf-8') as file:
        file.write(text)
    os.replace(temporary, path)
