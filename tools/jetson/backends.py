# Copyright (c) mmbasis authors. All rights reserved.
"""Back ends: what runs a model, behind one small interface.

    session = open_session('auto', 'model.onnx', Options(precision='fp16'))
    session.warm_up()
    window = session.window(min_seconds=10, min_count=50)
    session.close()

A latency is always that of a whole inference: input from host memory, output
in host memory, nothing overlapped with the next one.
"""
import importlib
import os

from .inputs import takes_images
from .onnx_file import stored_precision
from .timing import timed_window, warm_up
from .util import BenchError, check_number, find_tool, holding_signals

PRECISIONS = ('fp32', 'fp16', 'int8')
_MODULES = {
    'tensorrt': '.backend_tensorrt',
    'trtexec': '.backend_trtexec',
    'onnxruntime': '.backend_ort',
    'torch': '.backend_torch',
}
NAMES = tuple(_MODULES)
# What some can do and others cannot: of the options with their defaults ...
_FEATURES = dict(dla=None, cuda_graph=False, streams=1, timing_cache=None)
# ... and of a run.
_ABLE = {
    'tensorrt': tuple(_FEATURES) + ('profile', 'check', 'stages'),
    'trtexec': tuple(_FEATURES) + ('profile', ),
    'onnxruntime': ('check', 'stages'),
    'torch': (),
}


class Options:
    """What a back end is to do; the same for all models of a run.

    Args:
        precision (str | None): ``'fp32'``, ``'fp16'`` or ``'int8'``, for
            engines that are built here from fp32; None for what is stored.
        shapes (dict): see ``inputs.parse_shapes``.
        images (str | None): folder of images for the input, and for the
            calibration of int8.
        plugins (list[str]): shared libraries with TensorRT plugins.
        cache (str): folder of built engines.
        threads (int | None): threads of CPU back ends.
        dla (int | None): core of the deep learning accelerator; what it
            cannot run goes to the GPU.
        cuda_graph (bool): record an inference once, launch it as a whole.
        streams (int): inferences at the same time.
        timing_cache (str | None): file with TensorRT's timings of kernels,
            read and written when an engine is built.
        workspace_mib (int): memory that TensorRT may use to choose kernels.
        sysroot (str): where to look for ``trtexec``.
    """

    def __init__(self,
                 precision=None,
                 shapes=None,
                 images=None,
                 plugins=(),
                 cache='engines',
                 threads=None,
                 dla=None,
                 cuda_graph=False,
                 streams=1,
                 timing_cache=None,
                 workspace_mib=1024,
                 sysroot='/'):
        if precision not in (None, ) + PRECISIONS:
            raise BenchError('precision {!r}: choose from {}'.format(
                precision, ', '.join(PRECISIONS)))
        self.precision = precision
        self.shapes = shapes or {}
        self.images = images
        self.plugins = list(plugins)
        self.cache = cache
        self.threads = threads
        if threads is not None:
            check_number('threads', threads, 1, 1024, True)
        self.dla = dla
        if dla is not None:
            check_number('dla', dla, 0, 15, True)
        self.cuda_graph = cuda_graph
        self.streams = check_number('streams', streams, 1, 64, True)
        self.timing_cache = timing_cache
        self.workspace_mib = check_number('workspace_mib', workspace_mib, 1,
                                          1 << 20, True)
        self.sysroot = sysroot

    def engine_settings(self):
        """Returns what is to be noted of every engine, for the record."""
        return dict(
            dla=self.dla, cuda_graph=self.cuda_graph, streams=self.streams)

    def precision_of(self, path):
        """Says in which precision a file will run.

        Args:
            path (str): ONNX, or an engine.

        Returns:
            str: that of the file, or the lower one that an engine of it is
            to have; ``'as built'`` for an engine.

        Raises:
            BenchError: the file cannot be run in the precision asked for.
        """
        wanted = self.precision
        if not path.lower().endswith('.onnx'):
            if wanted is not None:
                raise BenchError('{} is built already: leave out --precision '
                                 '{}'.format(path, wanted))
            return 'as built'
        stored = stored_precision(path)
        found = wanted or stored
        if stored not in ('fp32', found):
            raise BenchError('{} is stored in {} and runs in it: leave out '
                             '--precision {}'.format(path, stored, wanted))
        if self.dla is not None and found not in ('fp16', 'int8'):
            raise BenchError('--dla {}: the DLA runs fp16 and int8, and {} is '
                             '{}: add --precision fp16'.format(
                                 self.dla, path, found))
        return found

    def calibrates(self, path):
        """Tells whether int8 ranges must be found for an ONNX file."""
        return self.precision == 'int8' and stored_precision(path) == 'fp32'


