"""Augmentation: crops and flips of whole batches, timm's augmentations of one image, and varied calibration copies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import transforms_imagenet_train
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from ...errors import ArpHubError
from ..seeds import keyed_seed, seeded
from .input_format import InputFormat, sent

VARIATION = v2.Compose(
    [
        v2.RandomAffine(15, translate=(0.1, 0.1), scale=(0.85, 1.15), interpolation=v2.InterpolationMode.BILINEAR),
        v2.ColorJitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05),
    ]
)
"""Rotates, shifts, scales and recolours an image by as much as two photographs of one object may differ."""


def crop_and_flip(pixels: Tensor, share: slice, batch_size: int, seed: int, *, padding: int, flip: bool) -> Tensor:
    """Shift the images of a batch at random, with zero padding, and mirror half of them.

    Args:
        pixels: One process's share of a global batch, ``(N, C, H, W)``.
        share: Position of these images in the global batch.
        batch_size: Number of images in the global batch. Random numbers are drawn for all of them, so that the result
            does not depend on the number of processes.
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


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied, besides crops and flips. Fields have the names and values of timm's ``train.py``.

    Attributes:
        auto_augment: timm's string for AutoAugment, RandAugment, AugMix or 3-Augment, such as ``rand-m9-mstd0.5``.
        color_jitter: Strength of colour jitter. timm skips it beside ``auto_augment``, except for ``3a``.
        train_crop_mode: Random crops of large images: ``rrc``, ``rkrc`` or ``rkrr``.
        reprob: Probability that rectangles of an image are erased.
        remode: What fills them: ``const``, ``rand`` or ``pixel``.
        recount: Largest number of rectangles in an image.
        img_size: Side of training images in pixels; None for the model's input size.
    """

    auto_augment: str = ""
    color_jitter: float = 0.0
    train_crop_mode: str = "rrc"
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1
    img_size: int | None = None

    @classmethod
    def of(cls, augmentation: Augmentation | str) -> Augmentation:
        """The augmentation itself, or the one of an ``auto_augment`` string."""
        return cls(auto_augment=augmentation) if isinstance(augmentation, str) else augmentation

    def transform(self, form: InputFormat) -> Callable[[Image.Image], Tensor]:
        """The transform of one image for training, by timm: crop, flip and augment, to bytes ``(3, H, W)``.

        Raises:
            ArpHubError: If timm does not know ``auto_augment``.
        """
        self.of_image(form)
        transform = create_transform(
            input_size=(3, *self.size(form)), is_training=True, color_jitter=self.color_jitter,
            auto_augment=self.auto_augment or None, train_crop_mode=self.train_crop_mode,
            mean=form.mean, std=form.std, interpolation=form.interpolation,
            use_prefetcher=True,  # bytes, which workers pass on four times as fast as floats
        )  # fmt: skip
        keep_one_bit(transform)
        return cast("Callable[[Image.Image], Tensor]", transform)

    def of_image(self, form: InputFormat) -> Callable[[Image.Image], Image.Image] | None:
        """The part of `transform` between flips and normalisation; None if there is none.

        Raises:
            ArpHubError: If timm does not know ``auto_augment``.
        """
        if not self.auto_augment and not self.color_jitter:
            return None
        try:
            _, augmentation, _ = transforms_imagenet_train(
                form.size, auto_augment=self.auto_augment, color_jitter=self.color_jitter,
                interpolation=form.interpolation, mean=form.mean, std=form.std, separate=True,
            )  # fmt: skip
        except (AssertionError, KeyError, ValueError, IndexError) as error:
            raise ArpHubError(
                f"auto_augment: timm knows no augmentation '{self.auto_augment}': give one like rand-m9-mstd0.5"
            ) from error
        keep_one_bit(augmentation)
        return cast("Callable[[Image.Image], Image.Image]", augmentation)

    def size(self, form: InputFormat) -> tuple[int, int]:
        """Height and width of training images."""
        return form.size if self.img_size is None else (self.img_size, self.img_size)

    def of_batch(self, images: Tensor, form: InputFormat, seeds: list[int]) -> Tensor:
        """Resize normalised images ``(N, 3, H, W)`` to `size` and erase rectangles, with a seed for each image."""
        if tuple(images.shape[2:]) != self.size(form):
            images = F.interpolate(images, self.size(form), mode="bilinear", antialias=True)
        if self.reprob:
            # noise is drawn on the CPU, whose generator `seeded` sets
            erase = RandomErasing(self.reprob, mode=self.remode, max_count=self.recount, device="cpu")
            for image, seed in zip(images, seeds, strict=True):
                with seeded(keyed_seed(seed, "erase")):  # the crop has drawn from the seed itself
                    erase(image)
        return images


def keep_one_bit(transform: Any) -> None:
    """Limit posterising in timm's augmentations to at least one bit, because Pillow refuses zero bits."""
    if isinstance(transform, AugmentOp):
        if transform.name.startswith("Posterize"):
            transform.level_fn = partial(_one_bit_or_more, cast("Callable[..., Any]", transform.level_fn))
    elif isinstance(transform, list):
        for part in transform:
            keep_one_bit(part)
    else:
        for name in ("transforms", "ops", "policy"):
            keep_one_bit(getattr(transform, name, []))


def _one_bit_or_more(bits: Callable[..., Any], level: float, settings: Any) -> tuple[int]:
    return (max(1, *bits(level, settings)),)
