"""Labelled images for training, validation and testing, in the input format of a model."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from ...errors import ArpHubError
from ..seeds import keyed_generator, keyed_seed
from .images import DecodedImages, Images
from .input_format import input_format
from .sources import Table, Treatment, bind, open_tables, renamed
from .stream_sources import StreamTable, open_streams, timm_streams
from .streams import ImageStream, Sample
from .tables import Columns
from .timm_sets import TimmName, is_timm_source, open_timm

_logger = logging.getLogger(__name__)

_TEST_NAMES = ("test", "validation", "valid", "val", "dev")
"""Names of the test split, in order of preference."""


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


@dataclass(frozen=True)
class ImageData:
    """A data set with its splits.

    Attributes:
        name: The source that was passed to `load_data`.
        num_classes: Number of classes, 0 without labels.
        class_names: Names of the classes, where the data has them.
        train: Images to train on, without those held out.
        val: Images held out of ``train`` for validation, or None.
        test: Images for the final accuracy only.
        others: All splits but ``train``, by their own names.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    train: Split | StreamedSplit
    val: Split | None
    test: Split | StreamedSplit
    others: Mapping[str, Split | StreamedSplit] = field(default_factory=dict)

    def bad_images(self, accelerator: Accelerator | None = None) -> int:
        """Number of images that could not be decoded so far, on any process, each counted once."""
        splits = (self.train, self.test, *self.others.values())
        seen = torch.cat([images.bad.seen for images in {id(split.images): split.images for split in splits}.values()])
        if accelerator is not None:
            seen = accelerator.reduce(seen.to(accelerator.device, torch.float32), "sum")
        return int((seen > 0).sum())

    def split(self, name: str) -> Split | StreamedSplit:
        """One split by name: ``train``, ``val``, ``test`` or another split that the data has.

        Raises:
            ArpHubError: If there is no such split.
        """
        splits: dict[str, Split | StreamedSplit] = {**self.others, "train": self.train, "test": self.test}
        if self.val is not None:
            splits["val"] = self.val
        if name not in splits:
            raise ArpHubError(f"data '{self.name}' has no split '{name}': choose one of {', '.join(sorted(splits))}")
        return splits[name]


def load_data(
    source: str,
    model: nn.Module,
    *,
    image_key: str | None = None,
    label_key: str | None = None,
    val_fraction: float = 0.0,
    seed: int = 0,
    require_labels: bool = True,
    auto_augment: str = "",
    max_bad_images: int = 0,
    streaming: bool = False,
    epoch_images: int = 0,
    data_dir: str = "",
    train_split: str = "",
    test_split: str = "",
) -> ImageData:
    """Open a data set for a model. Pixels are decoded when they are first used.

    Images of at most 96 pixels a side, judged by a fixed sample of all splits, are small: they are resized to the input
    size without a crop. All other images are resized and cropped as the model's config says. Warnings name the files of
    a folder that are not used.

    Args:
        source: ``digits``; a folder of class folders (read as torchvision's ``ImageFolder`` does, under ``train/`` and
            ``test/`` if it is split), of parquet files or of tar shards; a pattern of tar shards such as
            ``train-{0000..0063}.tar``; the id of a Hub dataset; or ``timm:NAME`` for a name that timm's ``--dataset``
            takes. ``SOURCE:CONFIG`` chooses a configuration of a Hub dataset or of a parquet folder with a README.
        model: The model whose pretrained_cfg gives input size, mean and std.
        image_key: Image column; by default the one of type Image.
        label_key: Label column of whole numbers, bools or strings; by default the one of type ClassLabel. Strings are
            class names: they are numbered in sorted order.
        val_fraction: Share of the training images that is held out, stratified by class.
        seed: Seed of the held-out split.
        require_labels: Whether data without labels is an error.
        auto_augment: timm's augmentation string, such as ``rand-m9-mstd0.5``, for training.
        max_bad_images: Largest number of images of a split that may fail to decode. Each becomes the mean colour.
        streaming: Read tar shards, parquet files or a Hub dataset in order, without a download or an index of images.
        epoch_images: Images of an epoch, for a stream; by default the number of training images, where it is known.
        data_dir: Folder of a data set of timm.
        train_split: Name of the split to train on; by default ``train``.
        test_split: Name of the split to test on; by default ``test``, or else ``validation``.

    Raises:
        ArpHubError: If the data or one of its columns cannot be found, or if labels are missing or out of range.
    """
    if not 0 <= val_fraction < 1:
        raise ArpHubError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    if max_bad_images < 0:
        raise ArpHubError(f"max_bad_images must be at least 0, got {max_bad_images}")
    form = input_format(model)
    columns = Columns(image_key, label_key, require_labels)
    treatment = Treatment(form, auto_augment, max_bad_images)
    chosen = (train_split, test_split)
    timm_name = TimmName(source, data_dir, chosen, columns) if is_timm_source(source) else None
    if data_dir and not timm_name:
        raise ArpHubError(f"data_dir='{data_dir}' is for data sets of timm, such as timm:torch/cifar10: leave it out")
    if not streaming and not (timm_name and timm_name.streams):
        if epoch_images:
            raise ArpHubError(f"epoch_images={epoch_images} is for streams: set streaming, or leave it out")
        if timm_name:
            tables = bind(source, *open_timm(timm_name), treatment)
        else:
            tables = renamed(source, open_tables(source, columns, treatment), chosen)
        return _arrange(source, tables, val_fraction, seed, require_labels)
    if val_fraction:
        raise ArpHubError(
            f"val_fraction={val_fraction} cannot be held out of a stream: set it to 0, or choose a split for testing "
            "with test_split"
        )
    classes = getattr(model, "num_classes", 0)
    if timm_name:
        streams = timm_streams(timm_name, treatment, epoch_images, classes)
    else:
        streams = renamed(source, open_streams(source, columns, treatment, classes, counted=not epoch_images), chosen)
    return _arrange_streams(source, streams, epoch_images, require_labels)


