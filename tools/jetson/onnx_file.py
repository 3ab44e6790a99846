# Copyright (c) mmbasis authors. All rights reserved.
"""Finds out in which precision an ONNX file is stored.

The board need not have the ``onnx`` package, so the few fields are read here:
a protocol buffer is a list of (number of the field, kind, content), see
``onnx.proto`` and developers.google.com/protocol-buffers/docs/encoding.
"""
import mmap

from .util import BenchError

# TensorProto.DataType
_FLOATS = {1: 'fp32', 10: 'fp16', 11: 'fp64', 16: 'bf16'}
_NARROW = {17: 'fp8', 18: 'fp8', 19: 'fp8', 20: 'fp8', 21: 'int4', 22: 'int4'}
# ModelProto, GraphProto, NodeProto, AttributeProto, TensorProto
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_OP_TYPE, _ATTRIBUTE, _TENSOR = 4, 5, 5
_DIMS, _DATA_TYPE = 1, 2


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7f) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError('a number is too long')


def _fields(data, at, end):
    """Yields (field, value) or (field, (start, end)) of a message."""
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > end:
            raise ValueError('field {} of kind {}'.format(key >> 3, kind))
        yield key >> 3, (at, at + size)
        at += size


def _tensor(data, span, counts):
    """Counts the numbers of a tensor by type."""
    numbers, kind = 1, None
    for field, value in _fields(data, *span):
        if field == _DIMS and isinstance(value, int):
            numbers *= value
        elif field == _DIMS:  # packed
            at = value[0]
            while at < value[1]:
                size, at = _varint(data, at)
                numbers *= size
        elif field == _DATA_TYPE:
            kind = value
    name = _FLOATS.get(kind) or _NARROW.get(kind)
    if name:
        counts[name] = counts.get(name, 0) + numbers


def _node(data, span, counts):
    """Counts constants; returns the operator."""
    operator = ''
    for field, value in _fields(data, *span):
        if field == _OP_TYPE:
            operator = data[value[0]:value[1]].decode('utf-8', 'replace')
        elif field == _ATTRIBUTE:
            for inner, part in _fields(data, *value):
                if inner == _TENSOR and isinstance(part, tuple):
                    _tensor(data, part, counts)
    return operator


def stored_precision(path):
    """Returns in which precision a network is stored.

    Args:
        path (str): an ONNX file.

    Returns:
        str: where it quantises (Q/DQ, or quantised operators) ``'int8'``, or
        ``'fp8'`` or ``'int4'`` if it has such numbers; else the type of most
        of its weights: ``'fp32'``, ``'fp16'``, ``'bf16'`` or ``'fp64'``;
        ``'fp32'`` without weights.

    Raises:
        BenchError: it is no ONNX file.
    """
    counts, operators = {}, set()
    try:
        with open(path, 'rb') as f, \
                mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for field, graph in _fields(data, 0, len(data)):
                if field != _GRAPH:
                    continue
                for inner, span in _fields(data, *graph):
                    if inner == _INITIALIZER:
                        _tensor(data, span, counts)
                    elif inner == _NODE:
                        operators.add(_node(data, span, counts))
    except (ValueError, IndexError, TypeError) as e:
        raise BenchError('cannot parse {}: not ONNX ({})'.format(
            path, e)) from e
    except OSError as e:
        raise BenchError('cannot read {}: {}'.format(path, e.strerror)) from e
    if not operators:
        raise BenchError('cannot parse {}: not ONNX, or an empty '
                         'graph'.format(path))
    if any('QuantizeLinear' in n or n.startswith('QLinear')
           for n in operators):
        return ([n for n in ('fp8', 'int4') if n in counts] + ['int8'])[0]
    return max(counts, key=counts.get) if counts else 'fp32'
