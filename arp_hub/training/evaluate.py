"""Accuracy of a model on a split, counted exactly, in one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from .._utils.torch_utils import evaluating
from ..errors import ArpHubError
from ..models.label_names import label_names
from .data.images import progress
from .data.splits import Split, StreamedSplit


class Scores(TypedDict):
    """What `evaluate` measures: ``top1`` and ``top5`` in per cent, ``loss`` in nats, and the number of images."""

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Split | StreamedSplit,
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
        model: The unwrapped model, evaluated on its own device. Its training or evaluation mode is restored.
        split: The images, for instance ``data.test``.
        batch_size: Images in a forward pass, on each process.
        workers: DataLoader workers, for large data.
        accelerator: The run's accelerator, if there is one.
        max_images: Number of images, chosen at random from the whole split but equal at every call; None: all.

    Raises:
        ArpHubError: If the split has no labels, or if its classes are not those of the model.
    """
    for name, value in (("batch_size", batch_size), ("max_images", max_images)):
        if value is not None and value < 1:
            raise ArpHubError(f"{name} must be at least 1, got {value}")
    if reason := why_not_measured(model, split):
        raise ArpHubError(f"accuracy is not measured: {reason}")
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    count = -(-min(len(split), max_images or len(split)) // (world * batch_size))
    with evaluating(model):
        batches = split.labelled(batch_size, device, workers, rank=rank, world=world, most=max_images)
        for images, target in progress(batches, f"evaluating on {split.name}", count):
            logits = model(images).float()
            if logits.isnan().any():
                raise ArpHubError(
                    f"accuracy is not measured: the model gives NaN for images of split '{split.name}', because its "
                    "weights are damaged or its training has diverged: load others, or train at a lower rate"
                )
            if int(target.max()) >= logits.shape[1]:
                raise ArpHubError(f"accuracy is not measured: {_other_classes(split, logits.shape[1])}")
            totals += _counts(logits, target.to(device))
    if accelerator is not None:
        totals = accelerator.reduce(totals, "sum")
    top1, top5, loss, count = totals.tolist()
    return Scores(top1=100 * top1 / count, top5=100 * top5 / count, loss=loss / count, images=int(count))


def why_not_measured(model: nn.Module, split: Split | StreamedSplit) -> str | None:
    """Why the labels of a split do not fit the classes of a model; None if no mismatch is known."""
    if split.label_range is None:
        return f"split '{split.name}' has no labels"
    ours, theirs = split.class_names, label_names(model)
    classes = getattr(model, "num_classes", None)
    if not isinstance(classes, int):
        return None
    lowest, highest = split.label_range
    if (ours and classes != len(ours)) or highest >= classes:
        return _other_classes(split, classes)
    if lowest < 0:
        return f"split '{split.name}' has the label {lowest}: correct the labels"
    if _numbered_otherwise(ours, theirs):
        return (
            f"the model has the classes of split '{split.name}' in another order ({', '.join(theirs[:3])}, ...): "
            "number the classes of the data in the order of the model"
        )
    return None


def _numbered_otherwise(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether a class has one number in one list of names, and only other numbers in the other list."""
    if sorted(ours) == sorted(theirs):  # as they are written: "A" and "a" may be two classes
        return list(ours) != list(theirs)
    numbers: dict[str, set[int]] = {}
    for number, name in enumerate(theirs):
        numbers.setdefault(name.casefold(), set()).add(number)  # ImageNet has two classes of some names
    return any(number not in numbers.get(name.casefold(), {number}) for number, name in enumerate(ours))


def _other_classes(split: Split | StreamedSplit, classes: int) -> str:
    assert split.label_range is not None
    found = f"{len(split.class_names)} classes" if split.class_names else f"the label {split.label_range[1]}"
    return (
        f"the model has {classes} classes, split '{split.name}' has {found}: choose the model that was trained on this "
        "data"
    )


def _counts(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Numbers of top-1 hits and top-5 hits, summed loss, number of images."""
    ranked = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    loss = F.cross_entropy(logits.double(), target, reduction="sum")
    hits = [ranked[:, 0].sum(), ranked.any(1).sum()]
    return torch.stack([*(hit.double() for hit in hits), loss, torch.tensor(len(target), device=loss.device)])
