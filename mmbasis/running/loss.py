# Copyright (c) mmbasis authors. All rights reserved.
"""The loss whose gradients say what the outputs of a layer are worth."""
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from torch import Tensor

from .adapter import Adapter

#: Labels are drawn from softened predictions: on its training images a
#: network is so sure of itself that its gradients all but vanish.
TEMPERATURE = 2.


def classifies(adapter: Adapter, data: Any) -> bool:
    """Whether a model returns logits."""
    return adapter.logits(data) is not None


def fisher_loss(adapter: Adapter, data: Any, batch_index: int,
                classifies: bool) -> Tensor:
    """The loss of a batch, summed over its images, a scalar.

    Classifiers are given labels of their own: that makes the gradients'
    second moment the Fisher information of the model. Any other model gives
    its training loss.

    Args:
        adapter (Adapter): The model.
        data (Any): The batch, prepared or not.
        batch_index (int): Seed of the labels.
        classifies (bool): Whether the model returns logits.

    Raises:
        UnknownLossError: If the model has no loss that is known.
    """
    if not classifies:
        return adapter.loss(data) * adapter.count_images(data)
    logits = adapter.logits(data)
    if logits is None:
        raise ValueError(
            f'{type(adapter.model).__name__} returns logits for some batches '
            'and other outputs for others: give batches of one kind')
    labels = sampled_labels(logits, batch_index)
    return F.cross_entropy(logits, labels, reduction='sum')


def sampled_labels(logits: Tensor, batch: int) -> Tensor:
    """Draw labels from logits of shape ``(N, classes)``, seeded by the batch
    and the same for an image however images are spread over processes."""
    rank, world = get_rank(), get_world_size()
    generator = torch.Generator().manual_seed(batch)
    uniform = torch.rand(len(logits) * world, 1, generator=generator)
    cumulative = (logits.detach() / TEMPERATURE).softmax(-1).cumsum(-1)
    labels = (cumulative < uniform[rank::world].to(cumulative)).sum(-1)
    return labels.clamp_max(logits.shape[-1] - 1)
