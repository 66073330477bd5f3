"""Splits of a data set: images with labels, read at random or in the order of their shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ArpHubError
from ..seeds import keyed_generator
from .images import Images
from .streams import ImageStream, Sample


@dataclass(frozen=True)
class Split:
    """Some labelled images.

    Attributes:
        name: Name in messages, such as ``train`` or ``test``.
        images: Where the pixels come from.
        labels: Class of each image, ``(N,)``; None where the data has no labels.
        indices: Which of ``images`` belong to this split, ``(N,)``.
        class_names: Names of the classes, where the data has them.
    """

    name: str
    images: Images
    labels: Tensor | None
    indices: Tensor
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def label_range(self) -> tuple[int, int] | None:
        """Lowest and highest label; None without labels."""
        return None if self.labels is None else (int(self.labels.min()), int(self.labels.max()))

    def labelled(
        self, size: int, device: torch.device, workers: int, *, rank: int = 0, world: int = 1, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One process's images in batches, not augmented, with their labels.

        Args:
            size: Images in a batch.
            device: Where the images go; labels stay on the CPU.
            workers: DataLoader workers, for large data.
            rank: Number of this process.
            world: Number of processes, which share the images.
            most: Number of images, chosen by `sample`; None: all.
        """
        assert self.labels is not None
        chosen = sample(self, most)[rank::world]
        if not len(chosen):
            return iter(())
        images = self.images.evaluation(self.indices[chosen], size, device, workers)
        return zip(images, self.labels[chosen].split(size), strict=False)

    def measured(self, most: int) -> Split:
        """The images that `labelled` gives."""
        chosen = sample(self, most)
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, indices=self.indices[chosen], labels=labels)

    def excerpt(self, count: int, seed: int, *, from_end: bool = False) -> Split:
        """Some images in random order. With one seed, those from the end are others than those from the beginning."""
        order = torch.randperm(len(self), generator=keyed_generator(seed, "calibration"))
        chosen = order[-count:] if from_end else order[:count]
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, indices=self.indices[chosen], labels=labels)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, normalised and not augmented, ``(N, 3, H, W)``, and their labels ``(N,)``: for small data.

        Raises:
            ArpHubError: If there are no labels.
        """
        if self.labels is None:
            raise ArpHubError(f"split '{self.name}' has no labels")
        return torch.cat(list(self.images.evaluation(self.indices, 256, torch.device("cpu"), 0))), self.labels


@dataclass(frozen=True)
class StreamedSplit:
    """Some images that are read in the order of their shards.

    Attributes:
        name: Name in messages, such as ``train`` or ``test``.
        images: Where the pixels and labels come from.
        count: Number of images, or of images in an epoch; 0 if it is not known.
        class_names: Names of the classes, where the data has them.
    """

    name: str
    images: ImageStream
    count: int
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    @property
    def label_range(self) -> tuple[int, int] | None:
        """Lowest and highest label that is allowed, as each is checked when it is read; None without labels."""
        return (0, self.images.classes - 1) if self.images.labelled else None

    def labelled(
        self, size: int, device: torch.device, workers: int, *, rank: int = 0, world: int = 1, most: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One process's images in batches, not augmented, with their labels, as `Split.labelled` gives them."""
        return self.images.evaluation(size, device, workers, rank, world, most)

    def measured(self, most: int) -> Split:
        """The images that `labelled` gives, in memory."""
        return self._held(self.images.first(most))

    def excerpt(self, count: int, seed: int, *, from_end: bool = False) -> Split:
        """Some images of a shuffled order, in memory. With one seed, those from the end are others."""
        return self._held(self.images.excerpt(count, seed, odd=from_end))

    def _held(self, samples: list[Sample]) -> Split:
        labels = self.images.labels(samples) if self.images.labelled else None
        return Split(self.name, self.images.held(samples), labels, torch.arange(len(samples)), self.class_names)


def sample(split: Split, most: int | None) -> Tensor:
    """Positions in a split of at most this many images, chosen at random but equal at every call; None: of all."""
    if most is None or most >= len(split):
        return torch.arange(len(split))
    return torch.randperm(len(split), generator=keyed_generator("evaluate"))[:most].sort().values
