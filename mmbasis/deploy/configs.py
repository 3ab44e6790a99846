# Copyright (c) mmbasis authors. All rights reserved.
"""Deploy configs of ``configs/deploy``, completed with what is wanted: sizes,
batch, open shapes, precision. MMDeploy's own tools take the result."""
import copy
import re
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

from mmengine.config import Config

from ..models import dense_architecture

#: height and width, pixels
Size = Tuple[int, int]

#: Two graphs: one ends at the features and at the proposals that enter
#: non-maximum suppression, one holds the heads of the regions. MMDeploy's own
#: list starts at marks that its rewriters for MMDetection 3 do not set
_TWO_STAGE = dict(
    type='two_stage',
    apply_marks=True,
    partition_cfg=[
        dict(
            save_file='partition0.onnx',
            start='extract_feat:input',
            end=['extract_feat:output', 'multiclass_nms[0]:input'],
            dynamic_axes={}),
        dict(
            save_file='partition1.onnx',
            start='bbox_head_forward:input',
            end='bbox_head_forward:output',
            dynamic_axes=dict(
                bbox_feats={0: 'regions'},
                cls_score={0: 'regions'},
                bbox_pred={0: 'regions'}))
    ])


def parse_size(text: str) -> Size:
    """Read ``'800x1344'``: height and width in pixels, else a
    :class:`ValueError`."""
    match = re.fullmatch(r'([1-9]\d*)x([1-9]\d*)', text)
    if match is None:
        raise ValueError(f'{text!r} is no size: give height x width in '
                         'pixels, such as 224x224 or 800x1344')
    return int(match[1]), int(match[2])


def complete(deploy_cfg: Config,
             input_shape: Optional[Union[Size, Sequence[Size]]] = None,
             batch: Optional[int] = None,
             dynamic: bool = False,
             model_cfg: Optional[Config] = None,
             precision: Optional[str] = None) -> Config:
    """A config that says all that MMDeploy asks for.

    Args:
        deploy_cfg (Config): One of ``configs/deploy``, or of your own; where
            it states ``dynamic_axes`` or ``model_inputs``, its shapes stay.
        input_shape (tuple, optional): Height and width; with ``dynamic`` for
            TensorRT also three: smallest, best, largest. Defaults to the
            config's own (see :func:`needs_size`).
        batch (int, optional): Images at once, for TensorRT the most with
            ``dynamic``. Defaults to the config's own, 1.
        dynamic (bool): Leave open the batch and, in ONNX Runtime or between
            three sizes, height and width. Defaults to False.
        model_cfg (Config, optional): A detector with regions is cut in two,
            and sizes must be divisible as it says.
        precision (str, optional): ``'fp32'``, ``'fp16'`` or ``'int8'``, of the
            engine. Defaults to what the config says.

    Raises:
        ValueError: If these do not fit the config, the model or each other.
    """
    cfg = copy.deepcopy(deploy_cfg)
    if precision is not None:
        _set_precision(cfg, precision)
    if not _is_complete(cfg):
        model = None if model_cfg is None else dense_architecture(model_cfg)
        _cut_by_stages(cfg, model)
        sizes = _read_sizes(cfg, input_shape, model)
        _set_shapes(cfg, sizes, batch, dynamic, model)
    elif dynamic or input_shape is not None or batch is not None:
        raise ValueError(f'{_name(cfg)} states dynamic_axes or model_inputs: '
                         'leave out size, batch and dynamic, or take a config '
                         'of configs/deploy')
    return cfg


def needs_size(deploy_cfg: Config, dynamic: bool = False) -> bool:
    """Whether :func:`complete` has to be told a size."""
    return (not _is_complete(deploy_cfg)
            and deploy_cfg.onnx_config.get('input_shape') is None
            and (_is_tensorrt(deploy_cfg) or not dynamic))


