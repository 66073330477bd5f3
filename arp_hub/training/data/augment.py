"""Order and augmentation of training images, keyed by seed, epoch and step.

Nothing here keeps state: a run that resumes, or that uses other numbers of processes or workers, sees the same batches.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..seeds import keyed_generator


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> Tensor:
    """The global batches of one epoch, as indices ``(steps, batch_size)``.

    The last incomplete batch is left out; its images change from epoch to epoch. A data set smaller than one batch is
    repeated until the batch is full.
    """
    generator = keyed_generator(seed, "order", epoch)
    passes = max(1, -(-batch_size // images))
    order = torch.cat([torch.randperm(images, generator=generator) for _ in range(passes)])
    steps = max(1, images // batch_size)
    return order[: steps * batch_size].view(steps, batch_size)


def steps_per_epoch(images: int, batch_size: int) -> int:
    """Number of batches that `epoch_batches` gives."""
    return max(1, images // batch_size)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device. The copy to a GPU does not block the CPU."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def crop_and_flip(pixels: Tensor, share: slice, batch_size: int, seed: int, *, padding: int, flip: bool) -> Tensor:
    """Shift the images of a batch at random (zero padding, then a crop of the same size), and mirror half of them.

    Args:
        pixels: One process's share of a global batch, ``(N, C, H, W)``.
        share: Where in the global batch these images stand.
        batch_size: Images in the global batch. Numbers are drawn for all of them, so that the result for an image does
            not depend on the number of processes.
        seed: Seed of this step.
        padding: Largest shift, in pixels.
        flip: Whether images may be mirrored; False for digits.
    """
    generator = torch.Generator().manual_seed(seed)
    shifts = torch.randint(0, 2 * padding + 1, (2, batch_size), generator=generator)[:, share]
    mirrored = (torch.rand(batch_size, generator=generator) < 0.5)[share]
    count, channels, height, width = pixels.shape
    device = pixels.device
    shifts, mirrored = sent(shifts, device), sent(mirrored, device)
    rows = shifts[0, :, None] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    columns = columns + shifts[1, :, None]
    padded = F.pad(pixels, (padding,) * 4)
    padded = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, width + 2 * padding))
    return padded.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))