def calibration_counts(data: ImageData, count: int | None = None, copies: int | None = None) -> tuple[int, int]:
    """Number of images that `calibration_images` takes, and of varied copies that it adds of each.

    Args:
        data: The data.
        count: Number of images, at most all training images. By default 1,024 images held in memory, or 256 others.
        copies: Copies of each image. By default one for images held in memory, or none.

    Raises:
        ArpHubError: If there would be no images, or copies are negative.
    """
    small = isinstance(data.train.images, DecodedImages)
    if count is None:
        count = 1024 if small else 256  # a large image has many more patches and takes proportionally longer
    if copies is None:
        copies = 1 if small else 0
    if count < 1:
        raise ArpHubError(f"calibration needs at least one image, got {count}")
    if copies < 0:
        raise ArpHubError(f"calibration_copies must be 0 or more, got {copies}")
    return min(count, len(data.train) or count), copies


def calibration_images(
    data: ImageData, count: int | None = None, *, copies: int | None = None, seed: int = 0, workers: int = 0
) -> Tensor:
    """Normalised training images without labels, for the calibration of `make_plan` and `decompose`.

    Copies of an image are rotated, shifted, scaled and recoloured, so that they differ from all training images.

    Args:
        data: The data.
        count: Number of images, at most all training images. By default 1,024 images held in memory, or 256 others.
        copies: Number of varied copies of each image. By default one for images held in memory, or none.
        seed: Seed of the choice and of the copies.
        workers: DataLoader workers, for large data.

    Returns:
        Images ``(count * (1 + copies), 3, H, W)`` on the CPU, each followed by its copies.

    Raises:
        ArpHubError: If there would be no images, or copies are negative.
    """
    device = torch.device("cpu")
    count, copies = calibration_counts(data, count, copies)
    part = data.train.excerpt(count, seed)
    versions = [torch.cat(list(part.images.evaluation(part.indices, 128, device, workers)))]
    for copy in range(copies):
        key = keyed_seed(seed, "calibration", copy)
        versions.append(torch.cat(list(part.images.varied(part.indices, 128, device, workers, key))))
    return torch.stack(versions, dim=1).flatten(0, 1)


