# Copyright (c) mmbasis authors. All rights reserved.
"""Beside the speed: do the outputs agree, and what lies around the engine."""
from .inputs import image_paths, make_input, read_images, takes_images
from .stats import latency_summary
from .timing import timed_window, warm_up
from .util import BenchError, holding_signals

# Largest error, as a share of the largest value of an output.
TOLERANCES = dict(fp32=1e-3, fp16=2e-2, bf16=5e-2, int8=1e-1)
#: what is done with the outputs: see ``stages``
STAGES = ('top5', 'nms')
_BOXES, _CANDIDATES, _SCORE, _OVERLAP = 100, 1000, .05, .5


def check_outputs(session, path, images=None):
    """Compares the engine's outputs with those of ONNX Runtime on the CPU.

    Args:
        session (backends.Session): of the model.
        path (str): the ONNX file.
        images (str | None): folder of images, as for the session.

    Returns:
        dict: ``reference``, ``tolerance``, ``outputs`` (name -> error, a
        share of the largest value; None where nothing can be compared) and
        ``agrees``.

    Raises:
        BenchError: there is no ONNX file, or no ONNX Runtime.
    """
    import numpy as np
    if not path.lower().endswith('.onnx'):
        raise BenchError('--check: {} holds no graph to compare with: give '
                         'the ONNX file'.format(path))
    try:
        with holding_signals():
            import onnxruntime as ort
    except ImportError as e:
        raise BenchError('--check needs ONNX Runtime on the device: pip3 '
                         'install onnxruntime ({})'.format(e)) from e
    from .backend_ort import TYPES
    plain = ort.InferenceSession(path, providers=['CPUExecutionProvider'])
    feeds = {
        i.name: make_input(i.name, session.inputs[i.name], TYPES[i.type],
                           images)
        for i in plain.get_inputs()
    }
    names = [o.name for o in plain.get_outputs()]
    wanted, found = plain.run(None, feeds), session.outputs()
    tolerance = TOLERANCES.get(session.info['precision'], 1e-3)
    errors = {}
    for name, value in zip(names, wanted):
        errors[name] = _error(np, found.get(name), value)
    return dict(
        reference='onnxruntime {}, CPU'.format(ort.__version__),
        tolerance=tolerance,
        outputs=errors,
        agrees=bool(errors) and all(e is not None and e <= tolerance
                                    for e in errors.values()))


def _error(np, found, wanted):
    """Returns the largest difference as a share of the largest value."""
    wanted = np.asarray(wanted, np.float64)
    if found is None or found.shape != wanted.shape or not wanted.size:
        return None
    difference = np.abs(np.asarray(found, np.float64) - wanted).max()
    error = difference / (np.abs(wanted).max() or 1.0)
    return float(error) if np.isfinite(error) else None


def stages(session, images, kind):
    """Times what a program does before and after the engine, on the CPU.

    Args:
        session (backends.Session): of the model.
        images (str): folder; the time from the files of one batch to the
            input of the engine is measured.
        kind (str): ``top5``, the best classes of each image; ``nms``, boxes
            and scores to at most 100 boxes, class by class.

    Returns:
        dict: ``post`` (the kind), ``pre_ms`` and ``post_ms``: latencies of a
        batch, as ``stats.latency_summary``.

    Raises:
        BenchError: the model takes no images, or its outputs do not fit.
    """
    import numpy as np
    pictures = [s for s in session.inputs.values() if takes_images(s)]
    if not images or not pictures:
        raise BenchError('--stages needs --images FOLDER and a model that '
                         'takes pictures (N x 3 x H x W)')
    shape = pictures[0]
    paths = image_paths(images, shape[0])
    outputs = session.outputs()
    work = _top5(np, outputs) if kind == 'top5' else _nms(np, outputs)
    return dict(
        post=kind,
        pre_ms=_time(lambda: read_images(paths, shape)),
        post_ms=_time(work))


def _time(work):
    warm_up(work, .2, 2)
    return latency_summary(timed_window(work, 1, 10)[2])


