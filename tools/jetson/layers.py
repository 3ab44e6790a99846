# Copyright (c) mmbasis authors. All rights reserved.
"""Latency tables: times many small models, for planning by real latency.

Input: a folder with ``index.json``::

    {"version": 2,
     "entries": [{"id": "conv1/output8", "onnx": "conv1_output8.onnx",
                  "input_shape": [1, 16, 32, 32], "role": "layer",
                  "form": "output", "rank": 8, "input_rank": null, ...}]}

``id`` is unique; ``onnx`` is relative to the folder; ``input_shape`` may be
left out if the file has fixed sizes. All other keys are carried through; where
``role`` is ``"layer"``, ``form``, ``rank`` and ``input_rank`` must be there.
An index of version 1, which has ``rank`` alone, gives a table of version 1.

Output, a JSON table::

    {"schema": "mmbasis.latency_table", "version": 2, "status": "complete",
     "device": {...}, "backend": "tensorrt", "engine_version": "8.5",
     "precision": "fp16", "engine": {"threads": null, ...},
     "clock_limits": {...}, "protocol": {...}, "flags": [...],
     "entries": [{...keys of the index..., "onnx_sha256": "...",
                  "median_ms": 0.41, "noise_ms": 0.003, "count": 900}]}

``median_ms`` is the median over all latencies; ``noise_ms`` half the range
of the medians of the rounds: two entries that differ by less are equal. The
table is written after every entry; a second call does only what is missing.

On a CPU that is shared with others, windows are timed while it runs at its
full speed (``pace.py``): ``product_ms`` has the longest time of the matrix
product beside those of an entry. Entries for which that was too long are
measured again, and a flag counts those that stay so.
"""
import os

from . import device
from .backends import open_session, speed_settings
from .pace import Pace
from .stats import quantile
from .util import (
    BenchError,
    Progress,
    check_number,
    duration_text,
    now,
    read_json,
    sha256,
    write_json,
)

SCHEMA = 'mmbasis.latency_table'
#: of index and table, with what an entry of a layer must have
VERSIONS = {1: ('rank', ), 2: ('form', 'rank', 'input_rank')}
#: how often entries are visited that were not measured at full speed
PASSES = 3
SLOW = 'slow_machine'


def read_index(folder):
    """Reads and checks ``index.json``.

    Args:
        folder (str): see the module.

    Returns:
        dict: ``version`` and ``entries``.

    Raises:
        BenchError: another version, a missing key or file, or an id twice.
    """
    path = os.path.join(folder, 'index.json')
    index = read_json(path, 'index of layers')
    if not isinstance(index, dict) or index.get('version') not in list(
            VERSIONS) or isinstance(index['version'], bool):
        raise BenchError(
            '{}: expected an object with "version": 1 or 2'.format(path))
    if not isinstance(index.get('entries'), list) or not index['entries']:
        raise BenchError('{} has no entries'.format(path))
    seen = set()
    for entry in index['entries']:
        _check_entry(path, entry, VERSIONS[index['version']])
        if entry['id'] in seen:
            raise BenchError('{}: id {!r} stands twice'.format(
                path, entry['id']))
        seen.add(entry['id'])
        if not os.path.isfile(os.path.join(folder, entry['onnx'])):
            raise BenchError('{}: {} is missing'.format(path, entry['onnx']))
    return index


def _check_entry(path, entry, keys_of_layer):
    if not isinstance(entry, dict):
        raise BenchError('{}: an entry is no object: {!r}'.format(path, entry))
    keys = ('id', 'onnx')
    if entry.get('role') == 'layer':
        keys += keys_of_layer
    for key in keys:
        if key not in entry:
            raise BenchError('{}: an entry has no {!r}: {}'.format(
                path, key, entry))
    for key, good in (('id', (str, int)), ('onnx', str)):
        if not isinstance(entry[key], good):
            raise BenchError('{}: {!r} of an entry is {!r}: expected a '
                             'text'.format(path, key, entry[key]))
    shape = entry.get('input_shape')
    if shape is not None and not (isinstance(shape, list) and all(
            isinstance(n, int) and n > 0 for n in shape)):
        raise BenchError('{}: input_shape of {!r} is {!r}: expected sizes '
                         'such as [1, 16, 32, 32]'.format(
                             path, entry['id'], shape))


