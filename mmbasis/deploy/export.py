# Copyright (c) mmbasis authors. All rights reserved.
"""Export through MMDeploy's own API, after checks that name mistakes."""
import os
import os.path as osp
from typing import Any, Dict, List, Optional, Union

from mmengine.config import Config
from mmengine.registry import MODELS

from ..compat import max_onnx_opset, repair_static_methods
from ..compression import load_weights, plan_of, read_checkpoint
from ..models import standalone_config
from ..quirks import repair
from ..utils import load_config

#: oldest opset of MMDeploy's rewriters, newest that TensorRT 8.5 reads
MIN_OPSET, MAX_OPSET = 11, 17
_WRAPPERS = ('architecture.', 'module.', 'student.', 'teacher.')


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
    """

    def __init__(self, deploy_cfg: Union[str, Config],
                 model_cfg: Union[str, Config], checkpoint: str) -> None:
        from mmdeploy.codebase import get_codebase_class, import_codebase
        from mmdeploy.utils import get_codebase
        repair_static_methods()
        self.deploy_cfg = read_deploy_cfg(deploy_cfg)
        if isinstance(model_cfg, str):
            model_cfg = load_config(model_cfg)
        self.checkpoint, content = checkpoint, read_checkpoint(checkpoint)
        self.model_cfg = _matching_cfg(model_cfg, content, checkpoint)
        # as MMDeploy's build_task_processor, which refuses to export for
        # TensorRT where there is no GPU
        codebase = get_codebase(self.deploy_cfg)
        import_codebase(codebase,
                        self.deploy_cfg.codebase_config.get('module', []))
        self.task = get_codebase_class(codebase).build_task_processor(
            self.model_cfg, self.deploy_cfg, 'cpu')
        #: what the export is compared with: nothing folded, nothing rewritten
        self.model = MODELS.build(self.model_cfg.model)
        # MMDeploy ignores missing and unexpected keys
        load_weights(self.model, content, checkpoint)
        self.model.eval()

    @property
    def backend(self) -> str:
        """Name of the back end, such as ``'onnxruntime'``."""
        return self.deploy_cfg.backend_config.type

    @property
    def partition(self) -> Optional[str]:
        """``'single_stage'`` or ``'two_stage'`` where the graph ends before
        non-maximum suppression."""
        config = self.deploy_cfg.get('partition_config') or {}
        return config.get('type') if config.get('apply_marks') else None

    def create_input(self, image: Any) -> tuple:
        """Batch of one image (or of several) through the test pipeline.

        Returns:
            tuple: Data with ``data_samples``, and the input ``(N, 3, H, W)``.

        Raises:
            ValueError: If its size is not that of the deploy config.
        """
        size = self.deploy_cfg.onnx_config.get('input_shape')
        data, inputs = self.task.create_input(image, size,
                                              self.model.data_preprocessor)
        height, width = inputs.shape[-2:]
        if size is not None and (width, height) != tuple(size):
            raise ValueError(
                f'onnx_config.input_shape of the deploy config is {size[0]}x'
                f"{size[1]} (width x height), but the model's test pipeline "
                f'makes images of {width}x{height}: choose a deploy config of '
                'that size, or change test_pipeline (and pad_size_divisor)')
        return data, inputs

    def export(self, image: Any, work_dir: str) -> List[str]:
        """Write the ONNX files.

        Args:
            image (str | ndarray): An image to trace the model with.
            work_dir (str): Where the files go.

        Returns:
            list[str]: One file, or two for a two-stage detector that is cut
            before non-maximum suppression.
        """
        from mmdeploy.apis import extract_model, get_predefined_partition_cfg
        os.makedirs(work_dir, exist_ok=True)
        whole = osp.join(work_dir, self.deploy_cfg.onnx_config.save_file)
        self._export_whole(image, whole)
        if self.partition is None:
            return [whole]
        files = []
        parts = self.deploy_cfg.partition_config.get('partition_cfg')
        for part in parts or get_predefined_partition_cfg(
                self.deploy_cfg, self.partition):
            path = osp.join(work_dir, part['save_file'])
            extract_model(
                whole,
                part['start'],
                part['end'],
                dynamic_axes=self._axes(part['dynamic_axes']),
                save_file=path)
            files.append(path)
        # it is full of marks, which no back end runs
        os.remove(whole)
        return files

    def _export_whole(self, image: Any, path: str) -> None:
        """MMDeploy's ``torch2onnx`` without its check of the device."""
        from mmdeploy.apis.core.pipeline_manager import no_mp
        from mmdeploy.apis.onnx import export
        from mmdeploy.core.optimizers import reset_mark_function_count
        data, inputs = self.create_input(image)
        # earlier exports in this process have counted, too
        reset_mark_function_count()
        options = ('input_names', 'output_names', 'opset_version',
                   'dynamic_axes', 'keep_initializers_as_inputs', 'optimize')
        with no_mp():
            export(
                repair(self.task.build_pytorch_model(self.checkpoint)),
                inputs,
                osp.splitext(path)[0],
                self.backend,
                dict(data_samples=data['data_samples'], mode='predict'),
                dict(deploy_cfg=self.deploy_cfg),
                **{k: self.deploy_cfg.onnx_config.get(k) for k in options})

    def _axes(self, axes: Dict[str, dict]) -> Dict[str, dict]:
        """The dynamic axes of a part: of its input, only what the deploy
        config allows."""
        if self.deploy_cfg.onnx_config.get('dynamic_axes'):
            return axes
        if self.partition == 'single_stage':
            return {}
        return {k: v for k, v in axes.items() if k != 'input'}


def read_deploy_cfg(deploy_cfg: Union[str, Config]) -> Config:
    """Read and check a deploy config: see :class:`Deployment`."""
    if isinstance(deploy_cfg, str):
        deploy_cfg = Config.fromfile(deploy_cfg)
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
    return deploy_cfg


def precisions(deploy_cfg: Config) -> List[str]:
    """What a deploy config lets its back end use besides fp32, the shortest
    numbers last."""
    common = deploy_cfg.backend_config.get('common_config') or {}
    return [x for x in ('fp16', 'int8') if common.get(f'{x}_mode')]


def _matching_cfg(cfg: Config, content: dict, path: str) -> Config:
    """The stand-alone config for a checkpoint."""
    first = next(iter(content['state_dict']), '')
    if first.startswith(_WRAPPERS):
        raise RuntimeError(
            f'{path} is the checkpoint of a wrapper: its keys start with '
            f"'{first.split('.')[0]}.' ({first}). Deployment takes the bare "
            'model, as tools/compress.py or BasisCompressionHook wrote it')
    plan, wrapped = plan_of(content), cfg.model.type == 'mmbasis.BasisModel'
    compressed = cfg.model.get('plan') is not None
    if plan is None and (compressed or wrapped):
        raise RuntimeError(
            f'{path} is a dense checkpoint, but the config is of a compressed '
            f'model ({cfg.model.type}): give the compressed.pth that belongs '
            'to it, or the config of the bare dense model')
    if plan is None or (compressed and not wrapped):
        return cfg
    return standalone_config(cfg, plan, path)
