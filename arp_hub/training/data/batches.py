"""Which training images each step sees, keyed by seed, epoch and step.

Nothing here keeps state: a resumed run sees the same batches. Except for streams, so does a run with other numbers of
processes or workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from ..config import TrainConfig
from ..seeds import keyed_generator, keyed_seed
from .images import TrainBatch
from .input_format import sent
from .splits import Split, StreamedSplit


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int, repeats: int = 1) -> Tensor:
    """The global batches of one epoch, as indices ``(steps, batch_size)``.

    Images that do not fill a last batch are left out: other ones in each epoch. A data set smaller than one batch is
    repeated until the batch is full. With ``repeats``, a batch holds as many versions of each of its images, which is
    repeated augmentation. An epoch keeps its number of steps, so that it shows a share ``1 / repeats`` of the images.
    """
    generator = keyed_generator(seed, "order", epoch)
    passes = max(1, -(-batch_size // images))
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(passes)])
    steps = max(1, images // batch_size)
    places = torch.arange(steps * batch_size).view(steps, batch_size)
    # first versions first, so that the versions of an image spread over the processes
    places = places.gather(1, (places % repeats).argsort(dim=1, stable=True))
    return order[places // repeats]


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of batches that `epoch_batches` gives."""
    return max(1, images // batch_size)


def training_batches(
    split: Split | StreamedSplit, config: TrainConfig, accelerator: Accelerator, phase: str, steps: range
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of some batches, augmented, as images and labels.

    Each batch comes in ``accumulation`` parts.

    Args:
        split: The training images.
        config: The settings.
        accelerator: The run's accelerator.
        phase: Name of the phase, which keys the seeds.
        steps: Steps of the phase, all of one epoch.
    """
    per_epoch = steps_per_epoch(len(split), config.batch_size)
    epoch = steps.start // per_epoch
    size = config.batch_size // (accelerator.num_processes * config.accumulation)
    if isinstance(split, StreamedSplit):
        done = (steps.start - epoch * per_epoch) * config.accumulation
        return split.images.training(
            size,
            range(done, done + len(steps) * config.accumulation),
            keyed_seed(config.seed, phase, epoch),
            accelerator.device,
            workers=config.workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
    repeats = max(1, config.aug_repeats)
    batches = epoch_batches(len(split), config.batch_size, keyed_seed(config.seed, phase), epoch, repeats)
    begin = accelerator.process_index * config.accumulation * size
    shares = [slice(begin + part * size, begin + (part + 1) * size) for part in range(config.accumulation)]
    places = [(step, batches[step - epoch * per_epoch], share) for step in steps for share in shares]
    jobs = (
        TrainBatch(
            indices=split.indices[batch],
            seed=keyed_seed(config.seed, phase, "augment", step),
            share=share,
        )
        for step, batch, share in places
    )
    images = split.images.training(jobs, accelerator.device, config.workers)
    known = cast(Tensor, split.labels)
    labels = (sent(known[batch[share]], accelerator.device) for _, batch, share in places)
    return zip(images, labels, strict=True)
