"""Two ways to hold images: decoded once in memory, or decoded by loader workers at each use.

Both give normalised batches ``(N, 3, H, W)`` on a device, for training (augmented) and for evaluation.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torchvision.transforms import v2
from tqdm import tqdm

from ...errors import ArpHubError
from ..preemption import outlast_sigterm
from ..seeds import keyed_seed, seed_cpu, seeded
from .augment import VARIATION, Augmentation, crop_and_flip
from .decoding import SMALL_SIDE, Rows, decoded
from .input_format import InputFormat, sent

_logger = logging.getLogger(__name__)
_ADDRESS = re.compile(r"<_io\.\w+ object at \w+>")
"""The file object that Pillow names in place of a file."""


@dataclass(frozen=True)
class TrainBatch:
    """One global batch: ``indices (B,)`` of its images, the seed of its augmentation, and this process's share."""

    indices: Tensor
    seed: int
    share: slice

    def image_seeds(self) -> np.ndarray:
        """A seed for each image of the share, the same for any number of processes."""
        return np.random.SeedSequence(self.seed).generate_state(len(self.indices), np.uint32)[self.share]


class BadImages:
    """The rows of a table whose image cannot be decoded. Loader workers share them, so that each row counts once.

    Args:
        count: Number of rows.
        limit: Largest number of bad rows. Each is named in a warning and replaced by an image of the mean colour.
    """

    def __init__(self, count: int, limit: int = 0) -> None:
        self.limit = limit
        self.seen = torch.zeros(count, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return int(self.seen.sum(dtype=torch.int64))

    def add(self, row: int, reason: str) -> None:
        """Record a bad row.

        Raises:
            ArpHubError: If there are more bad rows than the limit allows.
        """
        if self.seen[row]:
            return
        self.seen[row] = 1
        if len(self) <= self.limit:
            _logger.warning("%s (%d of at most %d)", reason, len(self), self.limit)
            return
        raise ArpHubError(
            f"{reason} ({len(self)} bad, {self.limit} allowed): repair or remove it; a recipe may pass over some "
            "with max_bad_images"
        )


class Images(Protocol):
    """The images of one split, in the input format of a model."""

    form: InputFormat
    bad: BadImages

    def __len__(self) -> int: ...

    def training(self, batches: Iterable[TrainBatch], device: torch.device, workers: int) -> Iterator[Tensor]:
        """This process's share of each batch, augmented."""

    def evaluation(self, indices: Tensor, batch_size: int, device: torch.device, workers: int) -> Iterator[Tensor]:
        """Images in the order of ``indices``, not augmented."""

    def varied(
        self, indices: Tensor, batch_size: int, device: torch.device, workers: int, seed: int
    ) -> Iterator[Tensor]:
        """A varied copy of each of these images, which differs from all training images."""


class DecodedImages:
    """Small images: one tensor of bytes, moved to the device once, augmented there in whole batches.

    Args:
        count: Number of images.
        decode: Returns all pixels as bytes ``(count, 3, H, W)``; called when they are first used.
        form: Input format of the model.
        flip: Whether training images may be mirrored.
        augmentation: How training images are varied, besides shifts and flips.
        bad: Where ``decode`` records images that it cannot decode.
    """

    def __init__(
        self,
        count: int,
        decode: Callable[[], Tensor],
        form: InputFormat,
        flip: bool = True,
        augmentation: Augmentation | str = "",
        bad: BadImages | None = None,
    ) -> None:
        self.count, self.form, self.flip = count, form, flip
        self.augmentation = Augmentation.of(augmentation)
        self.auto_augment = self.augmentation.of_image(form)
        self.bad = BadImages(count) if bad is None else bad
        self._decode = decode
        self._pixels: Tensor | None = None

    def __len__(self) -> int:
        return self.count

    def pixels(self, device: torch.device) -> Tensor:
        """All images as bytes ``(N, 3, H, W)`` on ``device``."""
        if self._pixels is None:
            self._pixels = self._decode()
        if self._pixels.device != device:
            self._pixels = self._pixels.to(device)
        return self._pixels

    def training(self, batches: Iterable[TrainBatch], device: torch.device, workers: int) -> Iterator[Tensor]:
        """Shift by up to an eighth of the size, mirror unless ``flip`` is off, and augment."""
        pixels = self.pixels(device)
        for batch in batches:
            chosen = pixels[sent(batch.indices[batch.share], device)]
            seeds = batch.image_seeds().tolist()
            if self.auto_augment:
                chosen = self._auto_augmented(chosen, seeds)
            padding = max(self.form.size) // 8
            moved = crop_and_flip(chosen, batch.share, len(batch.indices), batch.seed, padding=padding, flip=self.flip)
            yield self.augmentation.of_batch(self.form.normalise(moved), self.form, seeds)

    def evaluation(self, indices: Tensor, batch_size: int, device: torch.device, workers: int) -> Iterator[Tensor]:
        """Images in the order of ``indices``. Pixels in memory need no ``workers``."""
        pixels = self.pixels(device)
        for chosen in indices.split(batch_size):
            yield self.form.normalise(pixels[chosen.to(device)])

    def varied(
        self, indices: Tensor, batch_size: int, device: torch.device, workers: int, seed: int
    ) -> Iterator[Tensor]:
        """A varied copy of each of these images, mirrored at random unless ``flip`` is off."""
        vary = v2.Compose([VARIATION, v2.RandomHorizontalFlip()]) if self.flip else VARIATION
        pixels = self.pixels(torch.device("cpu"))
        for chosen in indices.split(batch_size):
            done = []
            for row in chosen.tolist():
                with seeded(keyed_seed(seed, "variation", row)):
                    done.append(vary(pixels[row]))
            yield self.form.normalise(torch.stack(done).to(device))

    def _auto_augmented(self, pixels: Tensor, seeds: Iterable[int]) -> Tensor:
        """Augment image by image on the CPU, because timm's augmentations take PIL images."""
        transform = cast("Callable[[Image.Image], Image.Image]", self.auto_augment)
        done = []
        for image, seed in zip(pixels.permute(0, 2, 3, 1).cpu().numpy(), seeds, strict=True):
            with seeded(seed):
                done.append(np.array(transform(Image.fromarray(image))))
        return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).to(pixels.device)


