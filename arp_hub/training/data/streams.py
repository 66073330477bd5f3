"""Images read in the order of their shards, for data too large to download or to read at random.

Shards are dealt to processes, then to loader workers. The order depends on seed, epoch, processes and workers alone, so
that a resumed run skips exactly the images that it has seen.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ...errors import ArpHubError
from ..preemption import outlast_sigterm
from ..seeds import keyed_seed
from .decoding import open_image, survey
from .images import BadImages, StreamedImages, rgb, seeds_of_image, worker_errors
from .input_format import InputFormat, sent
from .sources import Treatment

Chunk = tuple[Tensor, Tensor]
"""Images as bytes ``(n, 3, H, W)`` and their labels ``(n,)``."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One stored image of a stream.

    Attributes:
        image: The encoded bytes, ``{"bytes", "path"}`` of the datasets library, or a decoded image.
        label: Its class, None without labels.
        name: Its name in messages.
    """

    image: Any
    label: Any
    name: str


class Samples(Protocol):
    """The samples of one split, which can be read in order only."""

    def order(self, seed: int | None, rank: int = 0, world: int = 1) -> Iterable[Sample]:
        """One process's samples, shuffled by ``seed`` or as stored; loader workers divide them among themselves."""

    def workers(self, wanted: int, world: int) -> int:
        """Number of loader workers of each process that get samples, at most ``wanted``."""


class Records:
    """Samples in memory, as rows.

    Args:
        samples: The samples.
        white: Value of white in grey images.
    """

    def __init__(self, samples: Sequence[Sample], white: Mapping[str, int] | None = None) -> None:
        self.samples, self.white = samples, white or {}

    def __len__(self) -> int:
        return len(self.samples)

    def open(self, row: int) -> Image.Image:
        """The image of a sample.

        Raises:
            ArpHubError: If it has none.
        """
        stored = self.samples[row].image
        if isinstance(stored, Image.Image):
            return stored
        if isinstance(stored, dict):
            if stored["bytes"] is None and stored["path"] is not None:
                return open_image(Path(stored["path"]))
            stored = stored["bytes"]
        if stored is None:
            raise ArpHubError(f"data: {self.name(row)} is missing: remove the sample, or give it an image")
        return open_image(BytesIO(stored))

    def name(self, row: int) -> str:
        """The name of a sample."""
        return self.samples[row].name


class _NamedBad(BadImages):
    """Bad images of a stream, which have names but no numbers: each is recorded by a checksum of its message."""

    def __init__(self, limit: int) -> None:
        super().__init__(2**16, limit)

    def add(self, row: int, reason: str) -> None:
        super().add(zlib.crc32(reason.encode()) % len(self.seen), reason)