def _shapes(outputs):
    return ', '.join('{} {}'.format(n, 'x'.join(map(str, v.shape)))
                     for n, v in outputs.items())


def _top5(np, outputs):
    scores = [v for v in outputs.values() if v.ndim == 2 and v.shape[1] > 5]
    if not scores:
        raise BenchError('--stages top5: no output is N x classes; there are: '
                         '{}'.format(_shapes(outputs)))

    def work():
        best = np.argpartition(-scores[0], 5, axis=1)[:, :5]
        values = np.take_along_axis(scores[0], best, 1)
        return np.take_along_axis(best, np.argsort(-values, 1), 1)

    return work


def _nms(np, outputs):
    boxes = [v for v in outputs.values() if v.ndim == 3 and v.shape[2] == 4]
    scores = [
        v for v in outputs.values()
        if boxes and v.ndim == 3 and v.shape[:2] == boxes[0].shape[:2]
        and v is not boxes[0]
    ]
    if not scores:
        raise BenchError('--stages nms: no outputs N x boxes x 4 and N x '
                         'boxes x classes, as graphs before suppression have; '
                         'there are: {}'.format(_shapes(outputs)))

    def work():
        return [
            suppress(np, b, s) for b, s in zip(boxes[0], scores[0])
        ]

    return work


def suppress(np, boxes, scores):
    """Greedy non-maximum suppression of one image, class by class.

    Args:
        np (module): numpy.
        boxes (ndarray): (n, 4), x1 y1 x2 y2.
        scores (ndarray): (n, classes).

    Returns:
        list[tuple[int, int]]: box and class, best first.
    """
    places, classes = np.nonzero(scores > _SCORE)
    values = scores[places, classes]
    order = np.argsort(-values, kind='stable')[:_CANDIDATES]
    places, classes = places[order], classes[order]
    found = boxes[places].astype(np.float64)
    # Boxes of different classes are moved apart.
    found += (classes * (np.abs(found).max() * 2 + 1
                         if found.size else 0))[:, None]
    areas = (found[:, 2] - found[:, 0]) * (found[:, 3] - found[:, 1])
    kept, left = [], np.arange(len(found))
    while left.size and len(kept) < _BOXES:
        best, left = left[0], left[1:]
        kept.append((int(places[best]), int(classes[best])))
        low = np.maximum(found[best, :2], found[left, :2])
        high = np.minimum(found[best, 2:], found[left, 2:])
        common = np.prod(np.maximum(high - low, 0), axis=1)
        union = areas[best] + areas[left] - common
        left = left[common <= _OVERLAP * union]
    return kept


def summary_lines(model):
    """Says for people what the extras of a model found.

    Args:
        model (dict): of a result.

    Returns:
        list[str]: may be empty.
    """
    lines, name = [], model['name']
    check = model.get('check')
    if check:
        lines.append('{}: outputs {} {} (largest error of any {:.2g}, '
                     'tolerance {:g})'.format(
                         name, 'agree with' if check['agrees'] else
                         'DIFFER FROM', check['reference'],
                         max([e for e in check['outputs'].values()
                              if e is not None] or [float('nan')]),
                         check['tolerance']))
    around = model.get('stages')
    if around:
        engine = model['summary']['latency_ms']['p50']
        parts = around['pre_ms']['p50'], engine, around['post_ms']['p50']
        lines.append('{}: before the engine {:.3g} ms, engine {:.3g} ms, '
                     'after it ({}) {:.3g} ms a batch; one after the other '
                     '{:.4g} FPS'.format(
                         name, parts[0], parts[1], around['post'], parts[2],
                         1e3 * model['batch'] / sum(parts)))
    layers = model.get('layers')
    if layers:
        total = sum(n['ms'] for n in layers) or 1.0
        lines.append('{}: {} layers, {:.4g} ms with the profiler, the slowest:'
                     .format(name, len(layers), total))
        lines += [
            '  {:8.4f} ms {:5.1%}  {}'.format(n['ms'], n['ms'] / total,
                                              n['name'])
            for n in sorted(layers, key=lambda n: -n['ms'])[:10]
        ]
    return lines
