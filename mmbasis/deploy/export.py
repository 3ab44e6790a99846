# Copyright (c) mmbasis authors. All rights reserved.
"""Export by MMDeploy, with layers back to dense before it."""
import copy
import os
import os.path as osp
from dataclasses import replace
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch.nn as nn
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS

from .. import compression
from ..compat import max_onnx_opset, repair_static_methods
from ..compression.surgery import attach_plan, replace_modules
from ..models import (
    dense_architecture,
    load_compressed,
    standalone_config,
)
from ..planning import CompressionPlan, DensePlan, LatencyTable
from ..quirks import repair
from ..utils import load_config
from ..utils.libraries import check_library
from .configs import Size, check_size, complete, needs_size
from .graphs import finish, tapped

#: oldest opset of MMDeploy's rewriters, newest that TensorRT 8.5 reads
MIN_OPSET, MAX_OPSET = 11, 17


class Deployment:
    """A model, a deploy config, and MMDeploy's task between them.

    Args:
        deploy_cfg (str | Config): See ``configs/deploy``.
        model_cfg (str | Config): The stand-alone config of a compressed model
            (``compressed.py``), or the config of a dense one, which the plan
            of a compressed checkpoint completes.
        checkpoint (str): The weights.

    Raises:
        KeyError: If the deploy config lacks a part.
        ValueError: If its opset is not supported.
        RuntimeError: If config and checkpoint do not belong together.
        ModuleNotFoundError: Without MMDeploy.
    """

    def __init__(self, deploy_cfg: Union[str, Config],
                 model_cfg: Union[str, Config], checkpoint: str) -> None:
        check_library('mmdeploy')
        repair_static_methods()
        from . import torch_rewriters  # noqa: F401
        self.deploy_cfg = read_deploy_cfg(deploy_cfg)
        if isinstance(model_cfg, str):
            model_cfg = load_config(model_cfg)
        self.checkpoint = checkpoint
        content = compression.read_checkpoint(checkpoint)
        self.model_cfg = _matching_cfg(model_cfg, content, checkpoint)
        self.task = _build_task(self.deploy_cfg, self.model_cfg)
        #: name of the back end, such as ``'onnxruntime'``
        self.backend: str = self.deploy_cfg.backend_config.type
        #: what the export is compared with: nothing folded, nothing rewritten
        # a copy, because DETR's head writes into its config
        self.model = repair(MODELS.build(copy.deepcopy(self.model_cfg.model)))
        # MMDeploy ignores missing and unexpected keys
        compression.load_weights(self.model, content, checkpoint)
        self.model.eval()
        if not suppresses(self.model):
            # the whole graph is what others are before suppression
            self.deploy_cfg.pop('partition_config', None)
            self.deploy_cfg.codebase_config.model_type = 'end2end'
        cut = self.deploy_cfg.get('partition_config') or {}
        #: ``'single_stage'`` or ``'two_stage'`` where the graph ends before
        #: non-maximum suppression, else None
        self.partition = cut.get('type') if cut.get('apply_marks') else None

    def create_input(self, image: Any) -> tuple:
        """Pass an image through the test pipeline, as often as the graph has
        images in a batch: data with ``data_samples``, and the input ``(N, 3,
        H, W)``.

        Raises:
            ValueError: If its size is not one of the deploy config.
        """
        config = self.deploy_cfg.onnx_config
        data, inputs = self.task.create_input(
            [image] * config.get('batch_size', 1), config.get('input_shape'),
            self.model.data_preprocessor)
        check_size(self.deploy_cfg, tuple(inputs.shape[-2:]))
        return data, inputs

    def export(self, image: Any, work_dir: str) -> List[str]:
        """Trace the model with an image (file or array) and write the ONNX
        file, or the two of a two-stage detector that is cut before
        non-maximum suppression, into a folder; returns their paths."""
        from mmdeploy.apis import extract_model, get_predefined_partition_cfg
        from mmdeploy.apis.core.pipeline_manager import no_mp
        from mmdeploy.apis.onnx import export
        os.makedirs(work_dir, exist_ok=True)
        config = self.deploy_cfg.onnx_config
        whole = osp.join(work_dir, config.save_file)
        options = ('input_names', 'output_names', 'opset_version',
                   'dynamic_axes', 'keep_initializers_as_inputs', 'optimize')
        data, inputs = self.create_input(image)
        model = self.build_rewritable()
        # as MMDeploy's torch2onnx, which refuses TensorRT without a GPU, too
        with no_mp(), tapped(model):
            export(model, inputs, osp.splitext(whole)[0],
                   self.backend,
                   dict(data_samples=data['data_samples'], mode='predict'),
                   dict(deploy_cfg=self.deploy_cfg),
                   **{k: config.get(k) for k in options})
        if self.partition is None:
            finish(whole)
            return [whole]
        cut = self.deploy_cfg.partition_config
        parts = cut.get('partition_cfg') or get_predefined_partition_cfg(
            self.deploy_cfg, self.partition)
        files = [osp.join(work_dir, part['save_file']) for part in parts]
        for path, part in zip(files, parts):
            extract_model(whole, part['start'], part['end'], save_file=path,
                          dynamic_axes=part['dynamic_axes'])
            finish(path)
        if self.partition == 'two_stage':
            _state_region_sizes(files[1], self.model.roi_head.bbox_head)
        # it is full of marks, which no back end runs
        os.remove(whole)
        return files

    def build_rewritable(self) -> nn.Module:
        """The model as MMDeploy builds it, for one run of its rewriters."""
        from mmdeploy.core.optimizers import reset_mark_function_count
        reset_mark_function_count()  # earlier runs have counted, too
        return repair(self.task.build_pytorch_model(self.checkpoint))