def refinement_images(data: ImageData, count: int, *, seed: int = 0, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Normalised training images without labels, for `refine`: to learn from, and a tenth to hold out.

    With the same seed, `calibration_images` takes its images from the other end of the same order. So the fit has not
    seen the images held out, unless nearly all training images calibrate it.

    Args:
        data: The data.
        count: Number of images, at most all training images.
        seed: Seed of the choice.
        workers: DataLoader workers, for large data.

    Returns:
        Images to learn from, and held-out images: ``(N, 3, H, W)`` on the CPU.
    """
    part = data.train.excerpt(count, seed, from_end=True)
    images = torch.cat(list(part.images.evaluation(part.indices, 128, torch.device("cpu"), workers)))
    held_out = min(len(images), max(2, len(images) // 10))
    return images[:-held_out], images[-held_out:]


def sample(split: Split, most: int | None) -> Tensor:
    """Positions in a split of at most this many images, chosen at random but equal at every call; None: of all."""
    if most is None or most >= len(split):
        return torch.arange(len(split))
    return torch.randperm(len(split), generator=keyed_generator("evaluate"))[:most].sort().values


def _arrange(source: str, tables: dict[str, Table], val_fraction: float, seed: int, require_labels: bool) -> ImageData:
    """Decide which table is for training and which for testing."""
    usable = {name: table for name, table in tables.items() if not require_labels or _has_labels(table)}
    train_name, test_name = _train_and_test(source, list(tables), list(usable))
    splits = {
        name: Split(
            name,
            table.images,
            table.labels if _has_labels(table) else None,
            torch.arange(len(table.images)),
            table.class_names,
        )
        for name, table in tables.items()
    }
    class_names = usable[train_name].class_names
    num_classes = _check_labels(source, [splits[train_name], splits[test_name]], len(class_names))
    train, val = _hold_out(splits[train_name], val_fraction, seed)
    others = {name: split for name, split in splits.items() if name != "train"}
    return ImageData(source, num_classes, class_names, train, val, splits[test_name], others)


def _train_and_test(source: str, names: list[str], usable: list[str]) -> tuple[str, str]:
    """The names of the splits for training and testing.

    Args:
        source: The data, for messages.
        names: All splits.
        usable: Those with labels, or all where no labels are required.
    """
    if not usable:
        raise ArpHubError(f"data '{source}': no split has labels (splits: {', '.join(names) or 'none'})")
    if "train" in names and "train" not in usable:
        raise ArpHubError(
            f"data '{source}': the images of split 'train' have no labels; those of {', '.join(usable)} do"
        )
    if len(usable) == 1:
        _logger.warning(
            "data '%s' has one usable split, '%s': training and testing share its images, so accuracy is too high",
            source,
            usable[0],
        )
        return usable[0], usable[0]
    test_name = next((name for name in _TEST_NAMES if name in usable), None)
    if "train" in usable and test_name:
        return "train", test_name
    raise ArpHubError(
        f"data '{source}' needs the splits 'train' and 'test' (or 'validation'), it has {', '.join(usable)}. Name "
        "others with train_split and test_split"
    )


def _arrange_streams(
    source: str, tables: Mapping[str, StreamTable], epoch_images: int, require_labels: bool
) -> ImageData:
    """Decide which stream is for training and which for testing."""
    usable = [name for name, table in tables.items() if not require_labels or table.images.labelled]
    train_name, test_name = _train_and_test(source, list(tables), usable)
    count = epoch_images or tables[train_name].count or 0
    splits = {
        name: StreamedSplit(name, table.images, count if name == train_name else table.count or 0, table.class_names)
        for name, table in tables.items()
    }
    train = splits[train_name]
    others = {name: split for name, split in splits.items() if name != "train"}
    return ImageData(source, train.images.classes, train.class_names, train, None, splits[test_name], others)


def _has_labels(table: Table) -> bool:
    """Whether there are labels. Hidden labels are -1 throughout, by the Hub's convention."""
    return table.labels is not None and not bool((table.labels == -1).all())


def _check_labels(source: str, splits: list[Split], named: int) -> int:
    """The number of classes, from their names or from the labels of ``train``, after the labels are checked."""
    labelled = [(split.name, split.labels) for split in splits if split.labels is not None]
    if not labelled:
        return 0
    num_classes = named or int(labelled[0][1].max()) + 1
    if not named and num_classes > 10**6:  # public data sets have up to 200,000 classes
        raise ArpHubError(
            f"data '{source}': labels go up to {num_classes - 1}, so they look like image numbers: name the column "
            "of the classes with label_key, or number the classes from 0"
        )
    for name, labels in labelled:
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            wrong = int(((labels < 0) | (labels >= num_classes)).sum())
            raise ArpHubError(
                f"data '{source}': {wrong} labels of split '{name}' are out of range, found {low}..{high} where "
                f"{num_classes} classes allow 0..{num_classes - 1}: correct the labels or name another label_key"
            )
    return num_classes


def _hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split | None]:
    if fraction == 0:
        return train, None
    stratify = None if train.labels is None else train.labels.numpy()
    try:
        kept, held = train_test_split(train.indices.numpy(), test_size=fraction, stratify=stratify, random_state=seed)
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise ArpHubError(
            f"val_fraction={fraction} cannot be held out of {len(train)} images, stratified by class: {reason}. "
            "Use 0 or another share"
        ) from error
    parts = []
    for name, chosen in (("train", kept), ("val", held)):
        indices = torch.from_numpy(np.sort(chosen))
        labels = None if train.labels is None else train.labels[indices]
        parts.append(Split(name, train.images, labels, indices, train.class_names))
    return parts[0], parts[1]
