"""The data sets of ``timm.data.create_dataset``, by the names that timm's ``--dataset`` takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torchvision.datasets import ImageFolder

from ...errors import ArpHubError
from .decoding import open_image
from .images import progress
from .streams import Sample
from .tables import Columns, Splits, class_numbers

PREFIX = "timm:"
"""Start of a source that timm opens."""


def is_timm_source(source: str) -> bool:
    """Whether timm opens a source."""
    return isinstance(source, str) and source.startswith(PREFIX)


_STREAMS = ("hfids", "tfds", "wds")
"""Families of timm's data sets that can be read in order only."""


@dataclass(frozen=True)
class TimmName:
    """How `create_dataset` is called.

    Attributes:
        source: The data as the user wrote it.
        root: Its folder, or empty.
        splits: Names of the splits for training and testing, as timm knows them; empty ones are found.
        columns: Columns of images and labels.
    """

    source: str
    root: str
    splits: tuple[str, str]
    columns: Columns

    @property
    def name(self) -> str:
        """The name without the prefix."""
        return self.source.removeprefix(PREFIX)

    @property
    def streams(self) -> bool:
        """Whether the data can be read in order only."""
        return self.name.partition("/")[0].lower() in _STREAMS and "/" in self.name

    def create(self, split: str, **more: Any) -> Any:
        """One split.

        Raises:
            ArpHubError: If timm or a library that it needs cannot open it.
        """
        root = str(Path(self.root).expanduser()) if self.root else None
        named = {"input_key": self.columns.image, "target_key": self.columns.label}
        keys: dict[str, Any] = {key: value for key, value in named.items() if value}
        try:
            found = create_dataset(self.name, root=root, split=split, **keys, **more)
        except Exception as error:  # readers, parsers and HTTP clients raise dozens of kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ArpHubError(
                f"timm cannot open split '{split}' of the data '{self.source}' with data_dir='{self.root}': "
                f"{type(error).__name__}: {reason}"
            ) from error
        if isinstance(getattr(found, "reader", None), ReaderImageInTar):  # workers would share its open file
            raise ArpHubError(
                f"data '{self.source}': '{self.root}' is a tar archive of class folders, which several workers cannot "
                "read: unpack it, and give the folder"
            )
        return found

    def opened(self, **more: Any) -> dict[str, tuple[str, Any]]:
        """The splits for training and testing, each with timm's name. Without one for testing, the first alone."""
        name = self.splits[0] or "train"
        first = self.create(name, **more)
        train = {"train": (name, first)}
        if self.splits[1]:
            test = self.create(self.splits[1], **more)
            for inner, outer, whole in ((first, test, self.splits[1]), (test, first, name)):
                if _contains(outer, inner):
                    raise self._no_folder(whole)
            return train | {"test": (self.splits[1], test)}
        for split in ("validation", "test"):
            try:
                test = self.create(split, **more)
            except ArpHubError:  # timm cannot tell which splits there are
                continue
            if _contains(first, test):
                raise self._no_folder(name)
            if _contains(test, first) or (_place(test) is not None and _place(test) == _place(first)):
                continue  # timm reads the whole folder if it has none for a split
            return train | {split: (split, test)}
        return train

    def _no_folder(self, split: str) -> ArpHubError:
        return ArpHubError(
            f"data '{self.source}': timm finds no folder of split '{split}' in data_dir='{self.root}', and would read "
            "the images of all splits: call the folders train and validation, or give train_split and test_split"
        )


def _place(dataset: Any) -> Path | None:
    """The folder that is read, for data sets that look for one of each split."""
    reader = dataset.reader if isinstance(dataset, ImageDataset) else dataset
    return Path(reader.root).resolve() if isinstance(reader, (ReaderImageFolder, ImageFolder)) else None


def _contains(outer: Any, inner: Any) -> bool:
    """Whether the folder of one data set lies inside that of another one."""
    above, below = _place(outer), _place(inner)
    return above is not None and below is not None and above in below.parents