def check_size(deploy_cfg: Config, size: Size) -> None:
    """Check the size that a model's test pipeline makes of an image against a
    complete config.

    Raises:
        ValueError: If the exported graph or the engine would not take it.
    """
    advice = ('leave the size to the pipeline, or change it (test_pipeline, '
              'pad_size_divisor)')
    found = f"the model's test pipeline makes images of {_text(size)}"
    fixed = deploy_cfg.onnx_config.get('input_shape')
    if fixed is not None and size != tuple(fixed[::-1]):
        raise ValueError(f'{found} (height x width), but the deploy config '
                         f'asks for {_text(fixed[::-1])}: {advice}')
    given = deploy_cfg.backend_config.get('model_inputs')
    if given:
        shape = next(iter(given[0].input_shapes.values()))
        low, high = (tuple(shape[f'{x}_shape'][2:]) for x in ('min', 'max'))
        if not all(a <= x <= b for a, x, b in zip(low, size, high)):
            raise ValueError(
                f'{found}, outside of the range {_text(low)} to {_text(high)} '
                'that the engine takes: choose another range, or change '
                'test_pipeline')


def first_input(deploy_cfg: Config) -> str:
    """Name of the images in the (first) graph."""
    cut = deploy_cfg.get('partition_config') or {}
    if cut.get('type') == 'two_stage':
        return 'img'  # of MMDeploy's mark where it starts
    return deploy_cfg.onnx_config.input_names[0]


def _text(size: Sequence[int]) -> str:
    return 'x'.join(map(str, size))


def _name(cfg: Config) -> str:
    return cfg.filename or 'the deploy config'


def _is_tensorrt(cfg: Config) -> bool:
    return cfg.backend_config.type == 'tensorrt'


def _is_complete(cfg: Config) -> bool:
    return bool(cfg.onnx_config.get('dynamic_axes')
                or cfg.backend_config.get('model_inputs'))


def _set_precision(cfg: Config, precision: str) -> None:
    """What MMDeploy and trtexec may use, where they lower the engine."""
    if precision not in ('fp32', 'fp16', 'int8'):
        raise ValueError(f'precision is {precision!r}: fp32, fp16 or int8')
    if not _is_tensorrt(cfg):
        return
    common = cfg.backend_config.setdefault('common_config', {})
    common.fp16_mode = precision != 'fp32'
    common.int8_mode = precision == 'int8'
    cfg.pop('calib_config', None)
    if precision == 'int8':
        # written by MMDeploy before it builds, or by tools/deploy.py
        cfg.calib_config = dict(create_calib=True, calib_file='calib_data.h5')


def _cut_by_stages(cfg: Config, model: Any) -> None:
    """Cut a detector before its suppressions: after the regions, too."""
    cut = cfg.get('partition_config') or {}
    if cut.get('type') != 'single_stage' or 'roi_head' not in (model or {}):
        return
    head = model.roi_head.get('bbox_head')
    if not isinstance(head, dict):
        raise ValueError(
            f'{_name(cfg)} cuts detectors with one bbox_head, but roi_head '
            f'({model.roi_head.type}) has {len(head or ())}: export the whole '
            'detector, with a detection_* config')
    cfg.partition_config = copy.deepcopy(_TWO_STAGE)
    cfg.codebase_config.model_type = 'two_stage'


