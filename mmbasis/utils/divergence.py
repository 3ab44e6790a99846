# Copyright (c) mmbasis authors. All rights reserved.
"""How far outputs of a model are from those of its dense self."""
import torch.nn.functional as F
from torch import Tensor


def kl_divergence(student: Tensor, teacher: Tensor,
                  temperature: float = 1.) -> Tensor:
    """``T^2 KL(teacher || student)`` of predictions softened by a temperature
    ``T``, averaged over images (Hinton et al., 2015); logits have shape
    ``(N, ..., classes)``."""
    student = F.log_softmax(student.flatten(0, -2) / temperature, -1)
    teacher = F.log_softmax(teacher.flatten(0, -2) / temperature, -1)
    return temperature**2 * F.kl_div(
        student, teacher, reduction='batchmean', log_target=True)


def normalized_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error of features, each channel (axis 1) in units of the
    teacher's variance of it, so that layers and levels count alike."""
    axes = [axis for axis in range(teacher.dim()) if axis != 1]
    variance = teacher.var(axes, unbiased=False, keepdim=True)
    return ((student - teacher).square() / (variance + 1e-6)).mean()
