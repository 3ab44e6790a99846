# Copyright (c) mmbasis authors. All rights reserved.
"""A part of the catalogue that is the same with every stack."""
import random
from typing import Dict, List

from rich.console import Console

from .configs import Entry


def draw_families(known: List[dict], count: int, seed: int) -> List[str]:
    """The smallest model of each of some families that are drawn by lot.

    Args:
        known (list[dict]): Rows of an earlier sweep, of whatever versions;
            models that did not pass then are left out.
        count (int): Number of families.
        seed (int): Of the draw.

    Returns:
        list[str]: Names of the models.

    Raises:
        ValueError: If there are fewer families.
    """
    families: Dict[str, List[dict]] = {}
    for row in known:
        if row['status'] == 'passed':
            family = row['name'].partition('/')[0]
            families.setdefault(family, []).append(row)
    if count > len(families):
        raise ValueError(f'--families {count}: models of {len(families)} '
                         'families passed in the report of --known')
    drawn = random.Random(seed).sample(sorted(families), count)
    return [
        min(families[x], key=lambda row: row['params'])['name']
        for x in sorted(drawn)
    ]


def find_models(catalogue: List[Entry], names: List[str]) -> List[Entry]:
    """The models of these names; says which are not installed."""
    found = {
        f'{entry.library}::{config}': entry
        for entry in catalogue for config in entry.configs
    }
    missing = [name for name in names if name not in found]
    if missing:
        Console().print('Not in the installed libraries: '
                        + ', '.join(missing))
    return [found[name] for name in names if name in found]
