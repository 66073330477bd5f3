"""Accuracy of a model on a split, counted exactly, on one process or several."""

from __future__ import annotations

from typing import TypedDict

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from .._utils.torch_utils import evaluating
from ..errors import ArpHubError
from .data.dataset import Split
from .data.images import progress


class Scores(TypedDict):
    """What `evaluate` measures: ``top1`` and ``top5`` in per cent, ``loss`` in nats, and the number of images."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split,
    *,
    batch_size: int = 256,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    max_images: int | None = None,
) -> Scores:
    """Measure a model on the images of a split.

    With an accelerator of several processes, each takes every n-th image and the counts are summed: no image is
    counted twice. All processes must call it, and all get the result.

    Args:
        model: The model, not wrapped; it is evaluated on the device where it is, and left in the mode it was in.
        split: The images, for instance ``data.test``.
        batch_size: Images a forward pass, on each process.
        workers: DataLoader workers, for large data.
        accelerator: The run's accelerator, if there is one.
        max_images: Stop after so many images.

    Raises:
        ArpHubError: If the split has no labels, or labels that the model has no class for.
    """
    if split.labels is None:
        raise ArpHubError(f"split '{split.name}' has no labels, so accuracy cannot be measured on it")
    labels, indices = split.labels[:max_images], split.indices[:max_images]
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    labels, indices = labels[rank::world], indices[rank::world]
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    with evaluating(model):
        batches = split.images.evaluation(indices, batch_size, device, workers) if len(indices) else iter(())
        targets = labels.split(batch_size)
        for images, target in progress(zip(batches, targets, strict=False), f"evaluating on {split.name}"):
            logits = model(images).float()
            totals += _counts(logits, _checked(target, logits.shape[1], split.name).to(device))
    if accelerator is not None:
        totals = accelerator.reduce(totals, "sum")
    top1, top5, loss, count = totals.tolist()
    return Scores(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, images=int(count))


def _checked(target: torch.Tensor, classes: int, name: str) -> torch.Tensor:
    if int(target.max()) >= classes:
        raise ArpHubError(
            f"split '{name}' has the label {int(target.max())}, the model has {classes} classes: "
            "choose the model that was trained on this data"
        )
    return target


def _counts(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Right at the first guess, right within five, summed loss, images."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    loss = F.cross_entropy(logits.double(), target, reduction="sum")
    hits = [ranked[:, 0].sum(), ranked.any(1).sum()]
    return torch.stack([*(hit.double() for hit in hits), loss, torch.tensor(len(target), device=loss.device)])