def _identity(table):
    """What must be equal for entries to stand in one table."""
    info = table.get('device', {})
    conditions = dict(
        board=info.get('board') or info.get('cpu'),
        l4t=info.get('l4t'),
        cores=info.get('cores'),
        mode=info.get('mode'))
    for key in ('clock_limits', 'backend', 'engine_version', 'precision',
                'engine', 'protocol'):
        value = table.get(key)
        if isinstance(value, dict):
            conditions.update(
                ('{} {}'.format(key, k), v) for k, v in value.items())
        else:
            conditions[key] = value
    return conditions


def _resume(path, table):
    """Returns the finished entries of an earlier table by id and hash."""
    if not os.path.exists(path):
        return {}
    old = read_json(path, 'latency table')
    version = table['version']
    if not isinstance(old, dict) or old.get('schema') != SCHEMA or \
            old.get('version') != version:
        raise BenchError('{} is not a latency table of version {}, as the '
                         'index is: move it away or choose another '
                         '--out'.format(path, version))
    try:
        mine, theirs = _identity(table), _identity(old)
        done = {(e['id'], e['onnx_sha256']): e
                for e in old['entries'] if e['median_ms'] and e['noise_ms']
                is not None}
        flags = [
            dict(code=f['code'], text=f['text']) for f in old['flags']
            if f['code'] != SLOW
        ]
    except (KeyError, TypeError, AttributeError) as e:
        raise BenchError('{} is damaged ({}: {}): move it away or choose '
                         'another --out'.format(path,
                                                type(e).__name__, e)) from e
    other = [
        '{} {} instead of {}'.format(k, theirs.get(k, 'unknown'),
                                     mine.get(k, 'none'))
        for k in sorted(set(mine) | set(theirs))
        if k not in mine or k not in theirs or mine[k] != theirs[k]
    ]
    if other:
        raise BenchError('{} was measured differently: {}. Choose another '
                         '--out'.format(path, '; '.join(other)))
    table['flags'] += flags
    table['product_ms'] = old.get('product_ms')
    return done


def measure_table(folder,
                  out,
                  backend,
                  options,
                  rounds=3,
                  seconds=0.3,
                  min_count=20,
                  max_wait=60,
                  sysroot='/',
                  listener=None):
    """Measures all entries of an index.

    Args:
        folder (str): with ``index.json``.
        out (str): the table; an earlier one is continued.
        backend (str), options (backends.Options): see ``open_session``; the
            shape of an entry comes before ``options.shapes``.
        rounds (int): timed windows per entry.
        seconds (float), min_count (int): least length of each window.
        max_wait (float): seconds that an entry waits for the full speed of
            the CPU that runs it; 0 does without.
        sysroot (str), listener (callable): see ``protocol.Run``.

    Returns:
        dict: the table, also in ``out``.

    Raises:
        BenchError: a bad index, an entry that does not run, or an earlier
        table of other conditions.
    """
    check_number('rounds', rounds, 1, 10000, True)
    check_number('seconds', seconds, .001, 86400)
    check_number('min_count', min_count, 1, 1e9, True)
    check_number('max_wait', max_wait, 0, 86400)
    if not os.path.isdir(os.path.dirname(out) or '.'):
        raise BenchError('--out {}: there is no such folder'.format(out))
    index = read_index(folder)
    entries = index['entries']
    state = device.snapshot(sysroot)
    protocol = dict(rounds=rounds, seconds=seconds, min_count=min_count)
    table, done, pace = None, {}, None
    for _ in range(PASSES):
        table_entries = []
        tell = _teller(len(entries), listener)
        for i, entry in enumerate(entries):
            path = os.path.join(folder, entry['onnx'])
            key = (entry['id'], sha256(path))
            if not _is_good(done.get(key), pace):
                tell(i, entry['id'])
                session = _open(entry, path, backend, options)
                try:
                    if table is None:
                        table = _new_table(index['version'], sysroot, state,
                                           session, protocol)
                        done = _resume(out, table)
                        if session.on_cpu and max_wait:
                            pace = Pace(table['product_ms'])
                    if session.info['precision'] != table['precision']:
                        raise BenchError(
                            'entry {!r} runs in {}, those before in {}: a '
                            'table has one precision'.format(
                                entry['id'], session.info['precision'],
                                table['precision']))
                    if not _is_good(done.get(key), pace):
                        done[key] = dict(
                            entry,
                            onnx_sha256=key[1],
                            **measure(
                                session,
                                pace=pace,
                                max_wait=max_wait,
                                **protocol))
                        table['product_ms'] = pace and pace.best_ms
                finally:
                    session.close()
            table_entries.append(done[key])
            table['entries'] = table_entries
            # At once, so that a table that ends here does not hide it.
            _flag(table, device.changes(state, device.snapshot(sysroot)))
            _write(out, table, done)
    _flag(table, _slow(table['entries'], pace))
    table['status'] = 'complete'
    write_json(out, table)
    return table


