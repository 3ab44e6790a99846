# Copyright (c) mmbasis authors. All rights reserved.
"""Reads what ``trtexec`` prints (TensorRT 7 to 10): inputs, and the report.

The wordings are those of NVIDIA's ``samples/common``, ``sampleInference.cpp``
and ``sampleReporting.cpp``, and of recorded logs.

Two traps make the printed throughput unusable as it stands:

- with an explicit batch, TensorRT 7 prints ``throughput: 0 qps``, because it
  multiplies by the implicit batch size, which is 0 there;
- with an implicit batch, the figure counts images; with an explicit one it
  counts executions, each of a whole batch.

So the rate of executions is computed from the totals, which mean the same in
every version: executions = total GPU compute time / mean GPU compute time,
and rate = executions / host walltime. The printed figure is kept beside it.
"""
import re

from .util import BenchError

_SECTIONS = {
    'latency': 'latency_ms',
    'host latency': 'latency_ms',
    'gpu compute time': 'gpu_ms',
    'gpu compute': 'gpu_ms',
    'enqueue time': 'enqueue_ms',
    'h2d latency': 'h2d_ms',
    'd2h latency': 'd2h_ms',
    'end-to-end host latency': 'end_to_end_ms',
}
_PREFIX = re.compile(r'^(?:\[[\d/]+-[\d:]+\] )?\[[A-Z]\] ?')
_NUMBER = r'(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)'
_PAIR = re.compile(r'(min|max|mean|median)(?: = |: )' + _NUMBER + ' ms')
_PERCENTILE = re.compile(r'percentile\((\d+)%\) = ' + _NUMBER + ' ms')
_OLD_PERCENTILE = re.compile('percentile: ' + _NUMBER + r' ms at (\d+)%')
_SCALARS = [
    ('printed_qps', re.compile('throughput: ' + _NUMBER + ' qps', re.I)),
    ('walltime_s',
     re.compile('(?:total host )?walltime: ' + _NUMBER + ' s', re.I)),
    ('total_gpu_s',
     re.compile('total (?:gpu )?compute time: ' + _NUMBER + ' s', re.I)),
]
# "Created input binding for X with dimensions 1x3x8x8" (8.0 to 8.5), "Input
# binding for X with dimensions 1x3x8x8 is created." (8.6 on); 7 prints none.
_BINDING = re.compile(
    r'\binput binding for (.+?) with dimensions'
    r'([^a-wyz\n]*?)(?: is created\.?)?\s*$', re.M | re.I)
# What it does about open sizes that it was not told: all become 1.
_OVERRIDDEN = re.compile(
    r'(?:Dynamic dimensions required for input|'
    r'Shape missing for input with dynamic shape): (.+?)'
    r'(?:, but no shapes were provided\.)? ?'
    r'Automatically (?:overriding|setting) shape to: (.+)$', re.M)
_VERSION = re.compile(r'\[TensorRT v(\d+)\]')


def _sizes(text):
    return [int(n) for n in re.findall(r'-?\d+', text)]


def parse_inputs(text):
    """Finds the shapes of the inputs in everything that trtexec printed.

    Args:
        text (str): the output.

    Returns:
        tuple[dict, dict]: sizes by name of every input; and of those whose
        open sizes trtexec filled with 1 by itself. Both are empty for
        TensorRT 7, which does not print them.
    """
    return ({name: _sizes(sizes) for name, sizes in _BINDING.findall(text)},
            {name: _sizes(sizes) for name, sizes in _OVERRIDDEN.findall(text)})


def parse_version(text):
    """Returns TensorRT's version from the banner, such as ``'8.5.2'``.

    ``v8502`` has one digit for the minor version, ``v101303`` two. None for a
    banner without it (TensorRT 7).
    """
    found = _VERSION.search(text)
    if found is None:
        return None
    number = int(found.group(1))
    step = 10000 if number >= 100000 else 1000
    return '{}.{}.{}'.format(number // step, number % step // 100,
                             number % 100)


def _entries(text):
    values = {k: float(v) for k, v in _PAIR.findall(text)}
    for level, value in _PERCENTILE.findall(text):
        values['p' + level] = float(value)
    for value, level in _OLD_PERCENTILE.findall(text):
        values['p' + level] = float(value)
    return values


def parse_report(text):
    """Reads the report out of everything that trtexec printed.

    Args:
        text (str): the output; anything around the report is ignored.

    Returns:
        dict: ``latency_ms``, ``gpu_ms``, ``enqueue_ms``, ``h2d_ms``,
        ``d2h_ms`` and ``end_to_end_ms`` where printed (each with min, max,
        mean, median, p90, p95, p99 in ms, as far as printed);
        ``walltime_s``; ``executions`` and ``executions_per_s``, computed as
        the module says; ``printed_qps``; ``images_per_execution``, their
        ratio, where it is a whole number above 1 (an implicit batch), else
        None; ``warnings`` (list of str).

    Raises:
        BenchError: a part that the figures need is missing.
    """
    report, section = {}, None
    for raw in text.splitlines():
        line = _PREFIX.sub('', raw).strip()
        for key, pattern in _SCALARS:
            found = pattern.match(line)
            if found:
                report[key] = float(found.group(1))
        name, _, rest = line.partition(':')
        if name.lower() in _SECTIONS:
            section = _SECTIONS[name.lower()]
            line = rest
        values = _entries(line)
        if section and values:
            report.setdefault(section, {}).update(values)
    missing = [
        k for k in ('latency_ms', 'gpu_ms')
        if not report.get(k, {}).get('median')
    ]
    if not report.get('walltime_s'):
        missing.append('walltime')
    if not report.get('total_gpu_s') and not report.get('printed_qps'):
        missing.append('total compute time')
    if missing:
        raise BenchError(
            'no performance report in the output of trtexec (missing: {}); '
            'its last lines:\n{}'.format(', '.join(missing),
                                         '\n'.join(text.splitlines()[-8:])))
    _derive(report)
    return report


def _derive(report):
    """Adds the rate of executions, and what to be wary of."""
    warnings = []
    mean_s = (report['gpu_ms'].get('mean') or report['gpu_ms']['median']) / 1e3
    total = report.get('total_gpu_s')
    if not total:
        report['executions'] = None
        rate = report['printed_qps']
        warnings.append('no total compute time printed: the rate is the '
                        'printed throughput')
    else:
        report['executions'] = int(round(total / mean_s))
        rate = report['executions'] / report['walltime_s']
    report['executions_per_s'] = rate
    printed = report.get('printed_qps', 0)
    factor = printed / rate
    whole = int(round(factor))
    implicit = whole > 1 and abs(factor / whole - 1) < 0.02
    report['images_per_execution'] = whole if implicit else None
    if printed == 0:
        warnings.append('trtexec printed 0 qps (TensorRT 7, explicit batch): '
                        'the rate comes from its totals')
    elif not implicit and abs(factor - 1) > 0.02:
        warnings.append(
            'trtexec printed {:g} qps, its totals give {:.4g}'.format(
                printed, rate))
    enqueue = report.get('enqueue_ms', {})
    gpu = report['gpu_ms']
    if enqueue.get('median', 0) >= gpu['median']:
        warnings.append('launching takes as long as computing (enqueue {:g} '
                        'ms, GPU {:g} ms): the GPU waits for the CPU'.format(
                            enqueue['median'], gpu['median']))
    report['warnings'] = warnings
