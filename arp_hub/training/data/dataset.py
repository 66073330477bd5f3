"""Labelled images for training, validation and testing, in the input format of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.model_selection import train_test_split
from torch import nn

from ...errors import ArpHubError
from .augment import Augmentation
from .input_format import InputFormat, input_format
from .sources import Table, Treatment, bind, open_tables, renamed
from .splits import Split, StreamedSplit
from .stream_sources import StreamTable, open_streams, timm_streams
from .tables import Columns
from .timm_sets import TimmName, is_timm_source, open_timm

_logger = logging.getLogger(__name__)

_TEST_NAMES = ("test", "validation", "valid", "val", "dev")
"""Names of the test split, in order of preference."""


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

    @property
    def form(self) -> InputFormat:
        """Input format of the images."""
        return self.train.images.form

    @property
    def shares_images(self) -> bool:
        """Whether training and testing share their images, because one split is usable."""
        return self.train.images is self.test.images

    def warn_of_shared_images(self) -> None:
        """Warn, before accuracy is measured, if training and testing share their images."""
        if self.shares_images:
            _logger.warning(
                "data '%s' has one usable split, '%s': training and testing share its images, so accuracy is too high",
                self.name,
                self.test.name,
            )

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
    augmentation: Augmentation | str = "",
    max_bad_images: int = 0,
    streaming: bool = False,
    epoch_images: int = 0,
    data_dir: str = "",
    train_split: str = "",
    test_split: str = "",
) -> ImageData:
    """Open a data set for a model. Pixels are decoded when they are first used.

    Images of at most 96 pixels a side, judged by a fixed sample of all splits, are small: they are resized to the input
    size without a crop. All other images are resized and cropped as the model's config says. Call
    ``note_crop(model, data.form)`` before you save a model, so that others resize its images alike. Warnings name the
    files of a folder that are not used.

    Args:
        source: ``digits``, the id of a Hub dataset, or a folder of class folders, parquet files or tar shards. Class
            folders are read as torchvision's ``ImageFolder`` does, under ``train/`` and ``test/`` if they are split. A
            pattern such as ``train-{0000..0063}.tar`` names tar shards. ``timm:NAME`` opens what timm's ``--dataset``
            takes. ``SOURCE:CONFIG`` chooses a configuration of a Hub dataset or of a parquet folder with a README.
        model: The model whose pretrained_cfg gives input size, mean and std.
        image_key: Image column; by default the one of type Image.
        label_key: Label column of whole numbers, bools or strings; by default the one of type ClassLabel. Strings are
            class names: they are numbered in sorted order.
        val_fraction: Share of the training images that is held out, stratified by class.
        seed: Seed of the held-out split.
        require_labels: Whether data without labels is an error. If not, no accuracy need be measured, so there is no
            warning where training and testing share their images.
        augmentation: How training images are varied: timm's string, such as ``rand-m9-mstd0.5``, or an `Augmentation`.
        max_bad_images: Largest number of images of a split that may fail to decode. Each becomes the mean colour.
        streaming: Read tar shards, parquet files or a Hub dataset in order, without a download or an index of images.
        epoch_images: Images of an epoch, for a stream; by default the number of training images, where it is known.
        data_dir: Folder of a data set of timm.
        train_split: Name of the split to train on; by default ``train``.
        test_split: Name of the split to test on; by default ``test`` if it has labels, or else ``validation``.

    Raises:
        ArpHubError: If the data or one of its columns cannot be found, or if labels are missing or out of range.
    """
    if not 0 <= val_fraction < 1:
        raise ArpHubError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
    if max_bad_images < 0:
        raise ArpHubError(f"max_bad_images must be at least 0, got {max_bad_images}")
    form = input_format(model)
    columns = Columns(image_key, label_key, require_labels)
    treatment = Treatment(form, Augmentation.of(augmentation), max_bad_images)
    chosen = (train_split, test_split)
    own_names = {role: name for role, name in zip(("train", "test"), chosen, strict=True) if name}
    timm_name = TimmName(source, data_dir, chosen, columns) if is_timm_source(source) else None
    if data_dir and not timm_name:
        raise ArpHubError(f"data_dir='{data_dir}' is for data sets of timm, such as timm:torch/cifar10: leave it out")
    if streaming or (timm_name and timm_name.streams):
        if val_fraction:
            raise ArpHubError(
                f"val_fraction={val_fraction} cannot be held out of a stream: set it to 0, or choose a split for "
                "testing with test_split"
            )
        classes = getattr(model, "num_classes", 0)
        if timm_name:
            streams = timm_streams(timm_name, treatment, epoch_images, classes)
        else:
            opened = open_streams(source, columns, treatment, classes, counted=not epoch_images)
            streams = renamed(source, opened, chosen)
        return _arrange_streams(source, streams, epoch_images, require_labels, own_names)
    if epoch_images:
        raise ArpHubError(f"epoch_images={epoch_images} is for streams: set streaming, or leave it out")
    if timm_name:
        tables = bind(source, *open_timm(timm_name), treatment)
    else:
        tables = renamed(source, open_tables(source, columns, treatment), chosen)
    return _arrange(source, tables, val_fraction, seed, require_labels, own_names)


def _arrange(
    source: str,
    tables: dict[str, Table],
    val_fraction: float,
    seed: int,
    require_labels: bool,
    own_names: Mapping[str, str],
) -> ImageData:
    """Decide which table is for training and which for testing."""
    labelled = [name for name, table in tables.items() if _has_labels(table)]
    usable = {name: table for name, table in tables.items() if not require_labels or name in labelled}
    train_name, test_name = _train_and_test(source, list(tables), list(usable), labelled, own_names)
    splits = {
        name: Split(
            own_names.get(name, name),
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
    data = ImageData(source, num_classes, class_names, train, val, splits[test_name], _others(splits))
    if require_labels:
        data.warn_of_shared_images()
    return data


def _others(splits: Mapping[str, Split | StreamedSplit]) -> dict[str, Split | StreamedSplit]:
    """The splits beside the one for training, by their roles and by their own names."""
    others = {name: split for name, split in splits.items() if name != "train"}
    return {**others, **{split.name: split for split in others.values()}}


def _train_and_test(
    source: str, names: list[str], usable: list[str], labelled: list[str], own_names: Mapping[str, str]
) -> tuple[str, str]:
    """The names of the splits for training and testing.

    Args:
        source: The data, for messages.
        names: All splits.
        usable: Those with labels, or all where no labels are required.
        labelled: Those with labels, which are for testing before all others.
        own_names: Names that were chosen for ``train`` and ``test``.
    """
    if not usable:
        raise ArpHubError(
            f"data '{source}': no split has labels (splits: {', '.join(names) or 'none'}): give a folder of images for "
            "each class, or a column of labels"
        )
    if "train" in names and "train" not in usable:
        raise ArpHubError(
            f"data '{source}': the images of split 'train' have no labels; those of {', '.join(usable)} do"
        )
    if "test" in own_names and "test" not in usable:
        raise ArpHubError(f"data '{source}': the images of split '{own_names['test']}' have no labels: choose another")
    if len(usable) == 1:
        return usable[0], usable[0]
    if "test" in own_names and "train" in usable:
        return "train", "test"
    tests = [name for name in _TEST_NAMES if name in labelled] + [name for name in _TEST_NAMES if name in usable]
    test_name = tests[0] if tests else None
    if "train" in usable and test_name:
        return "train", test_name
    raise ArpHubError(
        f"data '{source}' needs the splits 'train' and 'test' (or 'validation'), it has {', '.join(usable)}. Name "
        "others with train_split and test_split"
    )


def _arrange_streams(
    source: str,
    tables: Mapping[str, StreamTable],
    epoch_images: int,
    require_labels: bool,
    own_names: Mapping[str, str],
) -> ImageData:
    """Decide which stream is for training and which for testing."""
    labelled = [name for name, table in tables.items() if table.images.labelled]
    usable = [name for name in tables if not require_labels or name in labelled]
    train_name, test_name = _train_and_test(source, list(tables), usable, labelled, own_names)
    count = epoch_images or tables[train_name].count or 0
    splits = {
        name: StreamedSplit(
            own_names.get(name, name),
            table.images,
            count if name == train_name else table.count or 0,
            table.class_names,
        )
        for name, table in tables.items()
    }
    train = splits[train_name]
    data = ImageData(source, train.images.classes, train.class_names, train, None, splits[test_name], _others(splits))
    if require_labels:
        data.warn_of_shared_images()
    return data


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
