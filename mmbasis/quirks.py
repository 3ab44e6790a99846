# Copyright (c) mmbasis authors. All rights reserved.
"""All that mmbasis knows of single models, where no general mechanism covers
it, each with its reason. This module imports nothing of mmbasis."""
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch.nn as nn

#: layers that say where others sample and that no graph shows: type of the
#: module around them, and their name in it
OFFSET_LAYERS: Dict[str, str] = {
    # Deformable DETR and its kin: on a CPU, MMCV weights the samples outside
    # of the operator
    'MultiScaleDeformableAttention': 'attention_weights',
    # modulated deformable RoI pooling: so does MMCV everywhere
    'ModulatedDeformRoIPoolPack': 'mask_fc.2',
}

#: where the detector is inside a model: trackers of MMDetection (SORT,
#: ByteTrack, QDTrack) hold one, beside what associates boxes
DETECTOR_PREFIXES: Tuple[str, ...] = ('', 'detector.')


def two_copies(model: nn.Module) -> Optional[str]:
    """Why a model cannot be compressed in training, if it holds a teacher that
    follows another part parameter by parameter: with ranks of its own it
    could not. MMDetection's Soft Teacher and MMPretrain's CAE do that."""
    teacher = getattr(model, 'teacher', None)
    for name, child in model.named_children():
        if type(child) is type(teacher) and child is not teacher:
            return (f'{type(model).__name__} holds two copies of a '
                    f'{type(child).__name__}, {name} and teacher, which must '
                    'stay alike in training: train it dense, then compress '
                    'what comes out of it, with the config that uses that')
    return None


def repair(model: nn.Module) -> nn.Module:
    """Repair a model, in place, that a library builds with a fault: prediction
    of MMDetection 3.3.0's ``SSDHead`` asks for ``loss_cls``, which the head
    does not set."""
    for module in model.modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        if 'SSDHead' in names and not hasattr(module, 'loss_cls'):
            module.loss_cls = None  # type: ignore[assignment]
    return model


def with_boxes(transform: Callable) -> Callable:
    """A transform, or one that moves boxes with the image where it does not:
    MMDetection's ``RandomCenterCropPad`` in test mode (CornerNet, CenterNet)
    only notes where the image went."""
    if not (type(transform).__name__ == 'RandomCenterCropPad'
            and getattr(transform, 'test_mode', False)):
        return transform
    return partial(_crop_and_move, transform)


def _crop_and_move(transform: Callable, sample: Dict[str, Any]) -> Any:
    sample = transform(sample)
    if 'gt_bboxes' in sample:
        sample['gt_bboxes'].translate_(sample['border'][[2, 0]].tolist())
    return sample