def _state_region_sizes(path: str, head: Any) -> None:
    """Write the channels and sizes of the regions' features, which MMDeploy's
    operators for RoIAlign hide, into the graph that starts at them."""
    import onnx
    graph = onnx.load(path)
    axes = graph.graph.input[0].type.tensor_type.shape.dim
    for axis, size in zip(axes[1:], (head.in_channels, *head.roi_feat_size)):
        axis.dim_value = size
    onnx.save(graph, path)


def complete_for_images(deploy_cfg: Union[str, Config],
                        model_cfg: Config,
                        images: Sequence[Any],
                        input_shape: Optional[Sequence[Size]] = None,
                        batch: Optional[int] = None,
                        dynamic: bool = False,
                        precision: Optional[str] = None) -> Config:
    """Complete a deploy config, see :func:`complete`, and check that the
    model's test pipeline can make its size of some images. Without a size, it
    is the one that the pipeline makes of the first image.

    Raises:
        ValueError: If the arguments do not fit.
    """
    check_library('mmdeploy')
    repair_static_methods()
    deploy_cfg = read_deploy_cfg(deploy_cfg)
    if input_shape is None and needs_size(deploy_cfg, dynamic):
        input_shape = [_pipeline_size(deploy_cfg, model_cfg, images[0])]
    deploy_cfg = complete(deploy_cfg, input_shape, batch, dynamic, model_cfg,
                          precision)
    for image in images:
        check_size(deploy_cfg, _pipeline_size(deploy_cfg, model_cfg, image))
    return deploy_cfg


def _pipeline_size(deploy_cfg: Config, model_cfg: Config, image: Any) -> Size:
    """Height and width that the model's test pipeline gives an image, told the
    size of the deploy config if that has one."""
    preprocessor = dense_architecture(model_cfg).get('data_preprocessor')
    inputs = _build_task(deploy_cfg, model_cfg).create_input(
        image, deploy_cfg.onnx_config.get('input_shape'),
        MODELS.build(preprocessor or dict(
            type='mmengine.ImgDataPreprocessor')))[1]
    return tuple(inputs.shape[-2:])


