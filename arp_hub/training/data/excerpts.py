"""Training images without labels, for calibration and refinement."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ArpHubError
from ...refinement import held_out_count
from ..seeds import keyed_seed
from .dataset import ImageData
from .images import DecodedImages


def calibration_counts(
    data: ImageData, count: int | None = None, copies: int | None = None, most: int = 0
) -> tuple[int, int]:
    """Number of images that `calibration_images` takes, and of varied copies that it adds of each.

    Args:
        data: The data.
        count: Number of images, at most all training images. By default 1,024 images held in memory, or 256 others.
        copies: Copies of each image. By default one for images held in memory, or none.
        most: Number of images and copies together at most; 0 for all. By default there are no copies then.

    Raises:
        ArpHubError: If there would be no images, or copies are negative.
    """
    small = isinstance(data.train.images, DecodedImages)
    if count is None:
        count = 1024 if small else 256  # a large image has many more patches and takes proportionally longer
    if copies is None:
        copies = 1 if small and not 0 < most < 2 * count else 0
    if count < 1:
        raise ArpHubError(f"calibration needs at least one image, got {count}")
    if copies < 0:
        raise ArpHubError(f"calibration_copies must be 0 or more, got {copies}")
    if most:
        count = min(count, max(1, most // (1 + copies)))
    return min(count, len(data.train) or count), copies


def calibration_images(
    data: ImageData,
    count: int | None = None,
    *,
    copies: int | None = None,
    most: int = 0,
    seed: int = 0,
    workers: int = 0,
) -> Tensor:
    """Normalised training images without labels, for the calibration of `make_plan` and `decompose`.

    Copies of an image are rotated, shifted, scaled and recoloured, so that they differ from all training images.

    Args:
        data: The data.
        count: Number of images, at most all training images. By default 1,024 images held in memory, or 256 others.
        copies: Number of varied copies of each image. By default one for images held in memory, or none.
        most: Number of images and copies together at most, such as the ``images`` of an `Effort`; 0 for all. By default
            there are no copies then.
        seed: Seed of the choice and of the copies.
        workers: DataLoader workers, for large data.

    Returns:
        Images ``(count * (1 + copies), 3, H, W)`` on the CPU, each followed by its copies.

    Raises:
        ArpHubError: If there would be no images, or copies are negative.
    """
    device = torch.device("cpu")
    count, copies = calibration_counts(data, count, copies, most)
    part = data.train.excerpt(count, seed)
    versions = [torch.cat(list(part.images.evaluation(part.indices, 128, device, workers)))]
    for copy in range(copies):
        key = keyed_seed(seed, "calibration", copy)
        versions.append(torch.cat(list(part.images.varied(part.indices, 128, device, workers, key))))
    return torch.stack(versions, dim=1).flatten(0, 1)


def refinement_images(
    data: ImageData, count: int | None = None, *, seed: int = 0, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """Normalised training images without labels, for `refine`: to learn from, and a tenth, at most 256, to hold out.

    With the same seed, `calibration_images` takes its images from the other end of the same order. So the fit has not
    seen the images held out, unless nearly all training images calibrate it.

    Args:
        data: The data.
        count: Number of images, at most all training images. By default 1,000, or up to 10,000 of small images that
            are held in memory, as many as take 1 GiB.
        seed: Seed of the choice.
        workers: DataLoader workers, for large data.

    Returns:
        Images to learn from, and held-out images: ``(N, 3, H, W)`` on the CPU.
    """
    if count is None:
        count = 1000
        if isinstance(data.train.images, DecodedImages):  # small networks learn a thousand images by heart
            height, width = data.form.size
            count = min(10_000, max(count, 2**30 // (4 * 3 * height * width)))  # at most 1 GiB as floats
    part = data.train.excerpt(count, seed, from_end=True)
    images = torch.cat(list(part.images.evaluation(part.indices, 128, torch.device("cpu"), workers)))
    held_out = min(len(images), held_out_count(len(images)))
    return images[:-held_out], images[-held_out:]