class ImageStream:
    """The images of one split, decoded and augmented by loader workers in the order in which they arrive.

    Args:
        source: The data as the user wrote it, for messages.
        samples: The stored samples.
        treatment: What happens to each image.
        classes: Number of classes, to check labels; 0 without labels.
    """

    white: Mapping[str, int]
    form: InputFormat
    transforms: StreamedImages

    def __init__(self, source: str, samples: Samples, treatment: Treatment, classes: int) -> None:
        self.source, self.samples, self.classes, self._form = source, samples, classes, treatment.form
        self.bad: BadImages = _NamedBad(treatment.max_bad_images)
        self.augmentation = treatment.augmentation
        self.head = Records(self._read(None, 16))  # enough to tell size and white: each may be a download
        if not len(self.head):
            raise ArpHubError(f"data '{source}' has no images in one of its splits: remove the split, or fill it")
        self.labelled = classes > 0 and any(sample.label not in (None, -1) for sample in self.head.samples)
        self.treat_alike([self])

    @staticmethod
    def treat_alike(streams: Collection[ImageStream]) -> None:
        """Decide for all splits together how images are resized, and which value is white in grey ones."""
        seen = survey([stream.head for stream in streams])
        for stream in streams:
            stream.white = seen.white
            stream.form = stream._form.uncropped() if seen.small else stream._form
            stream.transforms = stream.held([])

    def held(self, samples: Sequence[Sample]) -> StreamedImages:
        """Some samples as images in memory, with the transforms of this stream."""
        rows = Records(samples, self.white)
        return StreamedImages(rows, self.form, self.augmentation, self.bad)

    def labels(self, samples: Sequence[Sample]) -> Tensor:
        """Class numbers of samples.

        Raises:
            ArpHubError: If one is missing or out of range.
        """
        for sample in samples:
            label = sample.label
            if not isinstance(label, (int, np.integer)) or not 0 <= label < self.classes:
                raise ArpHubError(
                    f"data '{self.source}': {sample.name} has the label {label!r}, where {self.classes} classes allow "
                    f"0..{self.classes - 1}: correct it, name another label_key, or give the model as many classes"
                )
        return torch.tensor([int(sample.label) for sample in samples])

    def training(
        self, size: int, parts: range, seed: int, device: torch.device, workers: int, rank: int, world: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One process's batches of an epoch, augmented. A process that runs out of images starts over, reshuffled.

        Args:
            size: Images in a batch.
            parts: Which batches of the epoch to give: those before are skipped.
            seed: Seed of the epoch.
            device: Where the batches go.
            workers: Loader workers.
            rank: Number of this process.
            world: Number of processes.
        """
        chunks = self._endless(size, parts.start * size, seed, workers, rank, world)
        batches = _rebatched(chunks, size, parts.start * size)
        for part, (pixels, labels) in zip(parts, batches, strict=False):
            seeds = (
                np.random.SeedSequence(keyed_seed(seed, "erase", rank, part)).generate_state(size, np.uint32).tolist()
            )
            images = self.form.normalise(sent(pixels, device))
            yield self.augmentation.of_batch(images, self.form, seeds), sent(labels, device)

    def _endless(self, size: int, skip: int, seed: int, workers: int, rank: int, world: int) -> Iterator[Chunk]:
        """One pass over this process's images after the other; images to skip may come without pixels."""
        for turn in itertools.count():
            order = partial(self.samples.order, keyed_seed(seed, "order", turn), rank, world)
            own = keyed_seed(seed, "augment", rank, turn)
            load = _Loading(self, order, self.transforms.train_transform, size, own, skip // size)
            count = 0
            for pixels, labels in self._chunks(load, workers, world):
                count += len(labels)
                yield pixels, labels
            if not count:
                raise ArpHubError(
                    f"data '{self.source}': process {rank + 1} of {world} gets no images: start fewer processes, or "
                    "split the data into more shards"
                )
            skip = max(0, skip - count)

    def evaluation(
        self, size: int, device: torch.device, workers: int, rank: int, world: int, most: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One process's images, not augmented, with labels; ``most`` over all processes, from a fixed shuffle."""
        seed = None if most is None else keyed_seed("evaluate")
        order = partial(self.samples.order, seed, rank, world)
        load = _Loading(self, order, self.transforms.eval_transform, size, 0, 0)
        left = most if most is None else most // world + (rank < most % world)
        for pixels, labels in self._chunks(load, workers, world):
            pixels, labels = pixels[:left], labels[:left]
            if len(labels):
                yield self.form.normalise(sent(pixels, device)), labels
            if left is not None:
                left -= len(labels)
                if not left:
                    return

    def _chunks(self, load: _Loading, workers: int, world: int) -> Iterator[Chunk]:
        used = self.samples.workers(workers, world)
        if used < workers:
            text = "data '%s' has shards for %d loader workers on each of %d processes, not for workers=%d"
            _logger.info(text, self.source, used, world, workers)
        loader = DataLoader(load, batch_size=None, num_workers=used, worker_init_fn=outlast_sigterm)
        with worker_errors():
            yield from loader

    def first(self, most: int) -> list[Sample]:
        """The first samples of the order that `evaluation` has."""
        return self._read(keyed_seed("evaluate"), most)

    def excerpt(self, count: int, seed: int, odd: bool) -> list[Sample]:
        """The first samples of a shuffled order, from its even places or from its odd ones."""
        return self._read(keyed_seed(seed, "calibration"), 2 * count)[int(odd) :: 2]

    def _read(self, seed: int | None, most: int) -> list[Sample]:
        """The first samples of all shards."""
        with closing(readable(self.source, self.samples.order(seed))) as samples:
            return list(itertools.islice(samples, most))


class _Loading(IterableDataset):
    """What a loader worker does: read its samples, and decode and transform them in batches.

    Args:
        stream: The stream.
        order: Gives the samples of this process.
        transform: Turns an image into bytes ``(3, H, W)``.
        size: Images in a batch.
        seed: Seed of the transforms.
        skip: Batches of this process, over all workers, that come without pixels.
    """

    def __init__(
        self,
        stream: ImageStream,
        order: Callable[[], Iterable[Sample]],
        transform: Callable[[Image.Image], Tensor],
        size: int,
        seed: int,
        skip: int,
    ) -> None:
        self.stream, self.order, self.transform = stream, order, transform
        self.size, self.seed, self.skip = size, seed, skip

    def __iter__(self) -> Iterator[Chunk]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples = readable(self.stream.source, self.order())
        for place in itertools.count():
            batch = list(itertools.islice(samples, self.size))
            if not batch:
                return
            if worker + place * workers < self.skip:  # the loader takes one batch of each worker in turn
                yield torch.empty(len(batch), 0), torch.zeros(len(batch))
            else:
                yield self._pixels(batch, keyed_seed(self.seed, worker, place)), self.stream.labels(batch)

    def _pixels(self, batch: list[Sample], seed: int) -> Tensor:
        stream, rows = self.stream, Records(batch, self.stream.white)
        done = []
        for row, own in enumerate(np.random.SeedSequence(seed).generate_state(len(batch), np.uint32).tolist()):
            with seeds_of_image(own):
                done.append(self.transform(rgb(rows, row, stream.form, stream.bad)))
        return torch.stack(done)


def readable(source: str, samples: Iterable[Sample]) -> Generator[Sample, None, None]:
    """The samples. An error of the library that reads them becomes one that names the last good sample."""
    name = ""
    try:
        for sample in samples:
            name = sample.name
            yield sample
    except ArpHubError:
        raise
    except Exception as error:  # the libraries, their parsers and HTTP clients raise dozens of kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        where = f"after {name}" if name else "at its first image"
        raise ArpHubError(
            f"data '{source}' cannot be read on, {where}: {type(error).__name__}: {reason}. Check the shard, or the "
            "connection"
        ) from error


def _rebatched(chunks: Iterable[Chunk], size: int, skip: int) -> Iterator[Chunk]:
    """Batches of exactly ``size`` images, after the first ``skip`` images."""
    held: list[Chunk] = []
    for pixels, labels in chunks:
        left_out = min(skip, len(labels))
        skip -= left_out
        if left_out < len(labels):
            held.append((pixels[left_out:], labels[left_out:]))
        while sum(len(labels) for _, labels in held) >= size:
            pixels, labels = (torch.cat(parts) for parts in zip(*held, strict=True))
            yield pixels[:size], labels[:size]
            held = [(pixels[size:], labels[size:])]