def _read_sizes(cfg: Config, given: Any, model: Any) -> List[Size]:
    """None, one or three sizes, checked against the model."""
    if given is None:
        own = cfg.onnx_config.get('input_shape')
        given = () if own is None else tuple(own[::-1])
    sizes = [given] if given and isinstance(given[0], int) else list(given)
    if len(sizes) not in (0, 1, 3):
        raise ValueError(f'{len(sizes)} sizes: give one, or the smallest, the '
                         'best and the largest')
    preprocessor = (model or {}).get('data_preprocessor') or {}
    divisor = preprocessor.get('pad_size_divisor') or 1
    for size in sizes:
        if any(x % divisor for x in size):
            low, high = ([max(1, x // divisor + more) * divisor for x in size]
                         for more in (0, 1))
            raise ValueError(
                f'{_text(size)} is not divisible by {divisor} '
                f'(data_preprocessor.pad_size_divisor of the model): take '
                f'{_text(low)} or {_text(high)}')
    return sizes


def _set_shapes(cfg: Config, sizes: List[Size], batch: Optional[int],
                dynamic: bool, model: Any) -> None:
    """Write sizes and batch into a config."""
    if batch is None:
        batch = cfg.onnx_config.get('batch_size', 1)
    _check_shapes(cfg, sizes, batch, dynamic)
    if dynamic:
        # TensorRT with one size: only the batch is open
        _open_axes(cfg, not _is_tensorrt(cfg) or len(sizes) == 3)
    cfg.onnx_config.batch_size = batch
    cfg.onnx_config.input_shape = None
    if len(sizes) == 1:
        cfg.onnx_config.input_shape = sizes[0][::-1]
        sizes = sizes * 3
    if _is_tensorrt(cfg):
        counts = (1 if dynamic else batch, batch, batch)
        shapes: List[Sequence[int]] = [
            (n, 3, *size) for n, size in zip(counts, sizes)]
        cfg.backend_config.model_inputs = _model_inputs(cfg, shapes, model)


def _check_shapes(cfg: Config, sizes: List[Size], batch: int,
                  dynamic: bool) -> None:
    """Do sizes, batch and back end go together?"""
    if batch < 1:
        raise ValueError(f'batch is {batch}: at least 1')
    if any(a > b for low, high in zip(sizes, sizes[1:])
           for a, b in zip(low, high)):
        raise ValueError(f'sizes {" ".join(map(_text, sizes))} must grow: '
                         'smallest, best, largest')
    if len(sizes) == 3 and not dynamic:
        raise ValueError('three sizes are a range, which needs --dynamic')
    if len(sizes) == 3 and not _is_tensorrt(cfg):
        raise ValueError(f'{cfg.backend_config.type} takes any size with '
                         '--dynamic: give one size or none, not a range')
    if _is_tensorrt(cfg) and not sizes:
        raise ValueError(f'{_name(cfg)} is for TensorRT, which has to know '
                         'the size: give input_shape')
    if dynamic and _is_tensorrt(cfg) and batch == len(set(sizes)) == 1:
        raise ValueError(
            'one image of one size leaves nothing open for TensorRT: give '
            '--dynamic a --batch above 1, or three sizes as --input-shape')


def _open_axes(cfg: Config, sizes: bool) -> None:
    """Name the open axes of the graph, and of the one before suppression:
    the batch, and height and width (``sizes``)."""
    onnx = cfg.onnx_config
    name, axes = onnx.input_names[0], {0: 'batch'}
    if sizes:
        axes.update({2: 'height', 3: 'width'})
    outputs = {0: 'batch'}
    if cfg.codebase_config.task == 'ObjectDetection':
        outputs[1] = 'num_dets'
    onnx.dynamic_axes = {
        name: axes, **{x: dict(outputs) for x in onnx.output_names}}
    parts = (cfg.get('partition_config') or {}).get('partition_cfg')
    if parts:
        parts[0]['dynamic_axes'] = {first_input(cfg): dict(axes)}


def _model_inputs(cfg: Config, shapes: List[Sequence[int]],
                  model: Any) -> List[Dict[str, Any]]:
    """The smallest, best and largest shapes of the inputs of each graph."""
    given = [{first_input(cfg): shapes}]
    cut = cfg.get('partition_config') or {}
    if cut.get('type') == 'two_stage' and model is not None:
        head = model.roi_head.bbox_head
        size = head.get('roi_feat_size', 7)
        size = (size, size) if isinstance(size, int) else size
        proposals = model.test_cfg.get('rpn') or {}
        most = proposals.get('max_per_img', 1000) * shapes[-1][0]
        given.append(
            dict(bbox_feats=[(n, head.get('in_channels', 256), *size)
                             for n in (1, max(1, most // 2), most)]))
    return [
        dict(
            input_shapes={
                name: {
                    f'{which}_shape': list(shape)
                    for which, shape in zip(('min', 'opt', 'max'), of)
                }
                for name, of in inputs.items()
            }) for inputs in given
    ]