def _build_task(deploy_cfg: Config, model_cfg: Config) -> Any:
    """MMDeploy's task; its ``build_task_processor`` refuses TensorRT without a
    GPU."""
    from mmdeploy.codebase import get_codebase_class, import_codebase
    from mmdeploy.utils import get_codebase
    codebase = get_codebase(deploy_cfg)
    import_codebase(codebase, deploy_cfg.codebase_config.get('module', []))
    return get_codebase_class(codebase).build_task_processor(
        model_cfg, deploy_cfg, 'cpu')


def calibration_images(deployment: Deployment, count: int) -> List[np.ndarray]:
    """Training images, spread evenly over the dataset, as the model's test
    pipeline makes them.

    Returns:
        list[ndarray]: Each ``(1, 3, H, W)``, float32.

    Raises:
        ValueError: If the dataset is smaller than ``count``.
    """
    config = copy.deepcopy(deployment.model_cfg.train_dataloader.dataset)
    while config.get('dataset') is not None:  # RepeatDataset and the like
        config = config.dataset
    config.update(pipeline=[], test_mode=True)
    dataset = DATASETS.build(config)
    if len(dataset) < count:
        raise ValueError(f'calibration asks for {count} images, but the '
                         f'training set holds {len(dataset)}')
    samples = (dataset[i * len(dataset) // count] for i in range(count))
    images = (x['img'] if 'img' in x else x['img_path'] for x in samples)
    return [deployment.create_input(image)[1].numpy() for image in images]


def read_deploy_cfg(deploy_cfg: Union[str, Config]) -> Config:
    """Read and check a deploy config: see :class:`Deployment`."""
    deploy_cfg = (Config.fromfile(deploy_cfg) if isinstance(deploy_cfg, str)
                  else copy.deepcopy(deploy_cfg))
    name = deploy_cfg.filename or 'the deploy config'
    for key in ('onnx_config', 'codebase_config', 'backend_config'):
        if deploy_cfg.get(key) is None:
            raise KeyError(f'{name} has no {key!r}: found '
                           f'{sorted(deploy_cfg.keys())}; see configs/deploy')
    opset = deploy_cfg.onnx_config.setdefault('opset_version', MIN_OPSET)
    newest = min(MAX_OPSET, max_onnx_opset())
    if not isinstance(opset, int) or not MIN_OPSET <= opset <= newest:
        raise ValueError(
            f'{name}: onnx_config.opset_version is {opset!r}, supported are '
            f"{MIN_OPSET} to {newest} (MMDeploy's rewriters, this torch's "
            'exporter and TensorRT 8.5)')
    _check_model_inputs(deploy_cfg, name)
    return deploy_cfg


def _check_model_inputs(deploy_cfg: Config, name: str) -> None:
    """Refuse shapes of inputs that are not those of all graphs."""
    given = deploy_cfg.backend_config.get('model_inputs')
    cut = deploy_cfg.get('partition_config') or {}
    parts = cut.get('partition_cfg') or [None]
    if given and len(given) != len(parts):
        files = [x and x['save_file'] for x in parts]
        raise ValueError(
            f'{name}: backend_config.model_inputs has {len(given)} entries, '
            f'but the export writes {len(parts)} graphs ({files}): give the '
            'shapes of the inputs of each graph')


def suppresses(model: nn.Module) -> bool:
    """Whether a detector has non-maximum suppression: DETR and its kin pick
    the best of their queries."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return 'DetectionTransformer' not in names


def precisions(deploy_cfg: Config) -> List[str]:
    """What a back end may use besides fp32, the shortest numbers last."""
    common = deploy_cfg.backend_config.get('common_config') or {}
    return [x for x in ('fp16', 'int8') if common.get(f'{x}_mode')]


def _matching_cfg(cfg: Config, content: dict, path: str) -> Config:
    """The stand-alone config for a checkpoint."""
    first = next(iter(content['state_dict']), '')
    if first.startswith(('architecture.', 'module.', 'student.', 'teacher.')):
        raise RuntimeError(
            f'{path} is the checkpoint of a wrapper: its keys start with '
            f"'{first.split('.')[0]}.' ({first}). Deployment takes the bare "
            'model, as tools/compress.py or BasisCompressionHook wrote it')
    plan = compression.plan_of(content)
    wrapped = cfg.model.type == 'mmbasis.BasisModel'
    compressed = cfg.model.get('plan') is not None
    if plan is None and (compressed or wrapped):
        raise RuntimeError(
            f'{path} is a dense checkpoint, but the config is of a compressed '
            f'model ({cfg.model.type}): give the compressed.pth that belongs '
            'to it, or the config of the bare dense model')
    if plan is None or (compressed and not wrapped):
        return cfg
    return standalone_config(cfg, plan, path)


def merge_layers(model: nn.Module, names: List[str],
                 reason: str) -> CompressionPlan:
    """Merge basis layers to dense, in place, for a reason; the new plan."""
    plan = compression.get_plan(model)
    if plan is None:
        raise ValueError(f'this {type(model).__name__} carries no plan: only '
                         'a compressed model has layers to merge')
    replacements: Dict[nn.Module, nn.Module] = {}
    layers, dense = dict(plan.layers), dict(plan.dense)
    for name in names:
        entry, layer = layers.pop(name), model.get_submodule(name)
        merged = replacements[layer] = layer.to_dense()
        params = sum(x.numel() for x in merged.parameters(recurse=False))
        dense[name] = DensePlan(reason, True, entry.shape, entry.macs[0],
                                params, merged.bias is not None)
    replace_modules(model, replacements)
    # the predicted time is that of all layers together: no longer known
    plan = replace(plan, layers=layers, dense=dense, predicted_ms={})
    attach_plan(model, plan)
    return plan


def merge_slow_layers(deploy_cfg: Union[str, Config], model_cfg: Config,
                      checkpoint: str, table: str,
                      work_dir: str) -> Tuple[Config, str, Dict[str, Any]]:
    """Merge the layers that the latency table does not show to be faster.

    Args:
        deploy_cfg (str | Config): Has the table's back end and precision.
        model_cfg (Config): Of the compressed model, or of the dense one.
        checkpoint (str): The compressed weights.
        table (str): The latency table.
        work_dir (str): Gets ``merged.pth`` where a layer was merged.

    Returns:
        tuple[Config, str, dict]: Config and checkpoint of the result, and
        for each merged layer its form, ranks and what it took, ms.

    Raises:
        ValueError: If the table is of another back end, precision or model,
            or of another device than the plan was made for.
    """
    deploy_cfg = read_deploy_cfg(deploy_cfg)
    latencies = LatencyTable.load(
        table, backend=deploy_cfg.backend_config.type,
        precision=['fp32', *precisions(deploy_cfg)][-1])
    content = compression.read_checkpoint(checkpoint)
    plan = compression.plan_of(content)
    slow = _slow_layers(plan, latencies) if plan is not None else {}
    if not slow:
        return model_cfg, checkpoint, {}
    model = load_compressed(model_cfg, checkpoint)
    plan = merge_layers(model, list(slow), 'merged: not faster as a basis')
    merged = osp.abspath(osp.join(work_dir, 'merged.pth'))
    compression.save_checkpoint(model, plan, merged, content.get('meta', {}))
    return standalone_config(model_cfg, plan, merged), merged, slow


def _slow_layers(plan: CompressionPlan,
                 latencies: LatencyTable) -> Dict[str, Dict[str, Any]]:
    """Layers of a plan that are not faster as a basis on the plan's device."""
    latencies.check(device=(plan.planner.get('table') or {}).get('device'))
    return {
        name: dict(form=x.form, rank=x.rank, input_rank=x.input_rank,
                   basis_ms=latencies.cost(name, x.ranks),
                   dense_ms=latencies.cost(name, None))
        for name, x in plan.layers.items() if name in latencies.curves
        and x.form in latencies.forms
        and not latencies.is_faster(name, x.ranks)
    }