class TimmImages:
    """The images of a data set of timm that can be read at random.

    Args:
        dataset: The data set.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.white: Mapping[str, int] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def open(self, row: int) -> Image.Image:
        """One image; of timm's own readers, with only its header read."""
        if isinstance(self.dataset, ImageDataset):
            return open_image(self.dataset.reader[row][0])
        image = self.dataset[row][0]
        return image if isinstance(image, Image.Image) else Image.fromarray(image)

    def name(self, row: int) -> str:
        """The file name or the number of an image."""
        if isinstance(self.dataset, ImageDataset):
            return f"image '{self.dataset.filename(row)}'"
        return f"image {row}"


def open_timm(wanted: TimmName) -> tuple[Splits, tuple[str, ...]]:
    """Images and labels of each split, and the names of the classes."""
    found = wanted.opened()
    names = class_names(found["train"][1])
    splits: Splits = {}
    for split, (own_name, dataset) in found.items():
        labels = _renumbered(wanted.source, own_name, _labels(dataset), class_names(dataset), names)
        splits[split] = TimmImages(dataset), class_numbers(wanted.source, split, labels, {})
    return splits, names


def _renumbered(source: str, split: str, labels: list[Any], own: tuple[str, ...], names: tuple[str, ...]) -> list[Any]:
    """Labels in the numbers of the training split's classes. Folders are numbered split by split.

    Raises:
        ArpHubError: If the split has a class that the training split lacks.
    """
    if not own or not names or own == names:
        return labels
    numbers = {name: number for number, name in enumerate(names)}
    if missing := [name for name in own if name not in numbers]:
        raise ArpHubError(
            f"data '{source}': split '{split}' has the class '{missing[0]}', which the training split lacks: give "
            "both the same classes"
        )
    return [numbers[own[label]] for label in labels]


def _labels(dataset: Any) -> list[Any]:
    """All labels, without decoding where the data set allows that."""
    reader = getattr(dataset, "reader", dataset)
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    if hasattr(reader, "samples"):
        return [sample[1] for sample in reader.samples]
    if hasattr(dataset, "targets"):
        return torch.as_tensor(dataset.targets).tolist()
    return [dataset[row][1] for row in progress(range(len(dataset)), "reading labels")]


def class_names(dataset: Any) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers; empty if some are missing."""
    numbers = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}
    names = {number: str(name) for name, number in numbers.items()}
    return tuple(names[number] for number in range(len(names))) if sorted(names) == list(range(len(names))) else ()


class TimmSamples:
    """The samples of a data set of timm that can be read in order only. timm's reader divides and shuffles them.

    Args:
        wanted: The data set.
        split: The split, as timm knows it.
        count: Images of an epoch; None for those that timm knows.
    """

    def __init__(self, wanted: TimmName, split: str, count: int | None) -> None:
        self.wanted, self.split, self.count = wanted, split, count
        self.more = {"num_samples": count} if count else {}
        try:
            self.count = count or int(self.create().reader.num_samples) or None
        except ArpHubError:  # the reader of the datasets library wants a number, which only training needs
            self.more = {"num_samples": 1}
            self.create()

    def create(self, **more: Any) -> Any:
        """The split as timm reads it."""
        return self.wanted.create(self.split, **self.more, **more)

    def order(self, seed: int | None, rank: int = 0, world: int = 1) -> Iterable[Sample]:
        """One process's samples; at least its share of an epoch if there is a seed."""
        if seed is None or self.count is None:  # timm's readers would repeat or leave out some
            return itertools.islice(self._samples(self.create(), 0, 1), rank, None, world)
        return self._samples(self.create(is_training=True, seed=seed % 2**31), rank, world)

    def workers(self, wanted: int, world: int) -> int:
        """All that are wanted: timm itself refuses more workers than shards."""
        return wanted

    def _samples(self, dataset: Any, rank: int, world: int) -> Iterator[Sample]:
        reader = dataset.reader
        reader.dist_rank, reader.dist_num_replicas = rank, world  # calibration reads all images on every process
        for number, (image, label) in enumerate(dataset):
            yield Sample(image, label, f"image {number} of one loader worker")