def _is_good(entry, pace):
    """Tells whether an entry need not be measured (again)."""
    if entry is None or pace is None:
        return entry is not None
    return entry.get('product_ms') is not None and pace.is_full(
        entry['product_ms'])


def _slow(entries, pace):
    """Yields a flag if entries were not measured at full speed."""
    slow = [e['id'] for e in entries if not _is_good(e, pace)]
    if slow:
        yield (SLOW,
               '{} of {} entries, such as {}, were measured while the machine '
               'ran below its full speed, although it was waited for: a plan '
               'by this table may miss its target'.format(
                   len(slow), len(entries), slow[0]))


def _flag(table, flags):
    """Adds to a table the flags that it does not have yet."""
    for code, text in flags:
        if (code, text) not in [(f['code'], f['text'])
                                for f in table['flags']]:
            table['flags'].append(dict(code=code, text=text))


def _write(out, table, done):
    """Writes the table with the entries that are still to be visited."""
    have = {e['id'] for e in table['entries']}
    rest = [e for e in done.values() if e['id'] not in have]
    write_json(out, dict(table, entries=table['entries'] + rest))


def _teller(total, listener):
    """Returns a call that announces an entry and the time that is left."""
    progress, start, told = Progress(None, listener), now(), []

    def tell(i, name):
        left = ''
        if told:
            each = (now() - start) / len(told)
            left = '  [about {} left]'.format(
                duration_text(each * (total - i)))
        told.append(name)
        progress.step('{} of {}: {}{}'.format(i + 1, total, name, left))

    return tell


def _open(entry, path, backend, options):
    shape = entry.get('input_shape')
    own = type(options)(**dict(
        vars(options), shapes={'': tuple(shape)} if shape else options.shapes))
    try:
        return open_session(backend, path, own)
    except BenchError as e:
        raise BenchError('entry {!r}: {}'.format(entry['id'], e)) from e


def _new_table(version, sysroot, state, session, protocol):
    info = dict(
        device.describe(sysroot), mode=state['mode'][0], gpu=state['gpu'])
    return dict(
        schema=SCHEMA,
        version=version,
        status='partial',
        device=info,
        backend=session.info['backend'],
        engine_version=session.info['version'],
        precision=session.info['precision'],
        engine=speed_settings(session.info),
        clock_limits=device.limits(state),
        protocol=protocol,
        product_ms=None,
        flags=[],
        entries=[])


def measure(session, rounds, seconds, min_count, pace=None, max_wait=0):
    """Times a session for a table.

    Args:
        session (backends.Session): loaded.
        rounds (int): timed windows.
        seconds (float), min_count (int): least length of each.
        pace (Pace | None): waits for full speed and repeats a window in which
            it ended …
        max_wait (float): … for so many seconds at most, all windows together.

    Returns:
        dict: ``median_ms``, ``noise_ms`` (half the range of the rounds'
        medians), ``count``, ``settled``; with a pace ``product_ms``, the
        longest one of those before and after the windows.
    """
    warm = session.warm_up(min(seconds, 0.5), 10 * max(seconds, 0.5))

    def window():
        if pace is not None:  # the product has filled the caches
            session.window(0, 1)
        return session.window(seconds, min_count)

    medians, everything, products, count = [], [], [], 0
    for _ in range(rounds):
        if pace is None:
            found = window()
        else:
            found, product = pace.at_full_speed(window, max_wait / rounds)
            products.append(product)
        count += found['count']
        if found['latencies']:
            ordered = sorted(s * 1e3 for s in found['latencies'])
            everything += ordered
            medians.append(quantile(ordered, .5))
        else:
            medians.append(found['latency_ms']['p50'])
    result = dict(
        median_ms=quantile(sorted(everything or medians), .5),
        noise_ms=(max(medians) - min(medians)) / 2,
        count=count,
        settled=warm['settled'])
    if products:
        result['product_ms'] = max(products)
    return result
