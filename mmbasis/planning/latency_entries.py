# Copyright (c) mmbasis authors. All rights reserved.
"""The entries of a latency table, as they stand in its file."""
from __future__ import annotations

from typing import Any, Mapping

from ..utils.schema import (
    COUNT,
    NONE,
    POSITIVE,
    SHAPE,
    TEXT,
    WEIGHT,
    Rule,
    check_all,
    dict_of,
    list_of,
    of_type,
    one_of,
)
from .costs import Ranks

#: ids of the entries that are no layer
MODEL_ID, COMPRESSED_ID, CARRIER = 'model', 'model/compressed', 'carrier'
#: whether an entry of each form has a rank of the output and of the input
SIDES = dict(dense=(False, False), output=(True, False), input=(False, True),
             both=(True, True), spatial=(True, False))
#: what an entry has in any case, and one of a layer
_ENTRY: dict[str, Rule] = dict(id=TEXT, median_ms=POSITIVE)
_ROLE: dict[str, Rule] = dict(role=one_of('layer', CARRIER, MODEL_ID))
_LAYER: dict[str, Rule] = dict(
    group=TEXT, carrier=TEXT, noise_ms=WEIGHT, weight_shape=SHAPE,
    uses=Rule('a dict of positive counts by layer', lambda x: bool(x) and
              dict_of('', COUNT).allows(x)))
_HEAD: dict[str, Rule] = dict(
    device=of_type('a dict', dict), backend=TEXT, precision=TEXT,
    entries=list_of('a list of dicts', of_type('', dict)))


def write_ranks(ranks: Ranks | None) -> dict[str, Any]:
    """What an entry says of a layer: its form, and its ranks as in a plan."""
    if ranks is None:
        return dict(form='dense', rank=None, input_rank=None)
    return dict(form=ranks.form, rank=ranks.output, input_rank=ranks.input)


def read_ranks(entry: Any, version: int, name: str) -> Ranks | None:
    """The ranks that an entry is of, None for the dense layer; the error
    names the key that is missing, or what does not fit together."""
    if version == 1:
        rank = entry
        if isinstance(entry, dict):
            _require(name, entry, 'rank')
            rank = entry['rank']
        (COUNT | NONE).check(f'{name}: rank', rank)
        return None if rank is None else Ranks(rank)
    of_type('a dict', dict).check(name, entry)
    _require(name, entry, 'form', 'rank', 'input_rank')
    form, sides = entry['form'], (entry['rank'], entry['input_rank'])
    known = SIDES.get(form) if isinstance(form, str) else None
    if known != tuple(x is not None for x in sides) or not all(
            COUNT.allows(x) for x in sides if x is not None):
        raise ValueError(f'{name}: form={form!r}, rank={sides[0]!r} and '
                         f'input_rank={sides[1]!r} do not fit together')
    return None if form == 'dense' else Ranks(*sides, form == 'spatial')


def check_entries(data: dict[str, Any]) -> dict[str, dict]:
    """The entries of a table by id, checked; the ValueError names the entry
    and the key."""
    _require('the table', data, *_HEAD)
    check_all('', _HEAD, data)
    entries: dict[str, dict] = {}
    for number, entry in enumerate(data['entries']):
        name = entry.get('id')
        if not isinstance(name, str):
            name = f'entries[{number}]'
        check_all(f'{name}: ', _ROLE, entry)
        for rules in (_ENTRY, _LAYER) if entry.get('role') == 'layer' else (
                _ENTRY, ):
            _require(name, entry, *rules)
            check_all(f'{name}: ', rules, entry)
        if entry['id'] in entries:
            raise ValueError(f'{entry["id"]!r} is the id of two entries')
        entries[entry['id']] = entry
    for name, entry in entries.items():
        carrier = entry.get('carrier')
        if entry.get('role') == 'layer' and carrier not in entries:
            raise ValueError(f'{name}: there is no carrier {carrier!r}')
    return entries


def _require(name: str, entry: Mapping[str, Any], *keys: str) -> None:
    """Require keys; the ValueError names those that are missing."""
    missing = [x for x in keys if x not in entry]
    if missing:
        raise ValueError(f'{name} has no {", ".join(map(repr, missing))}')