class StreamedImages:
    """Large images, or too many small ones for memory: the workers of a DataLoader decode and augment each.

    Args:
        rows: The stored images.
        form: Input format of the model.
        augmentation: How training images are varied, besides crops and flips.
        bad: Where images that cannot be decoded are recorded; by default the first one is an error.
    """

    def __init__(
        self,
        rows: Rows,
        form: InputFormat,
        augmentation: Augmentation | str = "",
        bad: BadImages | None = None,
    ) -> None:
        self.rows, self.form = rows, form
        self.bad = BadImages(len(rows)) if bad is None else bad
        self.augmentation = Augmentation.of(augmentation)
        self.train_transform = self.augmentation.transform(form)
        self.eval_transform = create_transform(
            input_size=(3, *form.size),
            mean=form.mean,
            std=form.std,
            interpolation=form.interpolation,
            crop_pct=form.crop_pct,
            crop_mode=form.crop_mode,
            use_prefetcher=True,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def training(self, batches: Iterable[TrainBatch], device: torch.device, workers: int) -> Iterator[Tensor]:
        """Take random resized crops, mirror half of them and augment, with a seed for each image."""
        batches = list(batches)
        jobs = (
            list(zip(batch.indices[batch.share].tolist(), batch.image_seeds().tolist(), strict=True))
            for batch in batches
        )
        for batch, images in zip(batches, self._load(self.train_transform, jobs, device, workers), strict=True):
            yield self.augmentation.of_batch(images, self.form, batch.image_seeds().tolist())

    def evaluation(self, indices: Tensor, batch_size: int, device: torch.device, workers: int) -> Iterator[Tensor]:
        """Images in the order of ``indices``, resized and cropped."""
        jobs = ([(index, 0) for index in chosen.tolist()] for chosen in indices.split(batch_size))
        return self._load(self.eval_transform, jobs, device, workers)

    def varied(
        self, indices: Tensor, batch_size: int, device: torch.device, workers: int, seed: int
    ) -> Iterator[Tensor]:
        """A varied copy of each of these images, mirrored at random, resized and cropped."""
        vary = v2.Compose([VARIATION, v2.RandomHorizontalFlip(), self.eval_transform])
        jobs = (
            [(row, keyed_seed(seed, "variation", row)) for row in chosen.tolist()]
            for chosen in indices.split(batch_size)
        )
        return self._load(vary, jobs, device, workers)

    def _load(
        self,
        transform: Callable[[Image.Image], Tensor],
        jobs: Iterable[list[tuple[int, int]]],
        device: torch.device,
        workers: int,
    ) -> Iterator[Tensor]:
        loader = DataLoader(
            _Transformed(self, transform),
            batch_sampler=jobs,
            num_workers=min(workers, os.cpu_count() or 1),
            pin_memory=device.type == "cuda",
            worker_init_fn=outlast_sigterm,
        )
        with worker_errors():
            for batch in loader:
                yield self.form.normalise(batch.to(device, non_blocking=True))


@contextmanager
def worker_errors() -> Iterator[None]:
    """Restore the messages of errors that loader workers raise, which torch wraps in a traceback."""
    try:
        yield
    except ArpHubError as error:
        message = str(error).strip().splitlines()[-1]
        raise ArpHubError(message.removeprefix(f"{ArpHubError.__module__}.{ArpHubError.__name__}: ")) from error


class _Transformed(Dataset):
    """Rows as transformed bytes ``(3, H, W)``; an index is ``(row, seed)``."""

    def __init__(self, images: StreamedImages, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: tuple[int, int]) -> Tensor:
        row, seed = index
        with seeds_of_image(seed):
            return self.transform(rgb(self.images.rows, row, self.images.form, self.images.bad))


def seeds_of_image(seed: int) -> AbstractContextManager[None]:
    """Seed the global generators for one image. A loader worker, which nothing else draws from, keeps them so."""
    if get_worker_info() is None:
        return seeded(seed)
    seed_cpu(seed)
    return nullcontext()


def rgb(rows: Rows, row: int, form: InputFormat, bad: BadImages) -> Image.Image:
    """One image as RGB. If it cannot be decoded and ``bad`` allows that, an image of the mean colour.

    Raises:
        ArpHubError: If the row holds no image, or if too many cannot be decoded.
    """
    try:
        return decoded(rows, row)
    except ArpHubError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        reason = " ".join(_ADDRESS.sub("", str(error)).split()) or type(error).__name__
        bad.add(row, f"{rows.name(row)} cannot be decoded: {reason}")
        height, width = form.size
        return Image.new("RGB", (width, height), tuple(round(255 * value) for value in form.mean))


def decode_all(rows: Rows, form: InputFormat, bad: BadImages) -> Tensor:
    """All images as bytes ``(N, 3, H, W)``, resized to the model's input size without a crop."""
    height, width = form.size
    pixels = torch.empty(len(rows), 3, height, width, dtype=torch.uint8)
    resample = getattr(Image.Resampling, form.interpolation.upper(), Image.Resampling.BICUBIC)
    large = []
    for row in progress(range(len(rows)), "decoding images"):
        image = rgb(rows, row, form, bad)
        if max(image.size) > SMALL_SIDE and image.size != (width, height):
            large.append(row)
        if image.size != (width, height):
            image = image.resize((width, height), resample)
        pixels[row] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if large:
        text = "%d images have more than %d pixels a side, unlike a sample of the others: they are resized without a "
        _logger.warning(text + "crop; the first is %s", len(large), SMALL_SIDE, rows.name(large[0]))
    return pixels


def progress(items: Iterable[Any], title: str, total: int | None = None) -> Iterable[Any]:
    """A progress bar up to ``total``, or the length of the items; silent when the output is not a terminal."""
    return tqdm(items, desc=title, total=total, disable=None, leave=False)