class Session:
    """A loaded model; back ends fill in ``infer`` and ``close``.

    Attributes:
        inputs (dict[str, tuple[int]]): shapes.
        info (dict): versions and settings, for the record.
        at_once (int): inferences of one call of ``infer``.
        on_cpu (bool): whether the CPU does the work.
    """
    at_once = 1
    on_cpu = False

    def __init__(self, inputs, info):
        self.inputs = inputs
        self.info = info

    @property
    def batch(self):
        """Images per inference: the first size of the first input."""
        shape = list(self.inputs.values())[0]
        return shape[0] if shape else 1

    def infer(self):
        """Runs one inference and waits for its result."""
        raise NotImplementedError

    def trial(self):
        """Shows whether the model runs at all."""
        self.infer()

    def warm_up(self, min_seconds=1.0, max_seconds=60.0):
        """Warms up; see ``timing.warm_up``."""
        return warm_up(self.infer, min_seconds, max_seconds)

    def window(self, min_seconds, min_count):
        """Runs one timed window.

        Returns:
            dict: ``start``, ``end`` (s of CLOCK_MONOTONIC), ``latencies`` (s
            per inference; None where only ``latency_ms`` is known),
            ``count`` of inferences, ``notes`` (list of str).
        """
        start, end, latencies = timed_window(self.infer, min_seconds,
                                             min_count)
        return dict(
            start=start,
            end=end,
            latencies=latencies,
            count=len(latencies),
            notes=[])

    def outputs(self):
        """Returns the outputs of an inference by name."""
        raise NotImplementedError

    def layers(self, count):
        """Times the layers of the engine, in runs of their own.

        Args:
            count (int): inferences.

        Returns:
            list[dict]: ``name`` and ``ms`` (mean) in running order.
        """
        raise NotImplementedError

    def close(self):
        """Frees what the session holds."""


# Of a session's info: what changes its speed beside model and precision.
_SPEED_SETTINGS = ('threads', 'providers', 'device', 'cuda', 'dla',
                   'cuda_graph', 'streams')


def speed_settings(info):
    """Returns what must be equal for speeds to be comparable.

    Args:
        info (dict): of a :class:`Session`, or from a result file.
    """
    return {k: info[k] for k in _SPEED_SETTINGS if k in info}


def choose_backend(path, sysroot='/'):
    """Chooses the best back end for a file.

    Args:
        path (str): ``.onnx``, ``.engine``/``.plan``/``.trt``, or TorchScript
            ``.pt``/``.pth``/``.ts``.
        sysroot (str): root of the system, for ``trtexec``.

    Returns:
        tuple[str, str]: name, and why the better ones were passed over.

    Raises:
        BenchError: nothing here runs such a file.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in ('.pt', '.pth', '.ts'):
        order = ['torch']
    elif suffix in ('.engine', '.plan', '.trt'):
        order = ['tensorrt', 'trtexec']
    elif suffix == '.onnx':
        order = ['tensorrt', 'trtexec', 'onnxruntime']
    else:
        raise BenchError(
            '{}: expected .onnx, .engine or TorchScript .pt'.format(path))
    reasons = []
    for name in order:
        reason = why_not(name, sysroot)
        if reason is None:
            return name, '; '.join(reasons)
        reasons.append('{}: {}'.format(name, reason))
    raise BenchError('no back end for {} here. {}'.format(
        path, '; '.join(reasons)))


def why_not(name, sysroot='/'):
    """Returns why a back end cannot be used here, or None if it can."""
    if name == 'trtexec':
        return None if find_tool('trtexec', sysroot) else \
            'not in PATH nor /usr/src/tensorrt/bin'
    if name == 'tensorrt':
        from .cudart import find_library
        if find_library() is None:
            return 'libcudart is not found (set LD_LIBRARY_PATH to the ' \
                   'lib64 folder of CUDA)'
    try:
        with holding_signals():
            importlib.import_module(name)
    except Exception as e:  # a broken installation raises anything
        return '{}: {}'.format(type(e).__name__, e)
    return None


def open_session(name, path, options):
    """Loads a model.

    Args:
        name (str): one of ``NAMES``, or ``'auto'``.
        path (str): the file.
        options (Options): see there.

    Returns:
        Session: ready to run; ``info['backend']`` names the back end.

    Raises:
        BenchError: the file or the back end does not work; says why.
    """
    if not os.path.isfile(path):
        raise BenchError('model {}: no such file'.format(path))
    passed_over = ''
    if name == 'auto':
        name, passed_over = choose_backend(path, options.sysroot)
    reason = why_not(name, options.sysroot)
    if reason:
        raise BenchError('back end {} cannot be used here: {}'.format(
            name, reason))
    try:
        with holding_signals():
            module = importlib.import_module(_MODULES[name], __package__)
    except ImportError as e:
        raise BenchError('back end {} cannot be used here: {}. Install it, '
                         'by pip3 for instance'.format(name, e)) from e
    for feature, default in _FEATURES.items():
        if getattr(options, feature) != default:
            need_feature(name, feature)
    session = module.load(path, options)
    try:
        _try(session, path, options)
    except BaseException:
        session.close()
        raise
    session.info.update(backend=name, passed_over=passed_over)
    return session


def need_feature(name, feature):
    """Refuses a flag that a back end cannot follow.

    Raises:
        BenchError: names the back ends that can.
    """
    able = [n for n in NAMES if feature in _ABLE[n]]
    if name not in able:
        raise BenchError('--{}: back end {} cannot do that, but {} can'.format(
            feature.replace('_', '-'), name, ' and '.join(able)))


def _try(session, path, options):
    """Runs a model once, so that one that cannot run says so at once."""
    shapes = ', '.join('{} {}'.format(n, 'x'.join(map(str, s)))
                       for n, s in session.inputs.items())
    if not session.inputs:
        raise BenchError('{} has no input: there is nothing to '
                         'measure'.format(path))
    if options.images and not any(map(takes_images, session.inputs.values())):
        raise BenchError('--images {}: {} takes no pictures (N x 3 x H x W), '
                         'its inputs are {}: leave it out'.format(
                             options.images, path, shapes))
    try:
        session.trial()
    except BenchError:
        raise
    except Exception as e:  # each engine has errors of its own
        lines = str(e).strip().splitlines() or [type(e).__name__]
        raise BenchError('{} does not run with {}: {}'.format(
            path, shapes, lines[-1])) from e
